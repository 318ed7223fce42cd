"""Images: the one reader of files, scaling, the square that models of objects see, and PNGs."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from aitok_jax import paths

IMAGENET_MEAN = np.array((123.675, 116.28, 103.53), np.float32) / 255
"""Mean RGB in 0..1; what images are filled up with, since it is exactly 0 once normalised."""
IMAGENET_STD = np.array((58.395, 57.12, 57.375), np.float32) / 255
_BOUND = "AITOK_MAX_PIXELS"
_MAX_PIXELS = 100_000_000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)
ASPECT_STEPS = 15  # 32 px at image_size 480
MAX_ASPECT = 8


class ImageError(ValueError):
    """A file that cannot be read as an image; the message says why, and what to do."""


def read_image(file: str | Path | bytes) -> np.ndarray:
    """An image of any format Pillow reads as uint8[H,W,3] RGB, as a viewer shows it.

    It is turned as its EXIF orientation says. What is transparent lies on white; 16-bit grey keeps its upper 8 bits,
    floats in 0..1 become 0..255. Of an animation this is the first picture.

    Args:
        file: its path, or its bytes.
    Raises:
        OSError: no such file, or no right to read it.
        ImageError: a broken file, values that are no colours, or more pixels than `max_pixels`.
    """
    image = open_image(file)
    if image.mode == "F" or is_16_bit_grey(image):
        return np.repeat(_to_8_bits(np.asarray(image))[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"Pillow cannot show mode {image.mode!r} as RGB ({error}); save it as 8-bit RGB") from error


def open_image(file: str | Path | bytes) -> Image.Image:
    """A decoded image in its own mode, turned as its EXIF orientation says; arguments and errors of `read_image`."""
    with _opened(file) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return image if turn is None else image.transpose(turn)


def read_shape(file: str | Path | bytes) -> tuple[int, int]:
    """Height and width of what `read_image` gives, of which only the head of the file is read."""
    with _opened(file) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _QUARTER_TURNS else (height, width)


@contextlib.contextmanager
def _opened(file: str | Path | bytes) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; what Pillow raises inside is raised as an ImageError."""
    if max_pixels() > _MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow has a bound of its own
    with io.BytesIO(file) if isinstance(file, bytes) else paths.opened(paths.expand(file)) as stream:
        try:
            image = Image.open(stream)
            _check_size(*image.size)
            yield image
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(
                f"{error} Make the image smaller, or raise the bound by {_BOUND} in the environment"
            ) from error
        except UnidentifiedImageError as error:
            raise ImageError("broken image file, or of a format that Pillow does not know; restore it") from error
        except Exception as error:  # the decoders raise a dozen kinds
            raise ImageError(f"broken image file ({type(error).__name__}: {error!s:.200}); restore it") from error


def is_16_bit_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def max_pixels() -> int:
    """Of an image that is read: 100 million, or AITOK_MAX_PIXELS in the environment; ValueError for no number there."""
    text = os.environ.get(_BOUND, str(_MAX_PIXELS))
    if not text.isdecimal():
        raise ValueError(f"{_BOUND}={text!r} in the environment must be a whole number of pixels")
    return int(text)


def _check_size(width: int, height: int) -> None:
    if width * height > (most := max_pixels()):
        raise ImageError(
            f"{width} x {height} pixels are more than the {most} that are read at once; make the image smaller, "
            f"or raise the bound by {_BOUND}={width * height} in the environment"
        )


def _orientation(image: Image.Image) -> int:
    """The tag alone: other tags of EXIF may be invalid, and where all of it is, viewers do not turn the image."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as of the decoders
        return 1


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """uint8[H,W] of whole numbers of 16 bits, or of floats in 0..1."""
    low, high = float(grey.min()), float(grey.max())
    if grey.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ImageError(f"grey floats of {low:g} to {high:g} are no colours; scale them to 0..1, or save 8 bits")
        return np.round(grey * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageError(f"grey values of {low:g} to {high:g} are beyond 16 bits; save the image with 8 or 16 bits")
    return (grey >> 8).astype(np.uint8)


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


def nearest(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Any array [H,W,...] at another size: of every pixel the one nearest to its centre."""
    rows, columns = (
        (2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip((height, width), array.shape, strict=False)
    )
    return array[rows[:, None], columns]


def model_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width at which models of maps see an image of height x width pixels: the short side is `image_size`,
    the long one a multiple of a fifteenth of that.

    Raises:
        ValueError: the long side is more than 8 times the short side.
    """
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        raise ValueError(f"a {height}x{width} image is longer than {MAX_ASPECT} times its short side; crop it")
    model_long = round(image_size * round(ASPECT_STEPS * long / short) / ASPECT_STEPS)
    return (image_size, model_long) if height <= width else (model_long, image_size)


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


def save_png(path: str | Path, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Writes uint8[H,W], uint8[H,W,3] or uint16[H,W] as PNG, making the folder where needed; ValueError otherwise.

    With a `palette`, the colours uint8[256,3] of the numbers of uint8[H,W], it is an indexed one.
    """
    array = np.asarray(array)
    rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not (rgb or grey):
        raise ValueError(
            f"PNG needs uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W], got {array.dtype} {array.shape}; convert first"
        )
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    with paths.writing(path) as file:
        picture.save(file, format="PNG")


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes an array as .npy, making the folder where needed."""
    with paths.writing(path) as file:
        np.save(file, array)
