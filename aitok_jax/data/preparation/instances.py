"""COCO and other images with instance masks, prepared."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from aitok_jax.data.preparation.builder import Example, Line, PreparedBuilder
from aitok_jax.data.sources import coco
from aitok_jax.data.sources.files import digest


class CocoInstances(PreparedBuilder, skip_registration=True):
    """Encoded images, bytes as they were, with their annotations, masks as compressed run-length codes.

    Args:
      categories: the name of each class, in the order of the category ids.
      **options: see `PreparedBuilder`.
    """

    def __init__(self, *, categories: list[str], **options: Any):
        self._categories = categories
        super().__init__(**options)

    def _info(self):
        objects = {
            "id": np.int64,
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),  # x, y, width, height in pixels
            "label": tfds.features.ClassLabel(names=self._categories),
            "area": np.float32,
            "is_crowd": np.bool_,
            "counts": tfds.features.Text(),  # pycocotools: {"size": [height, width], "counts": …}
        }
        features = {
            "name": tfds.features.Text(),
            "id": np.int64,
            "image": tfds.features.Image(shape=(None, None, 3)),
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images with boxes, classes and instance masks, crowd regions included.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def load(self):
        return load


def load(line: Line) -> tuple[Example, Line]:
    """From `path`, `json`, `entry` (of the JSON's images), `annotations` and the `labels` of those.

    The report holds the annotations with their masks as run-length codes.
    """
    entry, annotations = line["entry"], line["annotations"]
    height, width = entry["height"], entry["width"]
    image = coco.read_image_file(line["path"])
    coco.decode_sized(image, height, width, line["json"])
    coco.decode_masks(annotations, height, width, line["json"])
    coded = [annotation | {"segmentation": _code(annotation, height, width)} for annotation in annotations]
    objects = [
        {
            "id": annotation["id"],
            "bbox": np.array(annotation["bbox"], np.float32),
            "label": label,
            "area": annotation["area"],
            "is_crowd": bool(annotation["iscrowd"]),
            "counts": annotation["segmentation"]["counts"],
        }
        for annotation, label in zip(coded, line["labels"], strict=True)
    ]
    example = {"id": entry["id"], "image": image.content, "objects": objects}
    return example, {"image": digest(image.content), "entry": entry, "annotations": coded}


def _code(annotation: coco.Annotation, height: int, width: int) -> dict[str, Any]:
    counts = coco.run_length_code(annotation["segmentation"], height, width)["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
