"""The contract of a dense map: all that tokenizer, solver, data, evaluation, prediction and export need of it."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.image import resize


class Tile(NamedTuple):
    """A picture of a map for a panel: an array for imshow, options of it, and the label of a colour bar or ''.

    `names` of colours, RGB of 0..255, stand below it.
    """

    values: np.ndarray
    style: Mapping[str, Any]
    unit: str
    names: Mapping[str, Sequence[int]] = {}


class Layout(NamedTuple):
    """The folders of a public data set.

    Attributes:
        images, maps: folders, with the same folders in them.
        endings: of an image's name without suffix, and of its map's in the place of that.
        val: the folder in both that is evaluated on.
        fields: of the modality.
    """

    images: str
    maps: str
    endings: tuple[str, str]
    val: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Modality(abc.ABC):
    """A kind of map. A subclass in one file of this folder, and its entry in MODALITIES, is all of it.

    Fields of a subclass are options of its configuration. A map is [B,H,W], or [B,H,W,...] with axes of its own; what
    the VQ-VAE sees of it, and gives back, is [B,H,W,channels].

    Attributes:
        name: key of batches, results and metrics; name of its codes in the vocabulary, suffix of its files.
        channels: of the VQ-VAE's input and output; a property where it depends on fields.
        map_axes: the axes of a map after height and width.
        missing: what a map holds where there is no annotation.
        task_id: its row in the solver's task and position tables; 0 and 1 are those of objects.
        objective: the VQ-VAE's default, of `vqvae.OBJECTIVES`.
        unit: of `error`.
        meaning: of the numbers of a finished map, for the description of an export.
        headline: the metric that the best weights and the tables go by, and which way is better, 'min' or 'max'.
        pair: the map's file in the NYUv2 layout, where '{}' stands for NNNNN of `rgb_NNNNN.jpg`.
        writes: suffixes of the files that `write` makes.
        suffixes: of files that `read` takes, for the same name as that of `pair`.
        file_fields: keys of a configuration's `data` -> the fields that they set for `read`.
        layouts: of public data sets that are read as they are.
        source: the modality whose maps tell those of this one, see `derived`; '' for none.
    """

    name: ClassVar[str]
    channels: ClassVar[int]
    map_axes: ClassVar[tuple[int, ...]]
    missing: ClassVar[float] = 0.0
    task_id: ClassVar[int]
    objective: ClassVar[str]
    unit: ClassVar[str]
    meaning: ClassVar[str]
    headline: ClassVar[tuple[str, str]]
    pair: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    writes: ClassVar[tuple[str, ...]] = (".npy", ".png")
    file_fields: ClassVar[Mapping[str, str]] = {}
    layouts: ClassVar[tuple[Layout, ...]] = ()
    source: ClassVar[str] = ""

    @classmethod
    def told(cls, folder: Path) -> dict[str, Any]:
        """Fields that files in a folder of images and maps tell."""
        del folder
        return {}

    @property
    def legend(self) -> dict[str, Any]:
        """What a prediction says besides the map, by name; such as the names of its numbers."""
        return {}

    @abc.abstractmethod
    def encode(self, map_: Any) -> Any:
        """A map, f32[B,H,W,...] -> what the VQ-VAE sees, f32[B,H,W,channels]; zeros where there is no annotation."""

    @abc.abstractmethod
    def finish(self, raw_BHWC: jax.Array) -> jax.Array:
        """What the VQ-VAE gives, after averaging of views -> a map."""

    @abc.abstractmethod
    def valid(self, map_: Any) -> Any:
        """bool[B,H,W]: what is annotated."""

    def measured(self, map_: jax.Array) -> jax.Array:
        """bool[B,H,W]: what metrics look at."""
        return self.valid(map_)

    @abc.abstractmethod
    def auxiliary(self, raw_BHWC: jax.Array, map_: jax.Array) -> dict[str, jax.Array]:
        """The loss through soft tokens (arXiv 2301.02229, soft token) by its name: f32 scalars, which are added.

        Over the annotated pixels of all maps together: a map without any, all `missing`, changes nothing.
        """

    def mirror(self, map_: Any) -> Any:
        """A map, or what the VQ-VAE gives, whose columns were reversed -> that of the mirrored scene (any library)."""
        return map_

    def zoomed(self, map_: np.ndarray, zoom: float) -> np.ndarray:
        """The map of an image from that of the image enlarged `zoom` times, as of a longer focal length."""
        del zoom
        return map_

    def resized(self, map_: np.ndarray, height: int, width: int) -> np.ndarray:
        """A finished map at another size; bilinear."""
        return np.array(self.finish(self.encode(resize(map_, height, width)[None]))[0])

    def spread(self, probabilities_BTK: jax.Array, values_KC: jax.Array) -> jax.Array:
        """f32[B,T]: what confidence 1 / (1 + spread) is made of; here the standard deviation of the codes' values.

        Codes of one value count as agreeing, which the entropy of the probabilities would not see.
        """
        mean_BTC = probabilities_BTK @ values_KC
        deviation_BTKC = jnp.expand_dims(values_KC, (0, 1)) - jnp.expand_dims(mean_BTC, 2)
        variance_BTK = jnp.sum(jnp.square(deviation_BTKC), -1)
        return jnp.sqrt(jnp.sum(probabilities_BTK * variance_BTK, -1))

    @abc.abstractmethod
    def error(self, prediction: Any, map_: Any) -> Any:
        """f32[B,H,W], at least 0, in `unit`: of every pixel, any number where there is no annotation (any library)."""

    def summary(self, errors: np.ndarray) -> str:
        """What a panel says of the `error` of the annotated pixels of an image, of which there are some."""
        return f"RMSE {np.sqrt(np.mean(np.square(errors))):.2f} {self.unit}"

    @abc.abstractmethod
    def metrics(self, prediction: jax.Array, map_: jax.Array, valid_BHW: jax.Array) -> dict[str, jax.Array]:
        """[B] or [B,...] by name: of each image over its valid pixels; anything where there are none."""

    def overall(self, means: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a data set from the means of `metrics`, and others, over its images."""
        return dict(means)

    @abc.abstractmethod
    def read(self, content: bytes) -> np.ndarray:
        """A map f32[H,W,...] from a file's bytes; ValueError that says what is wrong with it and the way out."""

    def derived(self, map_: np.ndarray, fov: float) -> bytes:
        """A file that `read` takes, from a map of `source`; `fov`: the camera's horizontal field of view in degrees.

        Asked for only where there is a `source`, which comes with it.
        """
        raise NotImplementedError(f"{type(self).__name__} has source={self.source!r}, and must have `derived` too")

    @abc.abstractmethod
    def write(self, target: str | Path, map_: np.ndarray) -> None:
        """Writes a predicted map as TARGET_NAME, with each of the suffixes in `writes`."""

    @abc.abstractmethod
    def tiles(self, maps: Sequence[np.ndarray]) -> list[Tile]:
        """Pictures of maps of one image, comparable with each other."""

    def distance(self, map_: np.ndarray) -> np.ndarray | None:
        """f32[H,W], metres along the camera's axis, where the map tells them: for point clouds."""
        del map_
        return None


def masked_mean(x_BHW: jax.Array, valid_BHW: jax.Array) -> jax.Array:
    """Mean over the valid pixels of each image, NaN where there are none."""
    total = jnp.sum(jnp.where(valid_BHW, x_BHW, 0.0), axis=(1, 2), dtype=jnp.float32)
    return total / jnp.sum(valid_BHW, axis=(1, 2), dtype=jnp.float32)  # 0 / 0 is NaN


def color_range(values: np.ndarray) -> tuple[float, float]:
    """Ends of a colour range: 1st and 99th percentile, kept apart."""
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99])
    return float(low), float(max(high, low + 1e-3))
