"""Panels and PNG files."""

import numpy as np
import pytest
from PIL import Image

from aitok_jax.visualize import HOLE_COLOR, colorize, depth_panel, save_png

GREY = np.round(np.array(HOLE_COLOR) * 255).astype(np.uint8)


def scene(height=48, width=64):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    truth = np.linspace(1, 5, height * width, dtype=np.float32).reshape(height, width)
    return image, truth


def share(picture, color):
    return np.mean((picture == color).all(axis=-1))


def test_each_map_adds_a_tile():
    image, truth = scene()
    full = depth_panel(image, truth, truth=truth, confidence=truth / 5, title="room")
    assert full.dtype == np.uint8
    assert full.ndim == 3
    widths = [
        depth_panel(image, truth).shape[1],
        depth_panel(image, truth, confidence=truth / 5).shape[1],
        depth_panel(image, truth, truth=truth).shape[1],
        full.shape[1],
    ]
    assert [width / (widths[0] / 2) for width in widths] == [2, 3, 4, 5]


def test_float_and_uint8_images_look_alike():
    image, truth = scene()
    one, other = depth_panel(image, truth), depth_panel(image.astype(np.float32) / 255, truth)
    assert np.abs(one.astype(int) - other).max() <= 2


def test_holes_are_grey_in_truth_and_error():
    image, truth = scene()
    holes = truth.copy()
    holes[:, :32] = 0
    whole = share(depth_panel(image, truth, truth=truth), GREY)
    half = share(depth_panel(image, truth, truth=holes), GREY)
    none = share(depth_panel(image, truth, truth=truth * 0), GREY)
    assert whole < 0.01 < 0.15 < half < none
    assert none > 1.7 * half


def test_truth_and_prediction_share_one_range():
    image, truth = scene()

    def tiles(prediction):
        panel = depth_panel(image, prediction, truth=truth).astype(int)
        middle, width = slice(panel.shape[0] // 2 - 10, panel.shape[0] // 2 + 10), panel.shape[1] // 4
        return [panel[middle, k * width + 40 : k * width + 180] for k in (1, 2)]

    (truth_alone, same), (truth_beside, twice) = tiles(truth), tiles(2 * truth)
    assert np.abs(truth_alone - same).mean() < 20  # the tiles are not perfectly aligned
    assert np.abs(truth_beside - twice).mean() > 40
    assert np.abs(truth_alone - truth_beside).mean() > 40  # the prediction widens the range of the truth


def test_panels_survive_nan_constant_and_portrait_maps():
    image, truth = scene(64, 40)
    assert depth_panel(image, np.full_like(truth, 2.0), confidence=np.ones_like(truth)).size
    assert depth_panel(image, np.full_like(truth, np.nan), truth=truth).size


def test_panel_refuses_what_it_cannot_show():
    image, truth = scene()
    with pytest.raises(ValueError, match="confidence must have the size of the image"):
        depth_panel(image, truth, confidence=truth[:10])
    with pytest.raises(ValueError, match="RGB"):
        depth_panel(image[..., 0], truth)
    with pytest.raises(ValueError, match="int64"):
        depth_panel(image.astype(np.int64), truth)


def test_colorize_goes_from_blue_to_red_with_grey_holes():
    depth = np.array([[0.0, 1.0, 2.0, 3.0, np.nan]], np.float32)
    colors = colorize(depth, low=1.0, high=3.0).astype(int)
    np.testing.assert_array_equal(colors[0, [0, 4]], [GREY, GREY])
    assert colors[0, 3, 0] > colors[0, 3, 2]  # far: red over blue
    assert colors[0, 2, 1] > 200  # middle: green
    np.testing.assert_array_equal(colorize(depth * 2, low=2.0, high=6.0), colors)
    with pytest.raises(ValueError, match="below"):
        colorize(depth, low=3.0, high=3.0)
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        colorize(depth[0])


@pytest.mark.parametrize(("shape", "dtype"), [((4, 5, 3), np.uint8), ((4, 5), np.uint8), ((4, 5), np.uint16)])
def test_png_round_trip(tmp_path, shape, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    save_png(tmp_path / "deep" / "x.png", array)
    read = np.asarray(Image.open(tmp_path / "deep" / "x.png"))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


def test_png_refuses_other_arrays(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        save_png(tmp_path / "x.png", np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 5, 4\)"):
        save_png(tmp_path / "x.png", np.zeros((4, 5, 4), np.uint8))
