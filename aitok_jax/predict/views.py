"""Images at the scale of the model, maps back at that of the image, and enlarged views for test-time augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from aitok_jax.tasks.solving import IMAGENET_MEAN

ASPECT_STEPS = 15  # 32 px at image_size 480
MAX_ASPECT = 8
ZOOM, NUM_VIEWS = 1.1, 5  # of the views for test-time augmentation


def resize(
    array: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """uint8[H,W,3] or float32[H,W], bilinear and antialiased; as it is where it has the size.

    `box`, x1 y1 x2 y2 in pixels, is the part of it that is taken; None takes all.
    """
    if array.shape[:2] == (height, width) and box is None:
        return array
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR, box))


def model_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which an image of height x width is predicted; see `Predictor.__call__`.

    Raises:
        ValueError: the long side is more than 8 times the short side.
    """
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        raise ValueError(f"a {height}x{width} image is longer than {MAX_ASPECT} times its short side; crop it")
    model_long = round(image_size * round(ASPECT_STEPS * long / short) / ASPECT_STEPS)
    return (image_size, model_long) if height <= width else (model_long, image_size)


def fit_square(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image as models of objects see it, the same as in their evaluation (`data.objects.evaluation`).

    Its longer side becomes `size`; resizing is bilinear, with antialiasing where it shrinks. At the right, or at the
    bottom, it is filled up with the mean of ImageNet's colours.

    Args:
        image: uint8[H,W,3] RGB.
        size: side of the square in pixels.
    Returns:
        float32[size,size,3] in 0..1, and float32[2], the factors of x and y from the image to the square.
    """
    height, width = image.shape[:2]
    factor = size / max(height, width)
    new_height, new_width = (max(int(side * factor + 0.5), 1) for side in (height, width))
    square = np.tile(IMAGENET_MEAN, (size, size, 1))
    square[:new_height, :new_width] = resize(image, new_height, new_width).astype(np.float32) / 255
    return square, np.array([new_width / width, new_height / height], np.float32)


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


def average_views(maps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The maps of an image from those of its views; of the image alone where that is the only one.

    The corners are put back in their places, overlaps averaged, and the result is averaged with the map of the image.
    An enlarged picture is that of a camera with a longer focal length, in which a solver takes things for as much
    nearer as they look larger: its depth counts 1.1 times.

    Args:
        maps: `depth` and `confidence` float32[height,width] of `view` 0, or of all of them in order.
    """
    if len(maps) == 1:
        return dict(maps[0])
    return {name: _average([each[name] for each in maps], name == "depth") for name in ("depth", "confidence")}


def _average(maps: Sequence[np.ndarray], is_depth: bool) -> np.ndarray:
    height, width = maps[0].shape
    total, times = np.zeros((2, height, width), np.float32)
    for (rows, columns), corner in zip(_corners(height, width), maps[1:], strict=True):
        small = resize(corner, rows.stop - rows.start, columns.stop - columns.start)
        total[rows, columns] += small
        times[rows, columns] += 1
    zoom = height / small.shape[0] if is_depth else 1
    return (maps[0] + np.float32(zoom) * total / times) / 2


def _corners(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns that the enlarged views show."""
    ends = [(slice(0, inner), slice(side - inner, side)) for side in (height, width) for inner in [round(side / ZOOM)]]
    return [(rows, columns) for rows in ends[0] for columns in ends[1]]
