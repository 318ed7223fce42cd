"""Surface normals: unit vectors in camera coordinates, x right, y down, z away from the camera, float32[H,W,3].

They point out of the surface, towards the camera. All zero where there is no annotation.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from aitok_jax.image import open_image, save_npy, save_png
from aitok_jax.tasks.modalities.modality import Modality, Tile, masked_mean

WITHIN = (11.25, 22.5, 30.0)  # degrees, of the usual shares of pixels
_PICTURED = np.array([1, -1, -1], np.float32)  # pictures count upwards and towards the camera
_TINY = 1e-6
_ROWS = 240  # of an image whose neighbouring pixels tell a slope; of larger ones, pixels farther apart do


@dataclasses.dataclass(frozen=True)
class Normals(Modality):
    name: ClassVar[str] = "normals"
    channels: ClassVar[int] = 3
    map_axes: ClassVar[tuple[int, ...]] = (3,)
    task_id: ClassVar[int] = 3
    objective: ClassVar[str] = "mse_annotated"
    unit: ClassVar[str] = "°"
    meaning: ClassVar[str] = "unit vectors in camera coordinates: x right, y down, z away from the camera"
    headline: ClassVar[tuple[str, str]] = ("mean_angle", "min")
    pair: ClassVar[str] = "normals_{}.png"
    source: ClassVar[str] = "depth"

    def encode(self, map_: Any) -> Any:
        return map_

    def finish(self, raw_BHWC: jax.Array) -> jax.Array:
        return _unit(raw_BHWC)

    def valid(self, map_: Any) -> Any:
        return (map_ != 0).any(-1)

    def auxiliary(self, raw_BHWC: jax.Array, map_: jax.Array) -> dict[str, jax.Array]:
        """1 - cos, mean over the annotated pixels; 0 where there are none."""
        valid = self.valid(map_)
        cosine = jnp.sum(_unit(raw_BHWC) * map_, -1)
        return {"cosine": jnp.sum(jnp.where(valid, 1 - cosine, 0.0)) / jnp.maximum(jnp.sum(valid), 1)}

    def mirror(self, map_: Any) -> Any:
        return map_ * np.array([-1, 1, 1], np.float32).reshape((1,) * (len(map_.shape) - 1) + (3,))

    def error(self, prediction: Any, map_: Any) -> Any:
        """The angle between the vectors, by the sine of its half: exact for small ones."""
        chord = jnp.linalg.norm(_unit(jnp.asarray(prediction)) - _unit(jnp.asarray(map_)), axis=-1)
        return jnp.degrees(2 * jnp.arcsin(jnp.clip(chord / 2, 0, 1)))

    def metrics(self, prediction: jax.Array, map_: jax.Array, valid_BHW: jax.Array) -> dict[str, jax.Array]:
        """mean_angle and median_angle in degrees; within_11.25, within_22.5, within_30: shares of pixels."""
        angle_BHW = self.error(prediction, map_)
        angles_BN = jnp.where(valid_BHW, angle_BHW, jnp.nan).reshape(len(angle_BHW), -1)
        shares = {f"within_{limit:g}": masked_mean(angle_BHW < limit, valid_BHW) for limit in WITHIN}
        return {
            "mean_angle": masked_mean(angle_BHW, valid_BHW),
            "median_angle": jnp.nanmedian(angles_BN, axis=1),
            **shares,
        }

    def read(self, content: bytes) -> np.ndarray:
        """A PNG in the usual colours, see `colors`; grey 128 in all channels is no annotation."""
        image = open_image(content)
        if image.mode != "RGB":
            raise ValueError(f"normals must be a picture of 3 x 8 bits, but Pillow reads mode {image.mode!r}")
        picture = np.asarray(image)
        vectors = _PICTURED * (picture.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return np.where((picture == 128).all(-1, keepdims=True), np.float32(0), vectors)

    def write(self, target: str | Path, map_: np.ndarray) -> None:
        """TARGET_normals.npy, float32 unit vectors, and TARGET_normals.png in the usual colours."""
        save_npy(f"{target}_normals.npy", map_)
        save_png(f"{target}_normals.png", colors(map_))

    def derived(self, map_: np.ndarray, fov: float) -> bytes:
        content = io.BytesIO()
        Image.fromarray(colors(from_depth(map_, fov))).save(content, format="PNG")
        return content.getvalue()

    def tiles(self, maps: Sequence[np.ndarray]) -> list[Tile]:
        return [Tile(colors(map_), {}, "") for map_ in maps]


def colors(map_: np.ndarray) -> np.ndarray:
    """uint8[H,W,3], as such maps are usually drawn: red to the right, green upwards, blue towards the camera.

    That is red 127.5 (1 + x), green 127.5 (1 - y), blue 127.5 (1 - z).
    """
    return np.clip(np.round((_PICTURED * map_ + 1) * 127.5), 0, 255).astype(np.uint8)


def from_depth(depth: np.ndarray, fov: float) -> np.ndarray:
    """f32[H,W,3]: the normals of a depth map, 0 where it, or what a slope takes, is missing.

    A slope goes to the neighbour, on either side, whose depth is nearer to the pixel's, and so not over an edge.
    """
    height, width = depth.shape
    focal, step = width / 2 / math.tan(math.radians(fov) / 2), max(round(height / _ROWS), 1)
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(x - width / 2) / focal, (y - height / 2) / focal, np.ones_like(x)], -1)
    points = depth[..., None] * rays

    def slope(axis: int) -> np.ndarray:
        wide = np.pad(points, [(step, step) if i == axis else (0, 0) for i in range(3)])
        before, after = (np.take(wide, np.arange(height if axis == 0 else width) + s, axis) for s in (0, 2 * step))
        ways = (points - before, after - points)
        jumps = [
            np.where(end[..., 2] > 0, np.abs(way[..., 2]), np.inf)
            for end, way in zip((before, after), ways, strict=True)
        ]
        way = np.where((jumps[0] <= jumps[1])[..., None], *ways)
        return np.where(np.isfinite(np.minimum(*jumps))[..., None], way, 0)

    vectors = np.cross(slope(0), slope(1))
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = (length > 0) & (depth > 0)[..., None]
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)


def _unit(vectors: Any) -> Any:
    square = jnp.sum(jnp.square(vectors), -1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(square, _TINY**2))
