"""Small folders of images with an instances JSON, as the COCO readers take them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from aitok_jax.data.sources import coco

HEIGHT, WIDTH = 30, 40
BOX_MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
BOX_MASK[5:15, 20:32] = 1
CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 2, "name": "dog"}]


def polygon(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def annotation(number, image_id=1, category_id=7, box=(20, 5, 32, 15), **changes):
    x1, y1, x2, y2 = box
    values = {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": [polygon(*box)]}
    values |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
    return {**values, **changes}


def counts(mask):
    """Uncompressed: the lengths of the runs, column by column, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def write(root, annotations, images=2, categories=CATEGORIES, size=(HEIGHT, WIDTH)):
    """A folder of noise images, numbered from 1, with an instances JSON; returns the arguments of CocoSource."""
    root = Path(root)
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(1, images + 1):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{i:012}.jpg")
    entries = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": size[0], "width": size[1]} for i in range(1, images + 1)
    ]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root / "images", root / "instances.json"


def make(tmp_path, annotations, images=2, **options):
    return coco.CocoSource(*write(tmp_path, annotations, images), **options)
