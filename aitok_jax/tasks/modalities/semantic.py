"""Semantic maps: the class of every pixel, by its place in a list of names; 255 where there is none.

A VQ-VAE sees one channel a class, 1 where the pixel is of it, and gives their logits.
"""

import colorsys
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax import paths
from aitok_jax.image import is_16_bit_grey, open_image, resize, save_png
from aitok_jax.models import losses
from aitok_jax.tasks.modalities.modality import Layout, Modality, Tile

IGNORED = 255
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation")
CITYSCAPES += ("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
"""In the order of its train ids."""
_LISTS = "classes.txt", "classes.json"
_ADE20K_LIST = "objectInfo150.txt"  # a line a class, after a title; the name comes last
_GREY = (128, 128, 128)
_NAMED = 12  # classes of a picture, the largest
_GOLDEN = 0.618034  # hues so far apart are never alike
_CONFUSION = "confusion"


@dataclasses.dataclass(frozen=True)
class Semantic(Modality):
    """Attributes:
    classes: their names.
    first_label: the number of the first class in files: 0, or 1 where 0 is no class, as in ADE20K.
    """

    name: ClassVar[str] = "semantic"
    map_axes: ClassVar[tuple[int, ...]] = ()
    missing: ClassVar[float] = IGNORED
    task_id: ClassVar[int] = 4
    objective: ClassVar[str] = "cross_entropy"
    unit: ClassVar[str] = "1 = wrong"
    meaning: ClassVar[str] = "the place of the pixel's class in the list of names, from 0"
    headline: ClassVar[tuple[str, str]] = ("miou", "max")
    pair: ClassVar[str] = "semantic_{}.png"
    writes: ClassVar[tuple[str, ...]] = (".png", ".json")
    file_fields: ClassVar[Mapping[str, str]] = {"first_label": "first_label"}
    layouts: ClassVar[tuple[Layout, ...]] = (
        Layout("images", "annotations", ("", ""), "validation", {"first_label": 1}),  # ADE20K
        Layout("leftImg8bit", "gtFine", ("leftImg8bit", "gtFine_labelTrainIds"), "val", {"classes": CITYSCAPES}),
    )

    classes: tuple[str, ...] = ()
    first_label: int = 0

    def __post_init__(self):
        if not 1 <= len(self.classes) <= IGNORED or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={self.classes!r:.80} must be 1 to {IGNORED} different names; give them in task.classes or, "
                f"for a folder of yours, in {_LISTS[0]} there, a name a line in the order of the labels"
            )
        if self.first_label not in (0, 1):
            raise ValueError(f"first_label={self.first_label} must be 0, or 1 where 0 in a file is no class")

    @classmethod
    def told(cls, folder: Path) -> dict[str, tuple[str, ...]]:
        """The classes, from classes.txt, a name a line, classes.json, a list, or the list of ADE20K."""
        text, listed, ade20k = (folder / name for name in (*_LISTS, _ADE20K_LIST))
        if text.is_file():
            names = [line.strip() for line in paths.read_lines(text)]
        elif listed.is_file():
            names = _names(listed)
        elif ade20k.is_file():
            names = [line.split("\t")[-1].strip() for line in paths.read_lines(ade20k)[1:]]
        else:
            return {}
        return {"classes": tuple(names)}

    @property
    def channels(self) -> int:
        return len(self.classes)

    @property
    def legend(self) -> dict[str, list[str]]:
        return {"names": list(self.classes)}

    def encode(self, map_: Any) -> Any:
        labels = np.arange(self.channels, dtype=np.float32).reshape((1,) * len(map_.shape) + (-1,))
        return (map_[..., None] == labels).astype(np.float32)

    def finish(self, raw_BHWC: jax.Array) -> jax.Array:
        return jnp.argmax(raw_BHWC, -1).astype(jnp.int32)

    def valid(self, map_: Any) -> Any:
        return map_ != IGNORED

    def auxiliary(self, raw_BHWC: jax.Array, map_: jax.Array) -> dict[str, jax.Array]:
        return {"pixel_cross_entropy": losses.cross_entropy(raw_BHWC, self.encode(map_))}

    def resized(self, map_: np.ndarray, height: int, width: int) -> np.ndarray:
        """Of every pixel the class that has most of it: that of the largest of the classes' bilinear maps."""
        if map_.shape == (height, width):
            return map_
        best, share = np.zeros((height, width), np.int32), np.zeros((height, width), np.float32)
        for label in np.unique(map_):
            own = resize((map_ == label).astype(np.float32), height, width)
            best, share = np.where(own > share, label, best), np.maximum(own, share)
        return best

    def spread(self, probabilities_BTK: jax.Array, values_KC: jax.Array) -> jax.Array:
        """Of the codes' probabilities of the classes."""
        return super().spread(probabilities_BTK, jax.nn.softmax(values_KC))

    def error(self, prediction: Any, map_: Any) -> Any:
        return (prediction != map_).astype(np.float32)

    def summary(self, errors: np.ndarray) -> str:
        return f"{100 * np.mean(errors):.1f} % wrong"

    def metrics(self, prediction: jax.Array, map_: jax.Array, valid_BHW: jax.Array) -> dict[str, jax.Array]:
        """`confusion` int32[B,K,K]: pixels by true class and predicted class."""
        count = self.channels
        pairs_BHW = count * jnp.asarray(map_, jnp.int32) + jnp.asarray(prediction, jnp.int32)
        pairs_BN = jnp.where(valid_BHW, pairs_BHW, count**2).reshape(len(pairs_BHW), -1)
        counts_BN = jax.vmap(lambda pairs: jnp.bincount(pairs, length=count**2 + 1))(pairs_BN)
        return {_CONFUSION: counts_BN[:, :-1].reshape(-1, count, count)}

    def overall(self, means: Mapping[str, Any]) -> dict[str, float]:
        """From the pixels of all images together; a class that is neither there nor predicted counts nowhere.

        miou: mean over the classes of the IoU, the pixels that are rightly of a class over those that are or should
        be; pixel_accuracy: share of right pixels; mean_accuracy: mean over the classes of the share of their pixels
        that are right; iou_CLASS.
        """
        others = dict(means)
        confusion = np.asarray(others.pop(_CONFUSION), np.float64)
        right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: not there
            ious, accuracies = right / (true + predicted - right), right / true
            accuracy = right.sum() / confusion.sum()
        return {
            "miou": _mean(ious),
            "pixel_accuracy": accuracy,
            "mean_accuracy": _mean(accuracies),
            **{f"iou_{name}": iou for name, iou in zip(self.classes, ious, strict=True) if np.isfinite(iou)},
            **others,
        }

    def read(self, content: bytes) -> np.ndarray:
        """An indexed or grey PNG, one label a pixel."""
        image = open_image(content)
        if image.mode not in ("P", "L") and not is_16_bit_grey(image):
            raise ValueError(
                f"labels must be an indexed or grey picture, one number a pixel, but Pillow reads mode {image.mode!r}; "
                "write the numbers of the classes, not their colours"
            )
        labels = np.asarray(image).astype(np.int64)
        numbers = labels - self.first_label
        ignored = (labels == IGNORED) | (numbers < 0)
        if (beyond := labels[~ignored & (numbers >= self.channels)]).size:
            raise ValueError(
                f"label {beyond.max()} is beyond the {self.channels} classes, {self.first_label} to "
                f"{self.first_label + self.channels - 1}; name all classes, or write {IGNORED} where there is none"
            )
        return np.where(ignored, IGNORED, numbers).astype(np.float32)

    def write(self, target: str | Path, map_: np.ndarray) -> None:
        """TARGET_semantic.png, indexed, and TARGET_semantic.json, the names of the classes."""
        save_png(f"{target}_semantic.png", map_.astype(np.uint8), palette())
        paths.write_text(f"{target}_semantic.json", json.dumps(list(self.classes)))

    def tiles(self, maps: Sequence[np.ndarray]) -> list[Tile]:
        colors, tiles = palette(), []
        for map_ in (map_.astype(np.uint8) for map_ in maps):
            labels, counts = np.unique(map_[map_ < self.channels], return_counts=True)
            most = sorted(labels[np.argsort(-counts)][:_NAMED])
            tiles.append(Tile(colors[map_], {}, "", {self.classes[i]: colors[i] for i in most}))
        return tiles


def _names(file: Path) -> list[str]:
    try:
        names = json.loads(paths.read(file))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); write the list of the classes' names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{file} holds {names!r:.80}; write the list of the classes' names, in the order of the labels"
        )
    return names


def palette() -> np.ndarray:
    """uint8[256,3]: the colours of the classes; grey of 255."""
    colors = [colorsys.hsv_to_rgb(i * _GOLDEN % 1, (0.85, 0.5)[i % 2], (1.0, 0.75, 0.5)[i % 3]) for i in range(IGNORED)]
    return np.array([*(np.round(255 * np.array(colors))), _GREY]).astype(np.uint8)


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN where none is."""
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if numbers.size else np.nan
