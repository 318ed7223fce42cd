"""Evaluation of a mask tokenizer: every ground-truth mask to tokens and back, measured as AP."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from pycocotools import mask as coco_mask

from aitok_jax import paths, visualize
from aitok_jax.evaluators.average_precision import CocoScorer, names_of
from aitok_jax.evaluators.batches import Evaluation, to_host
from aitok_jax.image import save_png
from aitok_jax.tasks import paste

CANVAS_GREY = 128
KINDS_OF_MASKS = ("mask", "boundary")


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Measures how well the masks of `data.eval` survive the tokenizer.

    Each reconstructed crop is pasted back into its box, thresholded at 1/2 and scored 1 in the category of its
    annotation; AP is over all images of the ground truth, so that an annotated object without an example counts as a
    miss. There is no baseline without an image. Pictures are of the first images that have masks.

    Args:
        evaluation: the output of its `part`, `instance` f32[B,S,S] in 0..1, is the crop after tokenizing and
            detokenizing. `data.eval` has `source.coco` (pycocotools) and, for each example, `annotations` (COCO's
            entries) and `boxes` [n,4] (x1 y1 x2 y2: the box, in pixels of the image, that the crop was cut at).
    Returns:
        `prefix/mask_ap`, `prefix/boundary_ap` and the others of `CocoScorer.result`, and `prefix/mask_iou`, the mean
        over the examples of the IoU of a mask with its reconstruction.
    """
    source = evaluation.data.eval
    coco = source.source.coco
    results = {image_id: [] for image_id in sorted(coco.imgs)}
    overlaps = []
    for batch, outputs in evaluation.run():
        rows = to_host({"id": batch["id"], "mask": batch["mask"], "instance": outputs["instance"]})
        for row in np.flatnonzero(rows["mask"] > 0):
            index = int(rows["id"][row])
            annotation = source.annotations[index]
            result, overlap = _measure(rows["instance"][row], source.boxes[index], annotation, coco)
            results[annotation["image_id"]] += result
            overlaps.append(overlap)
    scorer = CocoScorer.of(coco, [result for its_results in results.values() for result in its_results])
    if evaluation.panels_dir is not None:
        _write_panels(coco, results, paths.expand(evaluation.panels_dir), evaluation.panels)
    return evaluation.named(scorer.result(KINDS_OF_MASKS) | {"mask_iou": float(np.mean(overlaps))})


def metric_names(part: Any) -> list[str]:
    """What `evaluate` measures of every part of this kind."""
    del part
    return [*names_of(KINDS_OF_MASKS), "mask_iou"]


def _measure(crop_SS, box_4, annotation, coco) -> tuple[list[dict[str, Any]], float]:
    """COCO results of one reconstructed mask (none where its box is empty) and its IoU with the annotation."""
    x1, y1, x2, y2 = (float(v) for v in box_4)
    if not (x1 < x2 and y1 < y2):
        return [], 0.0
    image = coco.imgs[annotation["image_id"]]
    segmentation = paste.paste_rle(np.asarray(crop_SS), box_4, image["height"], image["width"])
    result = {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": 1.0,
        "segmentation": segmentation,
    }
    return [result], float(coco_mask.iou([segmentation], [coco.annToRLE(annotation)], [0])[0, 0])


def _write_panels(coco, results, folder: Path, panels: int) -> None:
    """Writes the pictures of the first images: annotated masks beside their reconstructions (on the first host)."""
    if jax.process_index() != 0:
        return
    category_ids = sorted(coco.cats)
    categories = [coco.cats[category]["name"] for category in category_ids]
    for image_id in [i for i, its_results in results.items() if its_results][:panels]:
        image = coco.imgs[image_id]
        annotations = [a for a in coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        truth = [{**a, "score": 1.0, "segmentation": coco.annToRLE(a)} for a in annotations]
        shown = paste.from_results(results[image_id], category_ids)
        picture = visualize.objects_panel(
            np.full((image["height"], image["width"], 3), CANVAS_GREY, np.uint8),
            shown["boxes"],
            shown["classes"],
            None,
            shown["masks"],
            categories,
            truth=paste.from_results(truth, category_ids),
            title=image["file_name"],
        )
        save_png(folder / visualize.png_name(image["file_name"]), picture)
