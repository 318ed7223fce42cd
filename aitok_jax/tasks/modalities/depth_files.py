"""Files of depth maps as people have them, as float32[H,W] metres with 0 where nothing was measured."""

import io
import math
import zipfile

import numpy as np
from absl import logging

from aitok_jax.image import ImageError, is_16_bit_grey, open_image

SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".npz")
PER_METRE = 1000.0  # of whole numbers
POSSIBLE = 0.05, 1000.0  # metres, of the median
_USUAL = (1000, 1, 100, 256, 5000, 10_000)  # values a metre in data sets
_LIKELY = 0.3, 100.0  # metres, of the median
_MAGIC = {b"\x93NUMPY": ".npy", b"PK\x03\x04": ".npz", b"\x76\x2f\x31\x01": ".exr"}
_PLAIN = 8  # bytes of the largest number


def read(content: bytes, scale: float = 0.0) -> np.ndarray:
    """Depth from the bytes of a PNG or TIFF of one grey channel, an .npy, or an .npz.

    Args:
        scale: values a metre; 0: 1000 for whole numbers, 1 for floats.
    Raises:
        ValueError: a broken file, another kind of picture or array, or OpenEXR. A median that no camera measures is
            logged as a warning, once, with the scale that would make sense of it.
    """
    kind = next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), "picture")
    if kind == ".exr":
        raise ValueError(
            "an OpenEXR file cannot be read here: convert it, as in numpy.save('x.npy', "
            "cv2.imread('x.exr', cv2.IMREAD_UNCHANGED)) with OPENCV_IO_ENABLE_OPENEXR=1 in the environment"
        )
    values = {".npy": _npy, ".npz": _npz, "picture": _picture}[kind](content)
    values = values.squeeze() if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]) else values
    if values.ndim != 2 or not values.size:
        raise ValueError(f"depth must be [H, W], but the file has {list(values.shape)}; save one map a file")
    depth = values.astype(np.float32) / np.float32(scale or (PER_METRE if values.dtype.kind in "iu" else 1.0))
    if values.dtype.kind != "u":
        depth[~(np.isfinite(depth) & (depth > 0))] = 0
    _check_unit(depth[::8, ::8], values[::8, ::8])
    return depth


def png_values(depth: np.ndarray, scale: float = 0.0) -> np.ndarray:
    """uint16[H,W] for a PNG of `scale` values a metre (0: 1000); ValueError where the depth is too large for it."""
    scale = scale or PER_METRE
    values = np.round(depth * scale)
    if values.max() > 65535:
        raise ValueError(
            f"depth up to {depth.max():g} m is beyond 16 bits at {scale:g} values a metre; give a depth_scale of at "
            f"most {65535 // depth.max():g}"
        )
    return values.astype(np.uint16)


def _picture(content: bytes) -> np.ndarray:
    image = open_image(content)
    if not (is_16_bit_grey(image) or image.mode == "F"):
        raise ValueError(
            f"depth must be a 16-bit grey PNG or TIFF in millimetres, or floats in metres, but Pillow reads mode "
            f"{image.mode!r}; write it again so (an 8-bit or colour file is a picture of depth, not depth)"
        )
    return np.asarray(image)


def _npy(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, fortran, dtype = header(stream, max_header_size=1000)
    except Exception as error:  # the header is Python, which NumPy parses
        raise ValueError(f"broken .npy file ({error!s:.200}); save it again with numpy.save") from error
    if dtype.kind not in "iuf" or dtype.itemsize > _PLAIN:
        raise ValueError(f"depth must be whole numbers or floats, but the file has {dtype!s:.80}; convert it first")
    start = stream.tell()
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(
            f"broken .npy file: {dtype} of shape {shape!s:.80} in {len(content) - start} bytes; restore it"
        )
    return np.ndarray(shape, dtype, content, start, order="F" if fortran else "C")


def _npz(content: bytes) -> np.ndarray:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            name = "depth.npy" if "depth.npy" in names else names[0]
            if len(names) > 1 and name != "depth.npy":
                raise ImageError(f"several arrays ({', '.join(names)!s:.80}); name the one of depth 'depth'")
            size = archive.getinfo(name).file_size
            with archive.open(name) as file:
                data = file.read(size + 1)
    except ImageError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds
        raise ValueError(f"broken .npz file ({error!s:.200}); restore it") from error
    if len(data) != size:
        raise ValueError(f"broken .npz file: {name!r:.80} has not the {size} bytes that it declares; restore it")
    return _npy(data)


def _check_unit(depth: np.ndarray, values: np.ndarray) -> None:
    known = depth > 0
    if not known.any():
        return
    median, raw = float(np.median(depth[known])), float(np.median(values[known]))
    if POSSIBLE[0] <= median <= POSSIBLE[1]:
        return
    fits = [scale for scale in _USUAL if _LIKELY[0] <= raw / scale <= _LIKELY[1]]
    advice = f"give depth_scale={fits[0]}, values a metre" if fits else "give depth_scale, values a metre"
    text = "a depth map has a median of %.3g m, which no camera measures: %s (now %.4g)"
    logging.log_first_n(logging.WARNING, text, 1, median, advice, raw / median)
