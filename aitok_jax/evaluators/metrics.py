"""Metrics of any dense map, per image, as pure functions in float32."""

import jax
import jax.numpy as jnp

from aitok_jax.tasks.modalities.modality import masked_mean


def inside(crop: tuple[int, int, int, int] | None, height: int, width: int) -> jax.Array:
    """bool[height,width]: the pixels of a crop (first row, row end, first column, column end); all of them for None.

    Raises:
        ValueError: the crop does not lie inside.
    """
    if crop is None:
        return jnp.ones((height, width), bool)
    top, bottom, left, right = crop
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"eval_crop={tuple(crop)} does not fit evaluation images of {height}x{width}; "
            "give (first row, row end, first column, column end) inside them, or None to measure everywhere"
        )
    return jnp.zeros((height, width), bool).at[top:bottom, left:right].set(True)


def confidence_spearman(confidence_BHW: jax.Array, error_BHW: jax.Array, valid_BHW: jax.Array) -> jax.Array:
    """How well the confidence orders the pixels of each image by their error.

    Spearman's rank correlation, over the valid pixels, of the confidence with the negative error; equal values share
    their mean rank. 1: the confidence orders the pixels perfectly; 0: it says nothing; -1: it is upside down.

    Args:
        confidence_BHW: any scale, larger = surer.
        error_BHW: of the prediction, at least 0.
        valid_BHW: bool.
    Returns:
        f32[B]; 0 where all confidences or all errors are equal, NaN for an image without a valid pixel.
    """
    a = _centred_ranks(jnp.asarray(confidence_BHW, jnp.float32), valid_BHW)
    b = _centred_ranks(-jnp.asarray(error_BHW, jnp.float32), valid_BHW)
    variance = masked_mean(jnp.square(a), valid_BHW) * masked_mean(jnp.square(b), valid_BHW)
    scale = jnp.sqrt(jnp.where(variance == 0, 1.0, variance))  # NaN, of an image without a valid pixel, stays NaN
    return masked_mean(a * b, valid_BHW) / scale


def _centred_ranks(x_BHW: jax.Array, valid_BHW: jax.Array) -> jax.Array:
    """Mean ranks of each image's valid values, scaled to mean 0 and a range inside -½..½; any value elsewhere."""

    def one_image(x, valid):
        place = jnp.arange(x.size)
        order, pixel = jax.lax.sort((jnp.where(valid, x, jnp.inf), place), num_keys=1)
        differs = order[1:] != order[:-1]
        edge = jnp.ones(1, bool)
        first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0))
        last = jax.lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place, x.size), reverse=True)
        rank = jnp.zeros(x.size).at[pixel].set((first + last) / 2)
        count = jnp.maximum(jnp.sum(valid), 1)
        return (rank - (count - 1) / 2) / count

    batch = x_BHW.shape[0]
    ranks = jax.vmap(one_image)(x_BHW.reshape(batch, -1), valid_BHW.reshape(batch, -1))
    return ranks.reshape(x_BHW.shape)
