"""Enlarged views of an image, for test-time augmentation."""

from collections.abc import Mapping, Sequence

import numpy as np

from aitok_jax.image import resize
from aitok_jax.tasks.modalities import Modality

ZOOM, NUM_VIEWS = 1.1, 5  # of the views for test-time augmentation


def view(image: np.ndarray, number: int, height: int, width: int) -> np.ndarray:
    """What the model sees for test-time augmentation: the image (number 0), or a corner of it, enlarged 1.1 times.

    Args:
        image: uint8[H,W,3].
        number: 0 to 4.
        height, width: as from `model_size`.
    Returns:
        uint8[height,width,3].
    """
    if number == 0:
        return resize(image, height, width)
    rows, columns = _corners(height, width)[number - 1]
    y, x = image.shape[0] / height, image.shape[1] / width
    return resize(image, height, width, (columns.start * x, rows.start * y, columns.stop * x, rows.stop * y))


def average_views(views: Sequence[Mapping[str, np.ndarray]], modality: Modality) -> dict[str, np.ndarray]:
    """The maps of an image from those of its views; of the image alone where that is the only one.

    The corners are put back in their places, overlaps averaged, and the result is averaged with the map of the image,
    as the VQ-VAE sees maps.
    An enlarged picture is that of a camera with a longer focal length (`Modality.zoomed`).

    Args:
        views: the modality's map and `confidence`, float32[height,width,...], of `view` 0, or of all in order.
    """
    if len(views) == 1:
        return dict(views[0])
    maps = [each[modality.name] for each in views]
    confidences = [each["confidence"] for each in views]
    height = len(confidences[0])
    zoom = height / round(height / ZOOM)
    whole, *corners = (
        np.asarray(modality.encode(map_[None])[0]) for map_ in (maps[0], *(modality.zoomed(m, zoom) for m in maps[1:]))
    )
    return {
        modality.name: np.array(modality.finish(_average(whole, corners)[None])[0]),
        "confidence": _average(confidences[0], confidences[1:]),
    }


def _average(whole: np.ndarray, corners: Sequence[np.ndarray]) -> np.ndarray:
    height, width, *axes = whole.shape
    total, times = np.zeros_like(whole), np.zeros((height, width, *(1 for _ in axes)), np.float32)
    for (rows, columns), corner in zip(_corners(height, width), corners, strict=True):
        total[rows, columns] += resize(corner, rows.stop - rows.start, columns.stop - columns.start)
        times[rows, columns] += 1
    return (whole + total / times) / 2


def _corners(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns that the enlarged views show."""
    ends = [(slice(0, inner), slice(side - inner, side)) for side in (height, width) for inner in [round(side / ZOOM)]]
    return [(rows, columns) for rows in ends[0] for columns in ends[1]]
