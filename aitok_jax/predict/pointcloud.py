"""Depth maps as coloured point clouds, for a pinhole camera that looks straight through the middle of the image."""

import math
from pathlib import Path

import numpy as np

from aitok_jax import paths


def focal_length(width: int, fov: float) -> float:
    """In pixels, of a camera that sees `fov` degrees from the left to the right border of `width` pixels.

    Raises:
        ValueError: a field of view outside 0..180 degrees.
    """
    if not 0 < fov < 180:
        raise ValueError(
            f"a horizontal field of view of {fov} degrees is impossible: give one between 0 and 180; "
            "the camera of NYUv2 has 63"
        )
    return width / 2 / math.tan(math.radians(fov) / 2)


def points(depth_HW: np.ndarray, fov: float) -> np.ndarray:
    """Where the pixels of a depth map lie in space, row by row.

    Args:
        depth_HW: float32[H,W] metres along the camera's axis (as predicted and as in NYUv2), not along the ray.
        fov: horizontal field of view of the image in degrees.
    Returns:
        float32[H*W,3], metres: x to the right, y down, z forward; the camera is at 0. The ray of a pixel goes through
        its centre. Pixels are square.
    Raises:
        ValueError: a depth of another shape, or an impossible field of view.
    """
    depth_HW = np.asarray(depth_HW, np.float32)
    if depth_HW.ndim != 2:
        raise ValueError(f"depth must be [H, W], got shape {depth_HW.shape}; convert one map at a time")
    height, width = depth_HW.shape
    focal = focal_length(width, fov)
    x_W = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    y_H = ((np.arange(height) + 0.5 - height / 2) / focal).astype(np.float32)
    return np.stack([depth_HW * x_W[None], depth_HW * y_H[:, None], depth_HW], -1).reshape(-1, 3)


def write_ply(path: str | Path, image: np.ndarray, depth_HW: np.ndarray, fov: float) -> int:
    """Writes image and depth as PLY (binary, little endian): x y z float32 in metres, red green blue uint8.

    Coordinates are those of `points`. Pixels whose depth is 0 (unknown), negative or not finite are left out.

    Args:
        path: the file; its folder is made where absent.
        image: uint8[H,W,3] RGB.
        depth_HW: float32[H,W] metres.
        fov: horizontal field of view of the image in degrees.
    Returns:
        The number of points written.
    Raises:
        ValueError: image and depth of different sizes, an image of another type, or an impossible field of view.
    """
    depth_HW = np.asarray(depth_HW, np.float32)
    expected = (*depth_HW.shape, 3)
    if image.dtype != np.uint8 or image.shape != expected:
        raise ValueError(f"image must be uint8 {expected}, as large as the depth, got {image.dtype} {image.shape}")
    place_N3 = points(depth_HW, fov)
    known_N = np.isfinite(place_N3[:, 2]) & (place_N3[:, 2] > 0)
    fields = [*((name, "<f4") for name in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))]
    vertices = np.empty(int(known_N.sum()), fields)
    columns = [*place_N3[known_N].T, *image.reshape(-1, 3)[known_N].T]
    for (name, _), values in zip(fields, columns, strict=True):
        vertices[name] = values
    header = ["ply", "format binary_little_endian 1.0", "comment metres; x right, y down, z forward"]
    header += [f"element vertex {len(vertices)}"]
    header += [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in fields]
    with paths.writing(path) as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode("ascii"))
        file.write(vertices.data)
    return len(vertices)
