"""Predicted objects back on the image: masks pasted into their boxes, and COCO results. NumPy."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def paste_masks(masks_NSS: np.ndarray, boxes_N4: np.ndarray, height: int, width: int) -> np.ndarray:
    """Spreads each mask over its box, sampling it bilinearly at the pixel centres of the whole image.

    A box of x1..x2 holds the S cells of its mask side by side; outside the mask lie zeros, so the values fade out over
    half a cell beyond the box. A box with x2 < x1 gets the mirrored mask. Where x1 = x2, every pixel shows the middle
    of the mask (and likewise for y): the published system does so, and such objects should be dropped.

    Args:
        masks_NSS: any real dtype, e.g. soft values in 0..1.
        boxes_N4: x1 y1 x2 y2 in pixels of the image; may reach beyond it.
        height, width: size of the image in pixels.
    Returns:
        f32[N, height, width]; the mask proper is where it is >= 0.5.
    Raises:
        ValueError: shapes that do not fit each other, or an image without pixels.
    """
    masks_NSS, boxes_N4 = np.asarray(masks_NSS), np.asarray(boxes_N4)
    _check(masks_NSS, boxes_N4, height, width)
    values_NHW = np.zeros((len(masks_NSS), height, width), np.float32)
    for values_HW, mask_SS, box_4 in zip(values_NHW, masks_NSS, boxes_N4, strict=True):
        region, values = _region(mask_SS, box_4, height, width)
        values_HW[region] = values
    return values_NHW


def to_results(
    outputs: Mapping[str, np.ndarray],
    image_id: int | str,
    category_ids: Sequence[int],
    scale: np.ndarray,
    original_size: Sequence[int],
) -> list[dict[str, Any]]:
    """The predicted objects of one image as COCO results in pixels of the original image.

    Masks are pasted into the box as predicted; then box and mask are cut at the image's border. Objects that are not
    `valid`, boxes that are reversed, without area inside the image, or not finite, and scores that are not finite (JSON
    has none) are left out.

    Args:
        outputs: one row of a task's prediction: `boxes` f32[N,4] x1 y1 x2 y2 in pixels of the resized image, `classes`
            int[N], `scores` f32[N], `valid` bool[N]; `masks` f32[N,S,S] where the task predicts them.
        image_id: COCO's id of the image, an int or str of any library.
        category_ids: COCO's category id of each class.
        scale: f32[2], the factors of x and y from the original to the resized image.
        original_size: height and width of the original image.
    Returns:
        Dicts ready for JSON, in the order of the rows: image_id, category_id, bbox [x, y, width, height], score and,
        with masks, segmentation (compressed RLE).
    Raises:
        ValueError: a valid object's class has no category, shapes do not fit, or an id is neither int nor str.
    """
    image_id = plain_id(image_id)
    height, width = (int(length) for length in original_size)
    boxes_N4 = np.asarray(outputs["boxes"], np.float32) / np.tile(np.asarray(scale, np.float32), 2)[None]
    masks_NSS = np.asarray(outputs["masks"]) if "masks" in outputs else None
    if masks_NSS is not None:
        _check(masks_NSS, boxes_N4, height, width)
    clipped_N4 = np.clip(boxes_N4, 0, np.array([[width, height, width, height]], np.float32))
    finite = np.isfinite(boxes_N4).all(axis=1) & np.isfinite(outputs["scores"])
    keep = np.asarray(outputs["valid"], bool) & finite & (clipped_N4[:, :2] < clipped_N4[:, 2:]).all(axis=1)
    results = []
    for row in np.flatnonzero(keep):
        label = int(outputs["classes"][row])
        if not 0 <= label < len(category_ids):
            raise ValueError(
                f"object {row} of image {image_id} has class {label}, but the data has {len(category_ids)} categories; "
                "evaluate a model with the categories that it was trained for"
            )
        x1, y1, x2, y2 = (float(v) for v in clipped_N4[row])
        result = {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(outputs["scores"][row]),
        }
        if masks_NSS is not None:
            result["segmentation"] = paste_rle(masks_NSS[row], boxes_N4[row], height, width)
        results.append(result)
    return results


def plain_id(value: Any) -> int | str:
    """An id, an int or a str of any library (np.int64, np.str_, ...), as Python's own, which JSON can hold."""
    none = isinstance(value, (bool, np.bool_)) or np.ma.is_masked(value)
    try:
        return str(value) if isinstance(value, str) else operator.index(None if none else value)
    except TypeError as error:
        raise ValueError(f"image_id={value!r:.200} must be a whole number or a text, one for each image") from error


def from_results(
    results: Sequence[Mapping[str, Any]], category_ids: Sequence[int], step: int = 1
) -> dict[str, np.ndarray]:
    """COCO results of one image as arrays, as `visualize.objects_panel` takes them.

    Args:
        step: above 1, as they lie in a smaller copy of the image, of which each `step`-th row and column is left.
    Returns:
        `boxes` f32[n,4] x1 y1 x2 y2, `classes` int32[n], `scores` f32[n] and, where the results have masks, `masks`
        uint8[n,H,W] of 0 and 1, H and W those of the copy.
    """
    label = {category: index for index, category in enumerate(category_ids)}
    boxes_N4 = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
    boxes_N4[:, 2:] += boxes_N4[:, :2]
    arrays = {
        "boxes": (boxes_N4 / step).astype(np.float32),
        "classes": np.array([label[result["category_id"]] for result in results], np.int32),
        "scores": np.array([result["score"] for result in results], np.float32),
    }
    if results and "segmentation" in results[0]:
        masks = [coco_mask.decode(result["segmentation"])[::step, ::step] for result in results]
        arrays["masks"] = np.stack(masks)
    return arrays


def paste_rle(mask_SS: np.ndarray, box_4: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Where `paste_masks` of one object is >= 0.5, as compressed RLE: `size` [height, width] and `counts` (str)."""
    binary_HW = np.zeros((height, width), np.uint8, order="F")
    region, values = _region(mask_SS, box_4, height, width)
    binary_HW[region] = values >= 0.5
    code = coco_mask.encode(binary_HW)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def _region(mask_SS, box_4, height, width) -> tuple[tuple[slice, slice], np.ndarray]:
    """The rows and columns of the image that the mask reaches, and the values there; all others are zero."""
    x1, y1, x2, y2 = np.asarray(box_4, np.float32)
    size_y, size_x = mask_SS.shape
    padded = np.pad(mask_SS.astype(np.float32), 1)
    rows, above, share_y = _taps(y1, y2, size_y, height)
    columns, left, share_x = _taps(x1, x2, size_x, width)
    share_y, share_x = share_y[:, None], share_x[None]
    lines = padded[above] * (1 - share_y) + padded[above + 1] * share_y
    return (rows, columns), lines[:, left] * (1 - share_x) + lines[:, left + 1] * share_x


def _taps(start, end, size, length) -> tuple[slice, np.ndarray, np.ndarray]:
    """Along one axis: the pixels whose centres lie on the mask, the padded cell before each, the share of the next.

    The order of the float32 operations is that of torch's grid_sample, so that values at the threshold agree.
    """
    centres = np.arange(length, dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        places = (centres - start) / (end - start) * 2 - 1
    places[~np.isfinite(places)] = 0
    cells = ((places + 1) * np.float32(size) - 1) / 2
    inside = np.flatnonzero((cells > -1) & (cells < size))
    pixels = slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0)
    before = np.floor(cells[pixels])
    return pixels, before.astype(np.int64) + 1, cells[pixels] - before


def _check(masks_NSS, boxes_N4, height, width) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"an image of {height}x{width} has no pixels to paste masks on")
    if masks_NSS.ndim != 3 or boxes_N4.shape != (len(masks_NSS), 4):
        raise ValueError(
            f"masks must be [N, S, S] and boxes [N, 4] of the same N, got {masks_NSS.shape} and {boxes_N4.shape}"
        )
