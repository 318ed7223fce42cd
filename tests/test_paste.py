"""Pasting masks into boxes, and COCO results."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from aitok_jax.tasks.paste import from_results, paste_masks, paste_rle, to_results

HEIGHT, WIDTH = 20, 30
BOXES = {
    "inside": (3.2, 4.9, 17.6, 15.3),
    "partly outside": (-5.0, -3.5, 12.0, 9.3),
    "around the image": (-10.0, -7.0, 45.0, 33.0),
    "outside": (40.0, 2.0, 50.0, 9.0),
    "smaller than a pixel": (7.3, 6.2, 7.9, 6.6),
    "thin": (9.1, 2.0, 9.9, 18.0),
    "reversed": (17.6, 15.3, 3.2, 4.9),
}


def random_mask(seed=0, size=8):
    return np.random.default_rng(seed).random((size, size)).astype(np.float32)


def sample(mask, box, height, width):
    """Pixel by pixel: bilinear between the centres of the cells, which tile the box; zero outside of them."""
    size = len(mask)
    x1, y1, x2, y2 = box
    values = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            u, v = (x + 0.5 - x1) / (x2 - x1) * size - 0.5, (y + 0.5 - y1) / (y2 - y1) * size - 0.5
            for row in range(size):
                for column in range(size):
                    values[y, x] += max(0, 1 - abs(u - column)) * max(0, 1 - abs(v - row)) * mask[row, column]
    return values


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_values_are_bilinear_samples_at_pixel_centres(box):
    mask = random_mask()
    values = paste_masks(mask[None], np.array([box]), HEIGHT, WIDTH)[0]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, sample(mask, box, HEIGHT, WIDTH), atol=1e-5)


def test_a_box_of_the_masks_own_size_copies_it():
    mask = random_mask()
    values = paste_masks(mask[None], np.array([[4, 7, 12, 15]]), HEIGHT, WIDTH)[0]
    np.testing.assert_allclose(values[7:15, 4:12], mask, atol=1e-6)
    assert np.count_nonzero(values) == mask.size


def test_a_box_without_width_shows_the_middle_everywhere():
    mask = random_mask()
    values = paste_masks(mask[None], np.array([[6, 2, 6, 18]]), HEIGHT, WIDTH)[0]
    assert np.ptp(values, axis=1).max() == 0
    np.testing.assert_allclose(values[:, 0], sample(mask, (-WIDTH, 2, WIDTH + 1, 18), HEIGHT, 1)[:, 0], atol=1e-5)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_encoded_mask_is_the_threshold_of_the_values(box):
    mask = np.round(random_mask(1) * 4) / 4  # values of exactly 1/2 occur
    code = paste_rle(mask, np.array(box), HEIGHT, WIDTH)
    assert code["size"] == [HEIGHT, WIDTH]
    expected = paste_masks(mask[None], np.array([box]), HEIGHT, WIDTH)[0] >= 0.5
    np.testing.assert_array_equal(coco_mask.decode(code), expected)


def test_a_half_counts_as_inside():
    code = paste_rle(np.full((4, 4), 0.5), np.array([5, 5, 9, 9]), HEIGHT, WIDTH)
    assert coco_mask.area(code) == 16


def predicted(boxes, masks=None, **changes):
    count = len(boxes)
    outputs = {
        "boxes": np.array(boxes, np.float32),
        "classes": np.arange(count, dtype=np.int32) % 3,
        "scores": np.linspace(0.9, 0.5, count, dtype=np.float32),
        "valid": np.ones(count, bool),
    }
    if masks is not None:
        outputs["masks"] = np.asarray(masks, np.float32)
    return outputs | changes


IDS = [18, 44, 90]


def test_results_are_in_pixels_of_the_original_image():
    outputs = predicted([[8, 6, 16, 12], [0, 0, 4, 9]], masks=np.full((2, 8, 8), 0.9))
    results = to_results(outputs, 139, IDS, scale=np.array([0.5, 0.25]), original_size=(80, 60))
    assert [r["bbox"] for r in results] == [[16, 24, 16, 24], [0, 0, 8, 36]]
    assert [r["category_id"] for r in results] == [18, 44]
    assert [r["image_id"] for r in results] == [139, 139]
    np.testing.assert_allclose([r["score"] for r in results], [0.9, 0.5])
    assert results[0]["segmentation"]["size"] == [80, 60]
    filled = coco_mask.decode(results[0]["segmentation"])
    rows, columns = np.nonzero(filled)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 47, 16, 31)
    assert filled.sum() == 24 * 16 - 4  # the zeros outside of the mask round its corners
    assert json.loads(json.dumps(results)) == results


def test_boxes_are_cut_at_the_image_and_masks_keep_their_place():
    mask = np.zeros((8, 8))
    mask[:, 4:] = 1  # the right half of the object
    outputs = predicted([[-8, 2, 8, 12], [20, 10, 40, 25]], masks=[mask, mask])
    left, corner = to_results(outputs, 1, IDS, np.ones(2), (HEIGHT, WIDTH))
    assert left["bbox"] == [0, 2, 8, 10]
    assert corner["bbox"] == [20, 10, 10, 10]
    np.testing.assert_array_equal(np.unique(np.nonzero(coco_mask.decode(left["segmentation"]))[1]), range(8))
    assert coco_mask.area(corner["segmentation"]) == 0  # its right half starts at x = 30, the border


def test_objects_that_are_none_are_left_out():
    good, infinite = [2, 3, 12, 13], [2, 3, np.inf, 13]
    empty, outside = [[5, 3, 5, 13], [5, 3, 9, 3]], [31, 3, 40, 13]
    boxes = [good, [12, 3, 2, 13], [2, 13, 12, 3], *empty, outside, [0, 0, np.nan, 9], infinite, good]
    outputs = predicted(boxes, masks=np.ones((9, 4, 4)))
    outputs["valid"][0] = False
    results = to_results(outputs, 1, IDS, np.ones(2), (HEIGHT, WIDTH))
    np.testing.assert_allclose([r["score"] for r in results], outputs["scores"][-1:])
    assert to_results(predicted(boxes, valid=np.zeros(9, bool)), 1, IDS, np.ones(2), (HEIGHT, WIDTH)) == []


def test_detections_have_no_masks():
    (result,) = to_results(predicted([[2, 3, 12, 13]]), 1, IDS, np.ones(2), (HEIGHT, WIDTH))
    assert set(result) == {"image_id", "category_id", "bbox", "score"}
    assert set(from_results([result], IDS)) == {"boxes", "classes", "scores"}


def test_results_become_arrays_again():
    outputs = predicted([[2, 3, 12, 13], [5.5, 1.25, 20, 18]], masks=np.ones((2, 8, 8)))
    results = to_results(outputs, 1, IDS, np.ones(2), (HEIGHT, WIDTH))
    arrays = from_results(results, IDS)
    for name in ("boxes", "classes", "scores"):
        np.testing.assert_allclose(arrays[name], outputs[name], err_msg=name)
    np.testing.assert_array_equal(
        arrays["masks"], paste_masks(outputs["masks"], outputs["boxes"], HEIGHT, WIDTH) >= 0.5
    )
    small = from_results(results, IDS, step=3)
    np.testing.assert_allclose(small["boxes"], arrays["boxes"] / 3, rtol=1e-6)
    np.testing.assert_array_equal(small["masks"], arrays["masks"][:, ::3, ::3])
    empty = from_results([], IDS)
    assert empty["boxes"].shape == (0, 4)
    assert len(empty["classes"]) == len(empty["scores"]) == 0


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="class 3, but the data has 3 categories"):
        to_results(predicted([[2, 3, 12, 13]], classes=np.array([3])), 1, IDS, np.ones(2), (HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"\(2, 8, 8\) and \(3, 4\)"):
        paste_masks(np.ones((2, 8, 8)), np.ones((3, 4)), HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="0x5"):
        paste_masks(np.ones((1, 8, 8)), np.ones((1, 4)), 0, 5)
    with pytest.raises(ValueError, match="masks must be"):
        to_results(predicted([[2, 3, 12, 13]], masks=np.ones((2, 8, 8))), 1, IDS, np.ones(2), (HEIGHT, WIDTH))
