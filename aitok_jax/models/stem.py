"""A convolutional stem, an aid for backbones with random weights that no published set-up has.

A small backbone trained on little data learns several times faster with it ("Early convolutions", arXiv 2106.14881).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from aitok_jax.models.layers import Widths


def convolve(x: jax.Array, stem: Sequence[int], blocks: int, widths: Widths, epsilon: float) -> jax.Array:
    """3×3 convolutions with LayerNorm and GELU, [B,H,W,3] -> [B,H/2^n,W/2^n,C], for a compact module to call.

    Args:
        stem: n widths, of stride 2 each.
        blocks: residual convolutions of stride 1 after them, which look beyond a patch, where attention takes long to
            learn what is near.
        epsilon: of the LayerNorms.
    """
    layers = [(width, 2) for width in stem] + [(width, 1) for width in stem[-1:]] * blocks
    dtypes = {"dtype": widths.dtype, "param_dtype": widths.param_dtype}
    for i, (width, stride) in enumerate(layers):
        y = nn.Conv(width, (3, 3), (stride, stride), padding=1, use_bias=False, **dtypes, name=f"stem_{i}")(x)
        y = jax.nn.gelu(widths.cast_norm(epsilon, f"stem_norm_{i}")(y), approximate=False)
        x = y if stride == 2 else x + y
    return x


def check(stem: Sequence[int], blocks: int, patch: int) -> None:
    """ValueError where a stem does not fit the patch."""
    if patch % 2 ** len(stem):
        raise ValueError(f"patch={patch} must be a multiple of 2^{len(stem)}, the stride of the stem")
    if blocks < 0 or (blocks and not stem):
        raise ValueError(f"stem_blocks={blocks} come after a stem: give its widths, or stem_blocks=0")
