"""Test-time windows: coverage, order, mirroring, averaging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.tasks.windows import cut, merge, predict_windows, window_starts


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def first_channel(x):
    return {"depth": x[..., 0], "confidence": x[..., 1]}


def test_published_windows():
    assert window_starts(480, 640) == (0, 160)
    assert window_starts(48, 100) == (0, 26, 52)
    assert window_starts(96, 96) == (0,)
    assert window_starts(640, 480) == (0, 160)


@pytest.mark.parametrize(("height", "width"), [(10, 21), (10, 29), (37, 10), (10, 11), (7, 7), (10, 40)])
def test_every_pixel_is_covered_for_any_size(height, width):
    starts = window_starts(height, width)
    assert len(starts) == -(-max(height, width) // min(height, width))
    covered = np.zeros(max(height, width), int)
    for start in starts:
        covered[start : start + min(height, width)] += 1
    assert covered.all()
    assert starts[0] == 0
    assert starts[-1] == abs(height - width)


@pytest.mark.parametrize("shape", [(2, 12, 31, 3), (2, 31, 12, 3), (2, 12, 12, 3)])
@pytest.mark.parametrize("flip", [True, False])
def test_identity_predictor_gives_the_image_back(shape, flip):
    """Also maps with axes of their own."""
    x = images(shape)
    run = jax.jit(lambda x: predict_windows(lambda windows: {**first_channel(windows), "all": windows}, x, flip=flip))
    maps = run(x)
    np.testing.assert_allclose(maps["depth"], x[..., 0], rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"], x[..., 1], rtol=1e-6)
    np.testing.assert_allclose(maps["all"], x, rtol=1e-6)
    starts = window_starts(*shape[1:3])
    np.testing.assert_allclose(merge(cut(x, starts), *shape[1:3], starts), x, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 20, 3), (2, 20, 8, 3), (1, 8, 12, 3), (1, 8, 8, 3)])
def test_blended_windows_have_no_seam(shape):
    """Where window k says k everywhere, averages step by half where a window ends; blends rise evenly."""
    x = images(shape)
    batch, height, width, _ = shape
    starts, size = window_starts(height, width), min(height, width)
    same = predict_windows(lambda windows: {"all": windows}, x, flip=False, blend=True)["all"]
    np.testing.assert_allclose(same, x, rtol=1e-6)
    said = jnp.broadcast_to(jnp.arange(len(starts)).repeat(batch).reshape(-1, 1, 1), (len(starts) * batch, size, size))
    blended, averaged = (merge(said, height, width, starts, blend=blend)[0] for blend in (True, False))
    line, before = ((map_[:, 0] if height > width else map_[0]) for map_ in (blended, averaged))
    np.testing.assert_array_equal(blended, np.broadcast_to(line[:, None] if height > width else line, blended.shape))
    if len(starts) > 1:
        overlap = size - (starts[1] - starts[0])
        assert np.abs(np.diff(before)).max() >= 0.5
        assert np.abs(np.diff(line)).max() <= 1.2 / overlap
        assert (np.diff(line) >= -1e-6).all()
    assert (line[0], line[-1]) == (0, len(starts) - 1)


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


def test_mirror_comes_after_the_columns_were_reversed():
    """A map whose values change their sign in the mirror image; it gets all maps, and only those of mirrored images."""
    x = images((2, 4, 6, 1))
    seen = []

    def predict(windows):
        n = len(windows) // 2
        sign = jnp.concatenate([jnp.ones(n), -jnp.ones(n)])[:, None, None]
        return {"x": sign * windows[..., 0], "confidence": windows[..., 0]}

    def mirror(maps):
        seen.append(maps)
        return {**maps, "x": -maps["x"]}

    maps = predict_windows(predict, x, mirror=mirror)
    np.testing.assert_allclose(maps["x"], x[..., 0], rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"], x[..., 0], rtol=1e-6)
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0]["confidence"], np.concatenate([x[:, :, :4, 0], x[:, :, 2:, 0]]), rtol=1e-6)
    np.testing.assert_allclose(predict_windows(predict, x)["x"], 0, atol=1e-6)


def test_float32_maps_for_bfloat16_predictions():
    maps = predict_windows(lambda x: {"depth": x[..., 0].astype(jnp.bfloat16)}, images((1, 4, 6, 1)))
    assert maps["depth"].dtype == jnp.float32


def test_other_outputs_are_refused():
    with pytest.raises(ValueError, match=r"'tokens' has \(4, 9\)"):
        predict_windows(lambda x: {"tokens": jnp.zeros((4, 9))}, images((1, 4, 6, 1)))
