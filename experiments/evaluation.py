"""Time and memory of COCO evaluation on made-up objects: the case `coco_evaluation` of `benchmark.py`.

Images of 640x480 with as many objects, and of such sizes, as COCO's: 7.3 an image, each side about a fifth of the
image's, from a hundredth to all of it; a mask is an ellipse in its box. Every image has 100 results, of which those
that are not an annotated object, moved a little, are anywhere.
"""

import contextlib
import functools
import io
import time
from typing import Any

import numpy as np
import roofline
from pycocotools.coco import COCO

from aitok_jax.evaluators.average_precision import CocoScorer
from aitok_jax.tasks import paste

HEIGHT, WIDTH, MASK = 480, 640, 64
CLASSES, RESULTS, OBJECTS = 80, 100, 7.3


def measure(images: int) -> dict[str, Any]:
    """Milliseconds an image of pasting and RLE, seconds of box and mask AP over all, and the peak memory."""
    rng = np.random.default_rng(0)
    annotations = [_objects(rng, 1 + rng.poisson(OBJECTS - 1)) for _ in range(images)]
    coco, ids = _coco(annotations), list(range(images))
    scorer, category_ids = CocoScorer(coco, ids), list(range(1, CLASSES + 1))
    spent = 0.0
    for image_id, annotated in enumerate(annotations):
        predicted = _predicted(rng, annotated)
        started = time.perf_counter()
        results = paste.to_results(predicted, image_id, category_ids, np.ones(2), np.array([HEIGHT, WIDTH]))
        spent += time.perf_counter() - started
        scorer.add(image_id, results)
    started = time.perf_counter()
    numbers = scorer.result(("box", "mask"))
    return {
        "images": images,
        "results_per_image": RESULTS,
        "paste_and_rle_ms_per_image": 1e3 * spent / images,
        "average_precision_s": time.perf_counter() - started,
        "mask_ap": numbers["mask_ap"],
        "peak_memory": roofline.peak_memory(),
    }


def _objects(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    sides = np.clip(np.exp(rng.normal(np.log(0.2), 0.9, (count, 2))), 0.01, 1) * [WIDTH, HEIGHT]
    corners = rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides)
    return {"boxes": np.concatenate([corners, corners + sides], 1), "classes": rng.integers(0, CLASSES, count)}


def _predicted(rng: np.random.Generator, annotated: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    other = _objects(rng, RESULTS - len(annotated["classes"]))
    near = annotated["boxes"] + rng.normal(0, 4, annotated["boxes"].shape)
    boxes = np.concatenate([near, other["boxes"]]).astype(np.float32)
    return {
        "boxes": boxes,
        "classes": np.concatenate([annotated["classes"], other["classes"]]).astype(np.int32),
        "scores": np.linspace(1, 0.01, RESULTS, dtype=np.float32),
        "masks": np.broadcast_to(_ellipse(), (RESULTS, MASK, MASK)),
        "valid": np.ones(RESULTS, bool),
    }


@functools.cache
def _ellipse() -> np.ndarray:
    y, x = (np.mgrid[:MASK, :MASK] + 0.5) / MASK * 2 - 1
    return (x**2 + y**2 < 1).astype(np.float32)


def _coco(annotations: list[dict[str, np.ndarray]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(annotations))],
        "categories": [{"id": c, "name": str(c)} for c in range(1, CLASSES + 1)],
        "annotations": [],
    }
    for image_id, annotated in enumerate(annotations):
        for box, label in zip(annotated["boxes"], annotated["classes"], strict=True):
            (x, y), (w, h) = box[:2].tolist(), (box[2:] - box[:2]).tolist()
            rle = paste.paste_rle(_ellipse(), box.astype(np.float32), HEIGHT, WIDTH)
            coco.dataset["annotations"].append(
                {
                    "id": len(coco.dataset["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, w, h],
                    "area": np.pi / 4 * w * h,
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
