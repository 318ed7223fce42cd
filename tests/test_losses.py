"""Losses against NumPy, and gradients that stay finite where a formula has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import losses


@pytest.fixture(scope="module")
def maps():
    """Predictions and targets in metres; a third of the targets is not annotated (0)."""
    rng = np.random.default_rng(0)
    prediction, target = rng.uniform(0.1, 9, (2, 2, 6, 7)).astype(np.float32)
    target[rng.random(target.shape) < 1 / 3] = 0
    return prediction, target


def silog(prediction, target, minimum=0.0):
    valid = target > 0
    d = np.log(target[valid]) - np.log(np.maximum(prediction[valid], minimum))
    return np.sqrt(np.mean(d**2) - 0.5 * np.mean(d) ** 2)


def test_every_loss_against_numpy(maps):
    p, t = maps
    error = np.abs(p - t)
    huber = np.where(error < 1, error**2 / 2, error - 0.5)
    expected = {
        "mse": (error**2).mean(),
        "l1": error.mean(),
        "smooth_l1": huber.mean(),
        "mse_ignore_zero": (error[t > 0] ** 2).mean(),
        "silog": silog(p, t),
        "mse_annotated": (error[(t != 0).any(-1)] ** 2).mean(),
        "cross_entropy": -(t * (p - np.log(np.exp(p).sum(-1, keepdims=True)))).sum(-1)[(t != 0).any(-1)].mean(),
    }
    assert expected.keys() == losses.RECONSTRUCTION.keys()
    for name, value in expected.items():
        ours = losses.RECONSTRUCTION[name](p, t)
        assert (ours.shape, ours.dtype) == ((), jnp.float32)
        np.testing.assert_allclose(ours, value, rtol=1e-5, err_msg=name)


def test_losses_compute_in_float32(maps):
    p, t = (jnp.asarray(x, jnp.bfloat16) for x in maps)
    for name, loss in losses.RECONSTRUCTION.items():
        ours = loss(p, t)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, loss(p.astype(jnp.float32), t.astype(jnp.float32)), rtol=1e-6, err_msg=name)


def test_what_is_not_annotated_does_not_count(maps):
    p, t = maps
    other = np.where(t > 0, p, -100)
    for name in ("mse_ignore_zero", "silog"):
        loss = losses.RECONSTRUCTION[name]
        np.testing.assert_array_equal(loss(p, t), loss(other, t))
        np.testing.assert_array_equal(np.asarray(jax.grad(loss)(other, t))[t == 0], 0)
        value, gradient = jax.value_and_grad(loss)(p, np.zeros_like(t))
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_rows_of_weight_0_do_not_count():
    """They have no gradient either; the others' is that of the rows alone."""
    rng = np.random.default_rng(3)
    p, t = (rng.uniform(1, 9, (4, 3, 2, 3)).astype(np.float32) for _ in range(2))
    t[:, 0, 0] = 0
    weight = np.array([1, 0, 1, 0], np.float32)
    for name, loss in losses.RECONSTRUCTION.items():
        value, gradient = jax.value_and_grad(loss)(p, t, weight)
        alone, expected = jax.value_and_grad(loss)(p[::2], t[::2])
        np.testing.assert_allclose(value, alone, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient[::2], expected, rtol=1e-5, atol=1e-8, err_msg=name)
        np.testing.assert_array_equal(gradient[1::2], 0, err_msg=name)


def test_vectors_count_where_they_are_not_all_zero():
    """Zero and negative components of others count."""
    target = np.array([[[0, 0, 0], [0, -1, 0], [1, 0, 0]]], np.float32)
    prediction = np.array([[[9, 9, 9], [0, 0, 3], [1, 0, 0]]], np.float32)
    value, gradient = jax.value_and_grad(losses.mse_annotated)(prediction, target)
    np.testing.assert_allclose(value, (1 + 9) / 6)
    np.testing.assert_allclose(gradient[0], np.array([[0, 0, 0], [0, 2, 6], [0, 0, 0]]) / 6, rtol=1e-6)
    value, gradient = jax.value_and_grad(losses.mse_annotated)(prediction, 0 * target)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_silog_clips_and_is_free_of_scale_at_full_focus(maps):
    p, t = maps
    low = p.copy()
    low[0, :2] = -1
    np.testing.assert_allclose(losses.silog(low, t, min_prediction=1e-3), silog(low, t, 1e-3), rtol=1e-5)
    scaled, plain = (losses.silog(x, t, variance_focus=1.0) for x in (3 * p, p))
    np.testing.assert_allclose(scaled, plain, rtol=1e-4)


def test_silog_gradient_is_finite_where_the_root_has_none(maps):
    p, t = maps
    for prediction, minimum in ((t, None), (2 * t + (t == 0), None), (np.zeros_like(p), 1e-3), (t, 1e-3)):
        value, gradient = jax.value_and_grad(losses.silog)(prediction, t, min_prediction=minimum)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    assert losses.silog(t, t) == 0


def test_silog_gradient_against_differences(maps):
    p, t = (x.astype(np.float64) for x in maps)
    gradient = np.asarray(jax.grad(losses.silog)(p, t))
    for index in np.argwhere(t > 0)[:5]:
        step = np.zeros_like(p)
        step[tuple(index)] = 1e-5
        np.testing.assert_allclose(gradient[tuple(index)], (silog(p + step, t) - silog(p - step, t)) / 2e-5, rtol=1e-3)


def test_cross_entropy_ignores_places_without_a_class():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (4, 5))
    labels[1] = -1
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    valid = labels >= 0
    expected = -np.log(np.take_along_axis(probabilities, np.maximum(labels, 0)[..., None], -1)[..., 0][valid]).mean()
    classes = np.eye(3, dtype=np.float32)[labels] * valid[..., None]
    value, gradient = jax.value_and_grad(losses.cross_entropy)(logits, classes)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(losses.cross_entropy(logits, 0 * classes), 0)


@pytest.fixture(scope="module")
def masks():
    """Soft predictions that leave 0..1, and binary targets, of five masks; the last two targets are empty and full."""
    rng = np.random.default_rng(4)
    prediction, target = rng.normal(0.5, 0.6, (5, 6, 7)).astype(np.float32), rng.random((5, 6, 7)) < 0.4
    target[3:] = np.array([False, True]).reshape(2, 1, 1)
    return prediction, target.astype(np.uint8)


def test_dice_against_numpy(masks):
    p, t = masks
    assert p.min() < 0 < 1 < p.max()
    ours = losses.dice(p, t)
    assert (ours.shape, ours.dtype) == ((5,), jnp.float32)
    for one, prediction, target in zip(ours, np.clip(p, 0, 1), t, strict=True):
        both, sizes = (prediction * target).sum(), prediction.sum() + target.sum()
        np.testing.assert_allclose(one, 1 - (2 * both + 1) / (sizes + 1), rtol=1e-5)
    half = losses.dice(jnp.asarray(p, jnp.bfloat16), t)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, ours, atol=0.02)


def test_dice_of_the_best_and_the_worst_mask(masks):
    """0 for the target itself, also an empty one; nearly 1 for its complement."""
    _, t = masks
    np.testing.assert_allclose(losses.dice(t, t), 0, atol=1e-6)
    np.testing.assert_allclose(losses.dice(1 - t, t), 1 - 1 / (6 * 7 + 1), rtol=1e-6)
    assert (losses.dice(t, t, smooth=10.0) == 0).all()


def test_dice_gradient(masks):
    """Finite, towards the target inside 0..1, nothing beyond; each mask has its own."""
    p, t = masks
    gradient = np.asarray(jax.grad(lambda x: losses.dice(x, t).sum())(p))
    assert np.isfinite(gradient).all()
    inside = (p > 0) & (p < 1)
    np.testing.assert_array_equal(gradient[~inside], 0)
    assert (gradient[inside & (t == 1)] < 0).all()
    assert (gradient[inside & (t == 0)] > 0).all()
    alone = np.asarray(jax.grad(lambda x: losses.dice(x, t)[1])(p))
    np.testing.assert_array_equal(alone[[0, 2, 3, 4]], 0)
    np.testing.assert_allclose(alone[1], gradient[1], rtol=1e-6)
