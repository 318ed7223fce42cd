"""Depth metrics against an independent float64 computation, and what counts as a pixel."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from aitok_jax.evaluators.metrics import confidence_spearman, inside
from aitok_jax.tasks.modalities.depth import EIGEN_CROP, METRICS, Depth, mend

FIXTURE = Path(__file__).parents[2] / "shared" / "data" / "eval_fixtures" / "depth_metrics" / "super_gradients.json"


def maps(seed=0, shape=(3, 24, 32)):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 9.5, shape).astype(np.float32)
    depth[rng.random(shape) < 0.2] = 0
    prediction = (np.maximum(depth, 0.3) * np.exp(rng.normal(0, 0.3, shape))).astype(np.float32)
    return prediction, depth


def depth_metrics(prediction, depth, crop=None):
    """As the evaluator calls them."""
    valid = Depth().measured(depth) & inside(crop, *depth.shape[1:])[None]
    return Depth().metrics(prediction, depth, valid)


def reference(p, t):
    p, t = p.astype(np.float64), t.astype(np.float64)
    e = np.log(p) - np.log(t)
    ratio = np.maximum(p / t, t / p)
    return {
        **{f"d{k}": np.mean(ratio < 1.25**k) for k in (1, 2, 3)},
        "abs_rel": np.mean(abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "rmse_log": np.sqrt(np.mean(e**2)),
        "log10": np.mean(abs(np.log10(p) - np.log10(t))),
        "silog": np.sqrt(np.mean(e**2) - 0.5 * np.mean(e) ** 2),
    }


@pytest.mark.parametrize("jit", [False, True])
def test_each_image_matches_float64(jit):
    prediction, depth = maps()
    metrics = (jax.jit(depth_metrics) if jit else depth_metrics)(prediction, depth)
    assert tuple(metrics) == METRICS or jit  # jit sorts the names
    for i in range(3):
        valid = depth[i] > 0
        expected = reference(prediction[i][valid], depth[i][valid])
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-5, err_msg=name)


def test_published_two_by_two_example():
    if not FIXTURE.is_file():
        pytest.skip(f"no {FIXTURE}")
    case = json.loads(FIXTURE.read_text())
    metrics = depth_metrics(np.array([case["pred"]], np.float32), np.array([case["gt"]], np.float32))
    pairs = {"d1": "delta1", "d2": "delta2", "d3": "delta3", "abs_rel": "mape_absrel", "rmse": "rmse"}
    for ours, theirs in pairs.items():
        np.testing.assert_allclose(metrics[ours][0], case["expected"][theirs], rtol=1e-6)


def test_pixels_outside_crop_and_range_never_count():
    prediction, depth = maps(shape=(2, 480, 640))
    metrics = depth_metrics(prediction, depth, crop=EIGEN_CROP)
    cropped = np.zeros(depth.shape, bool)
    cropped[:, 45:471, 41:601] = True
    counts = cropped & (depth > 0)
    np.testing.assert_array_equal(inside(EIGEN_CROP, 480, 640), cropped[0])
    other_depth = np.where(depth == 0, np.float32(20), depth)
    other = depth_metrics(np.where(counts, prediction, np.nan), other_depth, crop=EIGEN_CROP)
    for name in METRICS:
        np.testing.assert_array_equal(metrics[name], other[name])


def test_range_is_open_and_follows_the_modality():
    depth = np.array([[[0, 1e-3, 2e-3, 1.0, 2.0, 3.0]]], np.float32)
    np.testing.assert_array_equal(Depth(max_depth=2.0).measured(depth)[0, 0], [0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(Depth().measured(depth)[0, 0], [0, 0, 1, 1, 1, 1])


def test_broken_predictions_are_mended_but_not_clamped():
    depth = np.full((1, 1, 4), 2.0, np.float32)
    prediction = np.array([[[np.inf, np.nan, 2.0, 30.0]]], np.float32)
    expected = np.sqrt(np.mean(np.square(np.array([8.0, 2 - 1e-3, 0.0, 28.0]))))
    np.testing.assert_allclose(depth_metrics(prediction, depth)["rmse"], [expected], rtol=1e-6)
    np.testing.assert_allclose(mend(prediction, 7.0)[0, 0], [7, 1e-3, 2, 30])
    np.testing.assert_allclose(Depth().error(prediction, depth)[0, 0], [8, 2 - 1e-3, 0, 28])


def test_negative_predictions_are_misses():
    depth = np.full((1, 1, 2), 2.0, np.float32)
    metrics = depth_metrics(np.array([[[-2.0, 2.0]]], np.float32), depth)
    np.testing.assert_allclose([metrics["d1"][0], metrics["d3"][0]], 0.5)


def test_image_without_depth_is_nan_and_leaves_the_others_alone():
    prediction, depth = maps()
    depth[1] = 0
    metrics = depth_metrics(prediction, depth)
    alone = depth_metrics(prediction[[0, 2]], depth[[0, 2]])
    for name in METRICS:
        assert np.isnan(metrics[name][1])
        np.testing.assert_allclose(metrics[name][np.array([0, 2])], alone[name], rtol=1e-6)


def test_confidence_correlation_matches_scipy():
    prediction, depth = maps()
    rng = np.random.default_rng(1)
    error = np.abs(prediction - depth)
    confidence = np.round(1 / (1 + error + rng.uniform(0, 1, error.shape)), 1).astype(np.float32)  # many ties
    ours = confidence_spearman(confidence, error, depth > 0)
    for i in range(3):
        valid = depth[i] > 0
        np.testing.assert_allclose(ours[i], stats.spearmanr(confidence[i][valid], -error[i][valid])[0], rtol=1e-4)
    np.testing.assert_allclose(confidence_spearman(-error, error, depth > 0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(confidence_spearman(error, error, depth > 0), -1.0, rtol=1e-5)


def test_confidence_correlation_without_information():
    prediction, depth = maps()
    depth[1] = 0
    error = np.abs(prediction - depth)
    ours = np.asarray(confidence_spearman(np.ones_like(depth), error, depth > 0))
    np.testing.assert_array_equal(ours, [0, np.nan, 0])


@pytest.mark.parametrize("crop", [(0, 5, 0, 6), (2, 2, 0, 5), (-1, 3, 0, 5), (0, 4, 3, 2)])
def test_a_crop_must_lie_inside(crop):
    with pytest.raises(ValueError, match=r"eval_crop=.* does not fit evaluation images of 4x5"):
        inside(crop, 4, 5)
