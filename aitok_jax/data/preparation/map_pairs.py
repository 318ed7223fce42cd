"""NYUv2 and other pairs of images and depth maps, prepared."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from aitok_jax.data.preparation.builder import Example, Line, PreparedBuilder
from aitok_jax.data.sources.files import DataError, digest, read_file
from aitok_jax.data.sources.pairs import decode_pair
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
