"""The scale at which a model sees an image, and enlarged views of it for test-time augmentation."""

from collections.abc import Mapping, Sequence

import numpy as np

from aitok_jax.image import resize
from aitok_jax.tasks.arguments import whole_number
from aitok_jax.tasks.modalities import Modality

ASPECT_STEPS = 15  # 32 px at image_size 480
MAX_ASPECT = 8
ZOOM, NUM_VIEWS = 1.1, 5  # of the views for test-time augmentation


def model_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which an image of height x width is predicted; see `Predictor.__call__`.

    Raises:
        ValueError: the long side is more than 8 times the short side, or one is no number of pixels.
    """
    short, long = sorted((whole_number("height", height), whole_number("width", width)))
    if long > MAX_ASPECT * short:
        raise ValueError(f"a {height}x{width} image is longer than {MAX_ASPECT} times its short side; crop it")
    model_long = round(image_size * round(ASPECT_STEPS * long / short) / ASPECT_STEPS)
    return (image_size, model_long) if height <= width else (model_long, image_size)


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

    The corners are put back in their places, overlaps averaged, and the result is averaged with the map of the image.
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
    corners = [modality.zoomed(map_, zoom) for map_ in maps[1:]]
    return {
        modality.name: _average(maps[0], corners),
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
