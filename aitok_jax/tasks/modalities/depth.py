"""Depth along the camera's axis in metres, float32[H,W], 0 where there is no annotation (arXiv 2301.02229, VQ-VAE)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.image import save_npy, save_png
from aitok_jax.models import losses
from aitok_jax.tasks.modalities import depth_files
from aitok_jax.tasks.modalities.modality import Modality, Tile, color_range, masked_mean

MIN_DEPTH = 1e-3  # metres: predictions are clipped here, and annotation below is left out of the metrics
EIGEN_CROP = (45, 471, 41, 601)
"""Rows 45:471 and columns 41:601 of a 480x640 NYUv2 image: the region that published numbers are measured on."""
METRICS = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


@dataclasses.dataclass(frozen=True)
class Depth(Modality):
    """Attributes:
    max_depth: metres; annotation beyond it is left out of the metrics.
    file_scale: values a metre in files; 0: 1000 of whole numbers, 1 of floats.
    """

    name: ClassVar[str] = "depth"
    channels: ClassVar[int] = 1
    map_axes: ClassVar[tuple[int, ...]] = ()
    task_id: ClassVar[int] = 2
    objective: ClassVar[str] = "mse_ignore_zero"
    unit: ClassVar[str] = "m"
    meaning: ClassVar[str] = "metres, at least 0.001"
    headline: ClassVar[tuple[str, str]] = ("rmse", "min")
    pair: ClassVar[str] = "sync_depth_{}.png"
    suffixes: ClassVar[tuple[str, ...]] = depth_files.SUFFIXES
    file_fields: ClassVar[Mapping[str, str]] = {"depth_scale": "file_scale"}

    max_depth: float = 10.0
    file_scale: float = 0.0

    def __post_init__(self):
        if self.file_scale < 0:
            raise ValueError(
                f"depth_scale={self.file_scale}, the values a metre in files, must be above 0; 0 takes millimetres"
            )

    def encode(self, map_: Any) -> Any:
        return map_[..., None]

    def finish(self, raw_BHWC: jax.Array) -> jax.Array:
        return jnp.maximum(raw_BHWC[..., 0], MIN_DEPTH)

    def valid(self, map_: Any) -> Any:
        return map_ > 0

    def measured(self, map_: jax.Array) -> jax.Array:
        return (map_ > MIN_DEPTH) & (map_ < self.max_depth)

    def auxiliary(self, raw_BHWC: jax.Array, map_: jax.Array) -> dict[str, jax.Array]:
        return {"silog": losses.silog(raw_BHWC[..., 0], map_, min_prediction=MIN_DEPTH)}

    def zoomed(self, map_: np.ndarray, zoom: float) -> np.ndarray:
        """A solver takes things for as much nearer as they look larger."""
        return np.float32(zoom) * map_

    def error(self, prediction: Any, map_: Any) -> Any:
        return abs(mend(prediction, self.max_depth) - map_)

    def metrics(self, prediction: jax.Array, map_: jax.Array, valid_BHW: jax.Array) -> dict[str, jax.Array]:
        """The nine usual metrics; published numbers take the pixels of `EIGEN_CROP` with 1e-3 < depth < 10.

        With prediction p, true depth t and e = log p - log t:
        d1, d2, d3: share of pixels with max(p/t, t/p) < 1.25, 1.25², 1.25³; abs_rel: mean |p-t|/t; sq_rel: mean
        (p-t)²/t; rmse: sqrt(mean (p-t)²) in metres; rmse_log: sqrt(mean e²); log10: mean |log10 p - log10 t|;
        silog: sqrt(mean e² - ½ (mean e)²).

        Args:
            prediction: metres, any float dtype; mended by `mend` and not clamped otherwise, so that a value of 0 or
                less at a valid pixel is a miss for d1..d3 and makes the logarithmic metrics infinite or NaN.
        """
        p = jnp.where(valid_BHW, mend(prediction, self.max_depth), 1.0)
        t = jnp.where(valid_BHW, jnp.asarray(map_, jnp.float32), 1.0)

        def mean(x_BHW):
            return masked_mean(x_BHW, valid_BHW)

        ratio = jnp.where(p > 0, jnp.maximum(p / t, t / p), jnp.inf)
        e = jnp.log(p) - jnp.log(t)
        mean_square_e = mean(jnp.square(e))
        return {
            "d1": mean(ratio < 1.25),
            "d2": mean(ratio < 1.25**2),
            "d3": mean(ratio < 1.25**3),
            "abs_rel": mean(jnp.abs(p - t) / t),
            "sq_rel": mean(jnp.square(p - t) / t),
            "rmse": jnp.sqrt(mean(jnp.square(p - t))),
            "rmse_log": jnp.sqrt(mean_square_e),
            "log10": mean(jnp.abs(e)) / jnp.log(10.0),
            "silog": jnp.sqrt(mean_square_e - 0.5 * jnp.square(mean(e))),
        }

    def read(self, content: bytes) -> np.ndarray:
        """16-bit PNG or TIFF, .npy or .npz, see `depth_files.read`."""
        return depth_files.read(content, self.file_scale)

    def write(self, target: str | Path, map_: np.ndarray) -> None:
        """TARGET_depth.npy in metres and TARGET_depth.png, 16-bit millimetres, 0 to 65535."""
        save_npy(f"{target}_depth.npy", map_)
        save_png(f"{target}_depth.png", np.clip(np.round(map_ * 1000), 0, 65535).astype(np.uint16))

    def tiles(self, maps: Sequence[np.ndarray]) -> list[Tile]:
        """In one range of colours; pixels without annotation are blank."""
        shown = [np.where(map_ > 0, map_, np.nan) for map_ in maps]
        low, high = color_range(np.concatenate([map_[np.isfinite(map_)] for map_ in shown]))
        style = {"cmap": "turbo", "vmin": low, "vmax": high}
        return [Tile(map_, style, "depth [m]") for map_ in shown]

    def distance(self, map_: np.ndarray) -> np.ndarray:
        return map_


def mend(prediction: Any, max_depth: float) -> Any:
    """Float32 predictions with infinities replaced by max_depth and NaN by MIN_DEPTH; other values stay as they are."""
    prediction = jnp.asarray(prediction, jnp.float32)
    prediction = jnp.where(jnp.isinf(prediction), max_depth, prediction)
    return jnp.where(jnp.isnan(prediction), MIN_DEPTH, prediction)
