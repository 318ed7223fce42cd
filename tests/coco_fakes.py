"""Ground truths in memory, for the tests of the COCO evaluators."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

SHARED = Path(os.environ.get("AITOK_SHARED_DIR", Path(__file__).parents[2] / "shared"))
CATEGORY_IDS = [3, 7, 90]
NAMES = ["chair", "lamp", "toothbrush"]


def as_coco(content):
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def encode(mask):
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def ellipse(box, height, width):
    """uint8[H,W]: the ellipse that fills the box x1 y1 x2 y2."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
    return inside.astype(np.uint8)


def ground_truth(count=7, seed=0, shape=ellipse):
    """Images of several sizes with 0 to 4 objects; ids neither from 0 nor in order; one crowd region."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i, image_id in enumerate(rng.permutation(count) * 10 + 5):
        height, width = [(60, 80), (72, 54), (64, 64)][i % 3]
        images.append({"id": int(image_id), "file_name": f"set_{i % 2}/{i}.jpg", "height": height, "width": width})
        for k in range(i % 5):
            corner, side = rng.integers(0, 30, 2), rng.integers(12, 24, 2)
            box = [*corner.tolist(), *(corner + side).tolist()]
            mask = shape(box, height, width)
            entry = {
                "id": len(annotations),  # 0 is an id like others
                "image_id": int(image_id),
                "category_id": CATEGORY_IDS[int(rng.integers(3))],
                "bbox": [*box[:2], *side.tolist()],
                "area": float(mask.sum()),
                "iscrowd": int(i == 4 and k == 0),
                "segmentation": encode(mask),
            }
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, NAMES, strict=True)]
    return as_coco({"images": images, "annotations": annotations, "categories": categories})


def perfect_results(coco):
    """The annotated objects as results."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    objects = [a for a in coco.dataset["annotations"] if not a["iscrowd"]]
    return [{key: a[key] for key in keys} | {"score": 0.9} for a in objects]
