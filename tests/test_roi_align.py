"""Crops of masks by RoI-align: its definition, sample by sample."""

import numpy as np
import pytest

from aitok_jax.data import object_transforms


def ellipse(height, width, cx, cy, rx, ry):
    y, x = np.mgrid[:height, :width] + 0.5
    return (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1).astype(np.uint8)


def direct_roi_align(mask, box, size):
    """RoI-align sample by sample, as its definition says."""
    x1, y1, x2, y2 = (v - 0.5 for v in box)
    height, width = mask.shape
    grid_y, grid_x = int(np.ceil((y2 - y1) / size)), int(np.ceil((x2 - x1) / size))

    def at(y, x):
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0.0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        t, l = int(y), int(x)
        b, r = min(t + 1, height - 1), min(l + 1, width - 1)
        dy, dx = y - t, x - l
        top = mask[t, l] * (1 - dx) + mask[t, r] * dx
        bottom = mask[b, l] * (1 - dx) + mask[b, r] * dx
        return top * (1 - dy) + bottom * dy

    result = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            ys = [y1 + (y2 - y1) / size * (i + (k + 0.5) / grid_y) for k in range(grid_y)]
            xs = [x1 + (x2 - x1) / size * (j + (k + 0.5) / grid_x) for k in range(grid_x)]
            result[i, j] = np.mean([at(y, x) for y in ys for x in xs])
    return result


@pytest.mark.parametrize(
    "box", [(3.2, 4.1, 20.7, 15.5), (-3, -4, 9, 30), (0, 0, 24, 18), (5, 5, 5.3, 6), (2, 3, 21, 4)]
)
@pytest.mark.parametrize("size", [4, 7])
def test_roi_align_is_its_definition(box, size):
    masks = (np.random.default_rng(1).random((3, 18, 24)) < 0.5).astype(np.uint8)
    crops = object_transforms.roi_align(masks, np.array([box, box], np.float32), np.array([2, 0]), size)
    for crop, index in zip(crops, (2, 0), strict=True):
        np.testing.assert_allclose(crop, direct_roi_align(masks[index], box, size), atol=1e-5)


def test_roi_align_in_a_resampled_picture_is_that_of_the_picture():
    masks = (np.random.default_rng(1).random((2, 18, 24)) < 0.5).astype(np.uint8)
    boxes = np.array([(3.2, 4.1, 20.7, 15.5), (0, 0, 30, 30), (2, 1, 4, 3)], np.float32)
    for factor in (0.4, 1, 2.7):
        rows = (np.arange(int(18 * factor)) / factor).astype(int)[2:]
        columns = (np.arange(int(24 * factor)) / factor).astype(int)[1:]
        picture = np.ascontiguousarray(masks[:, rows][:, :, columns])
        wanted = object_transforms.roi_align(picture, boxes, np.array([0, 1, 1]), 8)
        crops = object_transforms.roi_align(masks, boxes, np.array([0, 1, 1]), 8, rows, columns)
        np.testing.assert_allclose(crops, wanted, atol=1e-6)


def test_roi_align_does_not_care_for_the_memory_order():
    masks = (np.random.default_rng(1).random((2, 18, 24)) < 0.5).astype(np.uint8)
    other = np.ascontiguousarray(masks.swapaxes(1, 2)).swapaxes(1, 2)
    boxes = np.array([(3.2, 4.1, 20.7, 15.5)], np.float32)
    results = [object_transforms.roi_align(m, boxes, np.array([1]), 8) for m in (masks, other)]
    np.testing.assert_array_equal(*results)


def test_empty_and_reversed_boxes_give_zeros():
    boxes = np.array([(5, 5, 5, 9), (8, 2, 3, 9), (np.nan, 0, 5, 5)], np.float32)
    assert not object_transforms.roi_align(np.ones((1, 10, 10), np.uint8), boxes, np.zeros(3, int), 4).any()
    assert object_transforms.crop_masks(
        np.ones((0, 10, 10), np.uint8), np.zeros((0, 4)), np.zeros(0, int), 4
    ).shape == (0, 4, 4)
