"""Panels and PNG files."""

import numpy as np
import pytest
from PIL import Image

from aitok_jax.image import save_png
from aitok_jax.tasks.modalities import Depth, Normals
from aitok_jax.visualize import HOLE_COLOR, MASK_OPACITY, map_panel, objects_panel, png_name

GREY = np.round(np.array(HOLE_COLOR) * 255).astype(np.uint8)


def depth_panel(*args, **options):
    return map_panel(Depth(), *args, **options)


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


NAMES = ["chair", "lamp"]


def two_objects(height=96, width=128):
    masks = np.zeros((2, height, width), np.uint8)
    masks[0, 20:60, 10:50], masks[1, 30:80, 70:120] = 1, 1
    return {
        "boxes": np.array([[10, 20, 50, 60], [70, 30, 120, 80]], np.float32),
        "classes": np.array([0, 1], np.int32),
        "scores": np.array([0.9, 0.5], np.float32),
        "masks": masks,
    }


def panel(image, objects, **options):
    arguments = (objects.get(name) for name in ("boxes", "classes", "scores", "masks"))
    return objects_panel(image, *arguments, NAMES, **options)


def test_truth_is_shown_beside_the_objects():
    image, objects = np.full((96, 128, 3), 100, np.uint8), two_objects()
    alone, both = panel(image, objects), panel(image, objects, truth=objects, title="room")
    assert alone.dtype == both.dtype == np.uint8
    assert both.shape[1] == 2 * alone.shape[1]
    moved = objects | {"boxes": objects["boxes"] + 9}
    differs = (both != panel(image, objects, truth=moved, title="room")).any(axis=(0, 2))
    assert differs[: len(differs) // 2].any()
    assert not differs[len(differs) // 2 :].any()


def changed(objects, **changes):
    """The share of the panel's pixels that differ when the objects change."""
    image = np.full((96, 128, 3), 100, np.uint8)
    return np.mean((panel(image, objects) != panel(image, objects | changes)).any(axis=2))


def test_each_part_of_an_object_is_drawn():
    objects = two_objects()
    area = objects["masks"].any(axis=0).mean()
    masks_only = changed(objects, masks=objects["masks"] * 0)
    assert 0.6 * area < masks_only < area  # the tile fills the better part of the panel; labels lie over the masks
    assert 0 < changed(objects, scores=np.array([0.8, 0.5])) < 0.01  # a digit
    assert changed(objects, boxes=objects["boxes"] + 3) > 0.005
    assert changed(objects, classes=np.array([1, 1])) > 0.2 * area  # a name and a colour
    assert changed(objects, scores=None) > 0
    assert changed(objects, masks=None) == masks_only


def test_masks_are_half_transparent_and_the_best_lies_on_top():
    objects = two_objects()
    objects["masks"][:] = 1

    def middle(grey, scores):
        image = np.full((96, 128, 3), grey, np.uint8)
        picture = panel(image, objects | {"boxes": objects["boxes"] * 0, "scores": np.array(scores)})
        return picture[picture.shape[0] // 2, picture.shape[1] // 2].astype(int)

    through = middle(200, [0.9, 0.5]) - middle(100, [0.9, 0.5])
    np.testing.assert_allclose(through, 100 * (1 - MASK_OPACITY) ** 2, atol=2)
    red, green = middle(0, [0.9, 0.5]), middle(0, [0.5, 0.9])
    assert np.abs(red - green).max() > 40
    assert red[0] > red[1:].max()  # class 0 is red


def test_boxes_meet_their_masks():
    """Right and bottom edge of a box that holds a mask tightly run along the edge of the mask."""
    image, objects = np.zeros((96, 128, 3), np.uint8), two_objects()
    objects = {name: values[1:] for name, values in objects.items()}
    no_box = objects | {"boxes": objects["boxes"] * 0}
    empty = panel(image, no_box | {"masks": None})
    shown = panel(image, no_box), panel(image, objects | {"masks": None})
    ends = [np.argwhere((picture != empty).any(axis=2)).max(axis=0) for picture in shown]
    np.testing.assert_allclose(*ends, atol=3)  # 4 pixels of the panel show one of the image


def test_objects_panel_takes_no_objects_and_unknown_classes():
    image = np.zeros((40, 60, 3), np.float32)
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros((0, 40, 60))
    assert objects_panel(image, *none, NAMES, truth={"boxes": none[0], "classes": none[1]}).size
    assert objects_panel(image, np.array([[3, 3, 9, 9]]), np.array([7]), None, None, NAMES).size


def test_objects_panel_refuses_what_does_not_fit():
    image, objects = np.zeros((96, 128, 3), np.uint8), two_objects()
    with pytest.raises(ValueError, match="prediction: 2 boxes but 3 classes"):
        panel(image, objects | {"classes": np.zeros(3, int)})
    with pytest.raises(ValueError, match="ground truth: 2 boxes but 1 masks"):
        panel(image, objects, truth=objects | {"masks": objects["masks"][:1]})
    with pytest.raises(ValueError, match=r"masks must have the size of the image, \(96, 128\)"):
        panel(image, objects | {"masks": objects["masks"][:, :90]})
    with pytest.raises(ValueError, match="RGB"):
        panel(image[..., 0], objects)


def test_file_names_of_pictures():
    assert png_name("/room/rgb_1.jpg") == "room_rgb_1.png"
    assert png_name("000000000139.jpg") == "000000000139.png"


def test_depth_goes_from_blue_to_red():
    image, _ = scene()
    far = np.linspace(1, 3, 64, dtype=np.float32) * np.ones((48, 1), np.float32)
    panel = depth_panel(image, far).astype(int)
    row = panel[panel.shape[0] // 2, panel.shape[1] // 2 :]
    near, end = row[30:60].mean(0), row[180:200].mean(0)
    assert near[2] > near[0]
    assert end[0] > end[2]


def test_normals_have_their_usual_colours_and_errors_in_degrees():
    image, _ = scene()
    towards = np.broadcast_to(np.float32([0, 0, -1]), (48, 64, 3))
    half = towards.copy()
    half[:, :32] = [1, 0, 0]
    panel = map_panel(Normals(), image, half, truth=towards)
    assert share(panel, [128, 128, 255]) > 0.2  # the truth and half of the prediction
    assert share(panel, [255, 128, 128]) > 0.08
    assert panel.shape[1] == 2 * map_panel(Normals(), image, half).shape[1]
    with pytest.raises(ValueError, match="prediction must have the size of the image"):
        map_panel(Normals(), image, half[:40])


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
