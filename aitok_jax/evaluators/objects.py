"""Evaluation of objects: box, mask and boundary AP with pycocotools."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from aitok_jax import paths, visualize
from aitok_jax.evaluators.average_precision import KINDS, CocoScorer, names_of
from aitok_jax.evaluators.batches import Evaluation, to_host
from aitok_jax.image import save_png
from aitok_jax.tasks import paste

PANEL_SCORE = 0.3
"""Objects below this score are left out of the pictures, not of the numbers."""


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Evaluates a detector, or an instance segmenter, on all images of `data.eval`.

    The predicted objects are brought back to the original images (`paste.to_results`) as the batches come; masks are
    kept as RLE. There is no baseline without an image.

    Args:
        evaluation: outputs of its `part` are `boxes` f32[B,N,4] x1 y1 x2 y2 in pixels of the input, `classes`
            int32[B,N], `scores` f32[B,N], `valid` bool[B,N] and, for instances, `masks` f32[B,N,S,S]. Its `data` gives
            batches with `id`, `mask`, `scale` f32[B,2] and `original_size` int32[B,2], and `data.eval` has `coco`
            (pycocotools), `ids` (COCO's image id of each example), `category_ids` and `categories` (names) of each
            class, and for the pictures `names`, `read`.
    Returns:
        `prefix/box_ap`, `prefix/box_ap50` and so on as in `CocoScorer.result`; where the task predicts masks, also
        `prefix/mask_...` and `prefix/boundary_...`; `prefix/images_left_out`, the number of images that could not be
        read, where there are any (on_error='skip').
    Raises:
        ValueError: as `CocoScorer.add`.
    """
    source = evaluation.data.eval
    scorer = CocoScorer(source.coco, source.ids)
    with_masks = False
    for batch, outputs in evaluation.run():
        about, outputs = to_host(({name: batch[name] for name in ("id", "mask", "scale", "original_size")}, outputs))
        with_masks = "masks" in outputs
        for row in np.flatnonzero(about["mask"] > 0):
            index = int(about["id"][row])
            objects = {name: values[row] for name, values in outputs.items()}
            scale, size = about["scale"][row], about["original_size"][row]
            results = paste.to_results(objects, source.ids[index], source.category_ids, scale, size)
            scorer.add(source.ids[index], results)
            if evaluation.panels_dir is not None and index < evaluation.panels:
                _write_panel(results, source, index, paths.expand(evaluation.panels_dir), with_masks)
    left_out = scorer.leave_out_missing()
    numbers = scorer.result(tuple(KINDS) if with_masks else ("box",))
    if left_out:
        numbers["images_left_out"] = float(left_out)
    return evaluation.named(numbers)


def metric_names(part: Any) -> list[str]:
    """What `evaluate` measures of every part of this kind."""
    return names_of(tuple(KINDS) if part.mask_tokens else ("box",))


def _write_panel(results, source, index: int, folder: Path, with_masks: bool) -> None:
    """Writes the picture of one image (on the first host)."""
    if jax.process_index() != 0:
        return
    shown = paste.from_results([r for r in results if r["score"] >= PANEL_SCORE], source.category_ids)
    example, name = source.read(index), source.names[index]
    parts = ("boxes", "classes", "masks") if with_masks else ("boxes", "classes")
    picture = visualize.objects_panel(
        example["image"],
        shown["boxes"],
        shown["classes"],
        shown["scores"],
        shown.get("masks"),
        source.categories,
        truth={part: example[part] for part in parts},
        title=name,
    )
    save_png(folder / visualize.png_name(name), picture)
