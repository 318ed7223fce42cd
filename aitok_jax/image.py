"""Images: the one reader of files, scaling, the square that models of objects see, and PNGs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGENET_MEAN = np.array((123.675, 116.28, 103.53), np.float32) / 255
"""Mean RGB in 0..1; what images are filled up with, since it is exactly 0 once normalised."""
IMAGENET_STD = np.array((58.395, 57.12, 57.375), np.float32) / 255


def read_image(file: str | Path | bytes) -> np.ndarray:
    """An image of any format Pillow reads as uint8[H,W,3] RGB, turned as its EXIF orientation says.

    Grey, palette and transparent images are converted (transparency is dropped); 16-bit grey keeps its upper 8 bits.

    Args:
        file: its path, or its bytes.
    Raises:
        OSError, ValueError and others of Pillow's decoders: a broken file.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        image = ImageOps.exif_transpose(opened)
        if is_16_bit_grey(image):
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def is_16_bit_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def resize(
    array: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """uint8[H,W,3], float32[H,W] or float32[H,W,C], bilinear and antialiased; as it is where it has the size.

    `box`, x1 y1 x2 y2 in pixels, is the part of it that is taken; None takes all.
    """
    if array.shape[:2] == (height, width) and box is None:
        return array
    if array.ndim == 3 and array.dtype != np.uint8:
        return np.stack([resize(channel, height, width, box) for channel in np.moveaxis(array, 2, 0)], -1)
    picture = Image.fromarray(np.ascontiguousarray(array))
    return np.array(picture.resize((width, height), Image.Resampling.BILINEAR, box))


def fitted(height: int, width: int, longer: int) -> tuple[int, int]:
    """Height and width, at least 1, of an image resized so that its longer side is `longer`."""
    factor = longer / max(height, width)
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def fit_square(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image as models of objects see it, in evaluation and prediction alike.

    Its longer side becomes `size`; resizing is bilinear, with antialiasing where it shrinks. At the right, or at the
    bottom, it is filled up with the mean of ImageNet's colours.

    Args:
        image: uint8[H,W,3] RGB.
        size: side of the square in pixels.
    Returns:
        float32[size,size,3] in 0..1, and float32[2], the factors of x and y from the image to the square.
    """
    height, width = image.shape[:2]
    new_height, new_width = fitted(height, width, size)
    square = on_canvas(resize(image, new_height, new_width), size)
    return square, np.array([new_width / width, new_height / height], np.float32)


def on_canvas(image: np.ndarray, size: int) -> np.ndarray:
    """float32[size,size,3] in 0..1: uint8[H,W,3] at the top left, IMAGENET_MEAN elsewhere."""
    height, width = image.shape[:2]
    canvas = np.empty((size, size, 3), np.float32)
    canvas[height:] = IMAGENET_MEAN
    canvas[:height, width:] = IMAGENET_MEAN
    np.divide(image, np.float32(255), out=canvas[:height, :width])
    return canvas


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8[H,W], uint8[H,W,3] or uint16[H,W] as PNG, making the folder where needed; ValueError otherwise."""
    array = np.asarray(array)
    rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (rgb or grey):
        raise ValueError(
            f"PNG needs uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W], got {array.dtype} {array.shape}; convert first"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format="PNG")
