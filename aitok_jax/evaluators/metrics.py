"""Depth metrics per image, as pure functions in float32 (AIT.md section 8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EIGEN_CROP = (45, 471, 41, 601)
"""Rows 45:471 and columns 41:601 of a 480x640 NYUv2 image: the region that published depth numbers are measured on."""

DEPTH_METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


def depth_metrics(
    prediction_BHW: jax.Array,
    depth_BHW: jax.Array,
    *,
    crop: tuple[int, int, int, int] | None = None,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
) -> dict[str, jax.Array]:
    """The nine metrics of each image over its valid pixels (AIT.md section 8).

    With prediction p, true depth t and e = log p - log t:
    d1, d2, d3: share of pixels with max(p/t, t/p) < 1.25, 1.25², 1.25³; abs_rel: mean |p-t|/t; sq_rel: mean (p-t)²/t;
    rmse: sqrt(mean (p-t)²) in metres; rmse_log: sqrt(mean e²); log10: mean |log10 p - log10 t|;
    silog: sqrt(mean e² - ½ (mean e)²).

    Args:
        prediction_BHW: metres, any float dtype; mended by `mend_prediction` and not clamped otherwise, so a value of 0
            or less at a valid pixel is a miss for d1..d3 and makes the logarithmic metrics infinite or NaN.
        depth_BHW: metres, 0 where there is no annotation.
        crop, min_depth, max_depth: what counts, see `valid_pixels`.
    Returns:
        f32[B] for each name in `DEPTH_METRICS`; NaN for an image without a valid pixel.
    Raises:
        ValueError: the two shapes differ or are not [B, H, W].
    """
    _check_shapes(prediction=prediction_BHW, depth=depth_BHW)
    valid = valid_pixels(depth_BHW, crop=crop, min_depth=min_depth, max_depth=max_depth)
    p = jnp.where(valid, mend_prediction(prediction_BHW, min_depth=min_depth, max_depth=max_depth), 1.0)
    t = jnp.where(valid, jnp.asarray(depth_BHW, jnp.float32), 1.0)

    def mean(x_BHW):
        return _masked_mean(x_BHW, valid)

    ratio = jnp.where(p > 0, jnp.maximum(p / t, t / p), jnp.inf)
    e = jnp.log(p) - jnp.log(t)
    mean_square_e = mean(jnp.square(e))
    return {
        "d1": mean(ratio < 1.25),
        "d2": mean(ratio < 1.25**2),
        "d3": mean(ratio < 1.25**3),
        "abs_rel": mean(jnp.abs(p - t) / t),
        "sq_rel": mean(jnp.square(p - t) / t),
        "rmse": jnp.sqrt(mean(jnp.square(p - t))),
        "rmse_log": jnp.sqrt(mean_square_e),
        "log10": mean(jnp.abs(e)) / jnp.log(10.0),
        "silog": jnp.sqrt(mean_square_e - 0.5 * jnp.square(mean(e))),
    }


def confidence_spearman(
    confidence_BHW: jax.Array,
    prediction_BHW: jax.Array,
    depth_BHW: jax.Array,
    *,
    crop: tuple[int, int, int, int] | None = None,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
) -> jax.Array:
    """How well the confidence orders the pixels of each image by their error.

    Spearman's rank correlation, over the valid pixels, of the confidence with -|prediction - depth|; equal values share
    their mean rank. 1: the confidence orders the pixels perfectly; 0: it says nothing; -1: it is upside down.

    Args:
        confidence_BHW: any scale, larger = surer.
        prediction_BHW, depth_BHW, crop, min_depth, max_depth: as in `depth_metrics`.
    Returns:
        f32[B]; 0 where all confidences or all errors are equal, NaN for an image without a valid pixel.
    Raises:
        ValueError: the three shapes differ or are not [B, H, W].
    """
    _check_shapes(confidence=confidence_BHW, prediction=prediction_BHW, depth=depth_BHW)
    valid = valid_pixels(depth_BHW, crop=crop, min_depth=min_depth, max_depth=max_depth)
    prediction = mend_prediction(prediction_BHW, min_depth=min_depth, max_depth=max_depth)
    error = jnp.abs(prediction - jnp.asarray(depth_BHW, jnp.float32))
    a = _centred_ranks(jnp.asarray(confidence_BHW, jnp.float32), valid)
    b = _centred_ranks(-error, valid)
    variance = _masked_mean(jnp.square(a), valid) * _masked_mean(jnp.square(b), valid)
    scale = jnp.sqrt(jnp.where(variance == 0, 1.0, variance))  # NaN, of an image without a valid pixel, stays NaN
    return _masked_mean(a * b, valid) / scale


def valid_pixels(
    depth_BHW: jax.Array,
    *,
    crop: tuple[int, int, int, int] | None = None,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
) -> jax.Array:
    """bool[B,H,W]: the pixels that count: min_depth < depth < max_depth and, if given, inside the crop.

    `crop` is (first row, row end, first column, column end), ends exclusive and cut off at the border as in slicing;
    published NYUv2 numbers use `EIGEN_CROP`.
    """
    valid = (depth_BHW > min_depth) & (depth_BHW < max_depth)
    if crop is None:
        return valid
    top, bottom, left, right = crop
    return valid & jnp.zeros(valid.shape, bool).at[:, top:bottom, left:right].set(True)


def mend_prediction(prediction: jax.Array, *, min_depth: float = 1e-3, max_depth: float = 10.0) -> jax.Array:
    """Float32 predictions with infinities replaced by max_depth and NaN by min_depth; other values stay as they are."""
    prediction = jnp.asarray(prediction, jnp.float32)
    prediction = jnp.where(jnp.isinf(prediction), max_depth, prediction)
    return jnp.where(jnp.isnan(prediction), min_depth, prediction)


def _masked_mean(x_BHW: jax.Array, valid_BHW: jax.Array) -> jax.Array:
    """Mean over the valid pixels of each image, NaN where there are none."""
    total = jnp.sum(jnp.where(valid_BHW, x_BHW, 0.0), axis=(1, 2), dtype=jnp.float32)
    return total / jnp.sum(valid_BHW, axis=(1, 2), dtype=jnp.float32)  # 0 / 0 is NaN


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


def _check_shapes(**maps: jax.Array) -> None:
    shapes = {name: tuple(x.shape) for name, x in maps.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 3:
        raise ValueError(f"the maps must all have one shape [B, H, W], got {shapes}")
