"""NYUv2 and other pairs of images and depth maps, prepared."""

import numpy as np
import tensorflow_datasets as tfds

from aitok_jax.data.preparation.builder import Example, Line, PreparedBuilder
from aitok_jax.data.sources.files import digest, read_file
from aitok_jax.data.sources.pairs import decode_pair
from aitok_jax.tasks.modalities.depth import Depth


class NyuPairs(PreparedBuilder, skip_registration=True):
    """Encoded images and 16-bit depth PNGs in millimetres, bytes as they were."""

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
    """From the paths `image` and `depth`."""
    image, depth = read_file(line["image"]), read_file(line["depth"])
    decode_pair(Depth(), depth, image)
    hashes = {"image": digest(image.content), "depth": digest(depth.content)}
    return {"image": image.content, "depth": depth.content}, hashes
