"""Convolutions of the VQ-VAE: kernels of 1 and 3 that keep the size, and of 4 that halve or double it.

`down` and `up` with the same kernel are each other's transpose, so that the gradient of one is the other. A row of a
doubled map and one of the small map meet through kernel row t where doubled row = 2·row + t − 1. With t = 2i + r, the
doubled map cut into 2×2 squares (after its padding, as 4 times the channels) meets the small map through a 2×2 kernel:
`up` is one convolution of stride 1 and a rearrangement, and the gradient of the kernel is one matrix product. XLA's own
transposed convolution and its kernel gradients take several times as long on a CPU.
"""

import jax
import jax.numpy as jnp

PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def point(x_BHWC: jax.Array, kernel_11CF: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,H,W,F]: a matrix product, whose gradients are two more."""
    return x_BHWC @ kernel_11CF[0, 0]


def same(x_BHWC: jax.Array, kernel_33CF: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,H,W,F], padding 1."""
    return jax.lax.conv_general_dilated(x_BHWC, kernel_33CF, (1, 1), PADDING[1:3], dimension_numbers=LAYOUT)


@jax.custom_vjp
def down(x_BHWC: jax.Array, kernel_44CF: jax.Array) -> jax.Array:
    """Strided convolution [B,2h,2w,C] -> [B,h,w,F]; height and width must be even."""
    return jax.lax.conv_general_dilated(x_BHWC, kernel_44CF, (2, 2), PADDING[1:3], dimension_numbers=LAYOUT)


@jax.custom_vjp
def up(x_BhwC: jax.Array, kernel_44CF: jax.Array) -> jax.Array:
    """Transposed convolution [B,h,w,C] -> [B,2h,2w,F]."""
    c, f = kernel_44CF.shape[2:]
    kernel = kernel_44CF.reshape(2, 2, 2, 2, c, f)[::-1, :, ::-1]  # i r j s C F; a convolution counts i backwards
    kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, 4 * f)
    return _join(jax.lax.conv_general_dilated(x_BhwC, kernel, (1, 1), PADDING[1:3], dimension_numbers=LAYOUT))


def _cut(x_BHWF: jax.Array) -> jax.Array:
    """[B,2h,2w,F] -> [B,h+1,w+1,4F]: the 2×2 squares of the padded map."""
    b, height, width, f = x_BHWF.shape
    x = jnp.pad(x_BHWF, PADDING).reshape(b, height // 2 + 1, 2, width // 2 + 1, 2 * f)
    return x.transpose(0, 1, 3, 2, 4).reshape(b, height // 2 + 1, width // 2 + 1, 4 * f)


def _join(x_BhwF: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    b, h, w, f = x_BhwF.shape
    x = x_BhwF.reshape(b, h, w, 2, f // 2).transpose(0, 1, 3, 2, 4)
    return x.reshape(b, 2 * h, 2 * w, f // 4)[:, 1:-1, 1:-1]


def _kernel_gradient(big_BHWC: jax.Array, small_BhwF: jax.Array) -> jax.Array:
    """[4,4,C,F], of maps whose rows meet as above."""
    c, f = big_BHWC.shape[-1], small_BhwF.shape[-1]
    moved = [jnp.pad(small_BhwF, ((0, 0), (i, 1 - i), (j, 1 - j), (0, 0))) for i in (0, 1) for j in (0, 1)]
    # as matrices, and kept from fusion: XLA would transpose all places while it pads them, which takes twice as long
    cut_NC, moved_NF = jax.lax.optimization_barrier(
        (_cut(big_BHWC).reshape(-1, 4 * c), jnp.concatenate(moved, -1).reshape(-1, 4 * f))
    )
    gradient = jnp.einsum("nc,nf->cf", cut_NC, moved_NF, preferred_element_type=jnp.float32)
    gradient = gradient.reshape(2, 2, c, 2, 2, f)  # r s C i j F
    return gradient.transpose(3, 0, 4, 1, 2, 5).reshape(4, 4, c, f).astype(small_BhwF.dtype)


def _transposed(kernel_44CF: jax.Array) -> jax.Array:
    return kernel_44CF.transpose(0, 1, 3, 2)


def _down_gradients(given, dy_BhwF):
    x_BHWC, kernel = given
    return up(dy_BhwF, _transposed(kernel)), _kernel_gradient(x_BHWC, dy_BhwF)


def _up_gradients(given, dy_BHWF):
    x_BhwC, kernel = given
    return down(dy_BHWF, _transposed(kernel)), _transposed(_kernel_gradient(dy_BHWF, x_BhwC))


down.defvjp(lambda x, kernel: (down(x, kernel), (x, kernel)), _down_gradients)
up.defvjp(lambda x, kernel: (up(x, kernel), (x, kernel)), _up_gradients)
