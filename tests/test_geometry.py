"""Test-time windows: coverage, order, mirroring, averaging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.tasks.windows import merge_windows, predict_windows, shifted_windows, window_starts


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def first_channel(x):
    return {"depth": x[..., 0], "confidence": x[..., 1]}


def test_published_windows():
    assert window_starts(480, 640) == (0, 160)
    assert window_starts(48, 84, 3) == (0, 18, 36)
    assert window_starts(96, 96) == window_starts(96, 96, 2) == (0,)
    assert window_starts(640, 480) == (0, 160)


@pytest.mark.parametrize("count", [None, 4, 7])
@pytest.mark.parametrize(("height", "width"), [(10, 21), (10, 29), (37, 10), (10, 11), (7, 7), (10, 40)])
def test_every_pixel_is_covered_for_any_size(height, width, count):
    starts = window_starts(height, width, count)
    covered = np.zeros(max(height, width), int)
    for start in starts:
        covered[start : start + min(height, width)] += 1
    assert covered.all()
    assert starts[0] == 0
    assert starts[-1] == abs(height - width)


def test_too_few_windows_are_refused():
    with pytest.raises(ValueError, match="at least 3"):
        window_starts(10, 21, 2)
    with pytest.raises(ValueError, match="at least 1"):
        window_starts(10, 10, 0)


@pytest.mark.parametrize("shape", [(2, 12, 31, 3), (2, 31, 12, 3), (2, 12, 12, 3)])
@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("flip", [True, False])
def test_identity_predictor_gives_the_image_back(shape, count, flip):
    x = images(shape)
    run = jax.jit(lambda x: predict_windows(first_channel, x, flip=flip, count=count))
    maps = run(x)
    np.testing.assert_allclose(maps["depth"], x[..., 0], rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"], x[..., 1], rtol=1e-6)
    np.testing.assert_allclose(
        merge_windows(shifted_windows(x, count)[..., 2], *shape[1:3], count), x[..., 2], rtol=1e-6
    )


def test_one_call_in_window_major_order_mirrors_last():
    x = images((2, 4, 6, 1))
    calls = []

    def predict(windows):
        calls.append(windows)
        return {"depth": windows[..., 0]}

    predict_windows(predict, x)
    straight = np.concatenate([x[:, :, :4], x[:, :, 2:]])
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], np.concatenate([straight, straight[:, :, ::-1]]))


def test_averages_mirrors_and_overlaps():
    def column_index(windows):
        return {"depth": jnp.broadcast_to(jnp.arange(4.0)[None, None], windows.shape[:3])}

    x = images((1, 4, 6, 1))
    straight = predict_windows(column_index, x, flip=False)["depth"]
    np.testing.assert_allclose(straight[0, 0], [0, 1, 1, 2, 2, 3])
    np.testing.assert_allclose(predict_windows(column_index, x)["depth"], 1.5)
    rows = predict_windows(column_index, np.swapaxes(x, 1, 2), flip=False)["depth"]
    np.testing.assert_allclose(rows[0], np.tile(np.arange(4.0), (6, 1)))


def test_clip_comes_after_averaging_and_spares_other_maps():
    def predict(windows):
        n = len(windows) // 2
        sign = jnp.concatenate([jnp.full(n, -1.0), jnp.full(n, 3.0)])[:, None, None]
        return {"depth": sign * jnp.ones(windows.shape[:3]), "confidence": jnp.zeros(windows.shape[:3])}

    maps = predict_windows(predict, images((1, 4, 4, 1)), min_value=0.5)
    np.testing.assert_allclose(maps["depth"], 1.0)
    np.testing.assert_allclose(maps["confidence"], 0.0)
    low = predict_windows(lambda x: {"depth": -x[..., 0]}, images((1, 4, 6, 1)), min_value=1e-3)
    np.testing.assert_allclose(low["depth"], 1e-3)


def test_float32_maps_for_bfloat16_predictions():
    maps = predict_windows(lambda x: {"depth": x[..., 0].astype(jnp.bfloat16)}, images((1, 4, 6, 1)))
    assert maps["depth"].dtype == jnp.float32


def test_other_outputs_are_refused():
    with pytest.raises(ValueError, match=r"'tokens' has \(4, 9\)"):
        predict_windows(lambda x: {"tokens": jnp.zeros((4, 9))}, images((1, 4, 6, 1)))
