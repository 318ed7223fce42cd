"""Pairs of images and maps of a modality, prepared; those of depth, NYUv2 among them, as 16-bit PNGs."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from aitok_jax.config import build_dataclass
from aitok_jax.data.preparation.builder import Example, Line, PreparedBuilder
from aitok_jax.data.sources import prepared
from aitok_jax.data.sources.files import DataError, File, digest, read_file
from aitok_jax.data.sources.pairs import decode_pair
from aitok_jax.tasks.modalities import MODALITIES
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tasks.modalities.depth_files import png_values


class NyuPairs(PreparedBuilder, skip_registration=True):
    """Encoded images, and 16-bit depth PNGs, in millimetres where no scale was given; both are bytes as they were.

    Depth that came in another format is written as such a PNG.
    """

    def _info(self):
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pairs of an RGB image and a depth map in millimetres, 0 = missing.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def load(self):
        return load


class MapPairs(PreparedBuilder, skip_registration=True):
    """Encoded images and maps, both bytes as they were; `modality` and `name` are those of a subclass."""

    modality: str

    def _info(self):
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            self.modality: tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Pairs of an RGB image and the file of a {self.modality} map.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def load(self):
        return load_map


def builder(modality: str) -> type[PreparedBuilder]:
    """Of the pairs of a modality."""
    if modality == Depth.name:
        return NyuPairs
    members = {"modality": modality, "name": prepared.name_of(modality), "__module__": __name__}
    return type("Pairs", (MapPairs,), members, skip_registration=True)


def load_map(line: Line) -> tuple[Example, Line]:
    """From the paths `image` and, by its name, the map of the `modality` with these `fields`.

    Without the latter, from the map that tells it, whose fields are `source_fields`, and the camera's `fov`.
    """
    name, image = line["modality"], read_file(line["image"])
    modality = build_dataclass(MODALITIES[name], line["fields"])
    if name in line:
        map_ = read_file(line[name])
    else:
        told = read_file(line[modality.source])
        source = build_dataclass(MODALITIES[modality.source], line["source_fields"])
        map_ = File(told.name, modality.derived(decode_pair(source, told, image)[source.name], line["fov"]))
    decode_pair(modality, map_, image)
    return {"image": image.content, name: map_.content}, {"image": digest(image.content), name: digest(map_.content)}


def load(line: Line) -> tuple[Example, Line]:
    """From the paths `image` and `depth`, and the `scale` of depth files."""
    image, depth = read_file(line["image"]), read_file(line["depth"])
    map_ = decode_pair(Depth(file_scale=line["scale"]), depth, image)["depth"]
    hashes = {"image": digest(image.content), "depth": digest(depth.content)}
    content = depth.content if depth.content.startswith(b"\x89PNG") else _png(depth.name, map_, line["scale"])
    return {"image": image.content, "depth": content}, hashes


def _png(name: str, map_: np.ndarray, scale: float) -> bytes:
    content = io.BytesIO()
    try:
        Image.fromarray(png_values(map_, scale)).save(content, format="PNG")
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    return content.getvalue()
