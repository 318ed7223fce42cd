"""Window attention on CUDA GPUs: cuDNN's fused attention with a bias, in bfloat16.

Its bias is bfloat16 and of all pairs, one for all windows, or where they are shifted one for each window of an image.
Less 8, the middle of 0..16, which no softmax sees, the bias is rounded by at most 2⁻⁶, as logits are whose q and k are
bfloat16. The gradient of the bias of the pairs is summed over the images by cuDNN, and over offsets by slices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models.position_bias import expand
from aitok_jax.models.window_kernels import APART

MIDDLE = 8.0
NEVER = -1e4  # the bias of a key that is none


def attend(
    q_NTC: jax.Array,
    k_NTC: jax.Array,
    v_NTC: jax.Array,
    bias_hP: jax.Array,
    regions_WT: np.ndarray | None,
    window: int,
) -> jax.Array:
    """softmax(q·k + bias + regions)·v, bfloat16[N,T,C], of the arguments of `window_attention.attention`."""
    (n, t, c), heads = q_NTC.shape, len(bias_hP)
    windows = 1 if regions_WT is None else len(regions_WT)
    odd = t % 2  # cuDNN's gradients want an even length

    def side_by_side(x_NTC):
        x = x_NTC.astype(jnp.bfloat16).reshape(n // windows, windows, t, heads, c // heads)
        x = x.transpose(0, 2, 1, 3, 4).reshape(n // windows, t, windows * heads, c // heads)
        return jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0)))

    pairs_hTT = expand(bias_hP, window) - MIDDLE
    bias = pairs_hTT[None]
    if regions_WT is not None:
        regions = jax.lax.optimization_barrier(jnp.asarray(regions_WT))  # all pairs are too many for a constant
        apart_WTT = regions[:, :, None] != regions[:, None]
        bias = bias + jnp.where(apart_WTT, APART, 0.0)[:, None]
    bias = bias.reshape(1, windows * heads, t, t)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, odd), (0, 0)))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, odd)), constant_values=NEVER)
    q, k, v = (side_by_side(x) for x in (q_NTC, k_NTC, v_NTC))
    out = jax.nn.dot_product_attention(q, k, v, bias.astype(jnp.bfloat16), scale=1.0, implementation="cudnn")[:, :t]
    out = out.reshape(n // windows, t, windows, heads, c // heads).transpose(0, 2, 1, 3, 4)
    return out.reshape(n, t, c)


@functools.cache
def available() -> bool:
    """Whether there is a cuDNN to compile for. JAX says that there is none, or one too old, by these errors."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 32), jnp.bfloat16)
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(attention, x, x, x)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True
