"""Losses as pure functions; all of them compute in float32 and return a float32 scalar.

`weight_B` f32[B], by default all 1, is 0 for the rows of [B, ...] that fill a batch up: they do not count.
"""

import jax
import jax.numpy as jnp
import optax

Weight = jax.Array | None


def mean(x: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean over all elements of [B, ...]."""
    if weight_B is None:
        return jnp.mean(x)
    return jnp.sum(real_rows(x, weight_B)) / (jnp.sum(weight_B) * (x.size // x.shape[0]))


def real_rows(x: jax.Array, weight_B: Weight, otherwise: float = 0) -> jax.Array:
    """[B, ...] with `otherwise`, or False, in the rows of weight 0."""
    if weight_B is None:
        return x
    return jnp.where(weight_B.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, jnp.full_like(x, otherwise))


def mse(prediction: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean squared error over all elements of two arrays of one shape."""
    return mean(jnp.square(_f32(prediction) - _f32(target)), weight_B)


def l1(prediction: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean absolute error over all elements of two arrays of one shape."""
    return mean(jnp.abs(_f32(prediction) - _f32(target)), weight_B)


def smooth_l1(prediction: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Huber loss with threshold 1, mean over all elements."""
    return mean(optax.huber_loss(_f32(prediction), _f32(target), delta=1.0), weight_B)


def mse_ignore_zero(prediction: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean squared error over the elements with target > 0; 0 where there are none."""
    valid = real_rows(target > 0, weight_B)
    return _masked_mean(jnp.square(_f32(prediction) - _f32(target)), valid)


def mse_annotated(prediction: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean squared error over the places of [..., C] where the target is not all zero; 0 where there are none."""
    valid = real_rows(jnp.any(target != 0, -1, keepdims=True), weight_B)
    return _masked_mean(jnp.square(_f32(prediction) - _f32(target)), jnp.broadcast_to(valid, target.shape))


def silog(
    prediction: jax.Array,
    target: jax.Array,
    weight_B: Weight = None,
    *,
    min_prediction: float | None = None,
    variance_focus: float = 0.5,
) -> jax.Array:
    """Scale-invariant log loss sqrt(mean d² − λ (mean d)²), d = log target − log prediction, over target > 0.

    Args:
        prediction: metres, any shape.
        target: metres, same shape; 0 where there is no annotation.
        min_prediction: predictions are clipped from below at this value; None leaves them.
        variance_focus: λ.
    Returns:
        the loss over all annotated elements together; 0 where there are none.
    """
    prediction, target = _f32(prediction), _f32(target)
    if min_prediction is not None:
        prediction = jnp.maximum(prediction, min_prediction)
    valid = real_rows(target > 0, weight_B)
    d = jnp.log(jnp.where(valid, target, 1.0)) - jnp.log(jnp.where(valid, prediction, 1.0))
    variance = _masked_mean(jnp.square(d), valid) - variance_focus * jnp.square(_masked_mean(d, valid))
    positive = variance > 0  # the square root has no finite gradient at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


def cross_entropy(logits: jax.Array, target: jax.Array, weight_B: Weight = None) -> jax.Array:
    """Mean cross-entropy of logits [..., K] against one-hot classes [..., K], over the places where these are not zero.

    0 where there are none.
    """
    valid = real_rows(jnp.any(target != 0, -1), weight_B)
    return _masked_mean(optax.softmax_cross_entropy(_f32(logits), _f32(target)), valid)


def dice(prediction_NHW: jax.Array, target_NHW: jax.Array, *, smooth: float = 1.0) -> jax.Array:
    """f32[N]: 1 − (2 Σ p t + smooth) / (Σ p + Σ t + smooth) of every mask, with p and t clipped to 0..1."""
    p, t = (jnp.clip(_f32(x), 0, 1).reshape(x.shape[0], -1) for x in (prediction_NHW, target_NHW))
    return 1 - (2 * jnp.sum(p * t, -1) + smooth) / (jnp.sum(p, -1) + jnp.sum(t, -1) + smooth)


RECONSTRUCTION = {
    "mse": mse,
    "l1": l1,
    "smooth_l1": smooth_l1,
    "mse_ignore_zero": mse_ignore_zero,
    "mse_annotated": mse_annotated,
    "silog": silog,
    "cross_entropy": cross_entropy,
}


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
