"""Depth evaluation: metrics per image, averaged over the data set (AIT.md section 8)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aitok_jax import visualize
from aitok_jax.data.sources import nyu
from aitok_jax.evaluators import metrics
from aitok_jax.evaluators.batches import Mean, run_evaluation, to_host
from aitok_jax.tasks.base import compiled_predict


def evaluate(
    task: Any,
    params: Any,
    model_state: Any,
    data: Any,
    *,
    batch_size: int,
    prefix: str,
    mesh: Mesh | None = None,
    baseline: bool = False,
    panels_dir: str | Path | None = None,
    panels: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """Evaluates a depth predictor on `data.eval`.

    Each of `metrics.DEPTH_METRICS` is computed per image, over the pixels with 1e-3 < depth < `task.max_depth` inside
    `task.eval_crop`, and averaged over the images. The result is the same for any batch size, mesh and number of hosts.

    Args:
        task: has `predict`, whose maps are `depth` f32[B,H,W] in metres and, optionally, `confidence` f32[B,H,W];
            `eval_crop` (rows and columns as in `metrics.EIGEN_CROP`, or None) and `max_depth` in metres.
        params, model_state: what `task.predict` takes.
        data: has `eval` and `eval_transform` for `pipeline.eval_batches`; for the baseline also `train`.
        batch_size: images a step, over all hosts.
        prefix: first part of the metrics' names.
        mesh: spreads the batches over its devices; None runs where `params` lie.
        baseline: also measure, as `baseline/...`, the prediction that sees no image: the mean depth map of
            `data.train` (resized where the evaluation maps have another size). Left out where `data.train` is None.
        panels_dir: folder for pictures of the first `panels` images, NAME.png with '/' in names replaced by '_'.
        progress: show a progress bar.
    Returns:
        `prefix/rmse` and so on; `prefix/confidence_spearman` (`metrics.confidence_spearman`, averaged) where there is
        a confidence; `prefix/images_without_depth`, the number of images left out because they have no valid pixel,
        where there are any.
    Raises:
        ValueError: the crop does not fit the images, or no image has a valid pixel.
    """
    predict = compiled_predict(task)
    baseline_HW = nyu.mean_depth_map(data.train) if baseline and data.train is not None else None

    def step(batch):
        outputs = predict(params, model_state, batch)
        _check_crop(task.eval_crop, batch["depth"].shape[1:])
        return outputs, _measure(outputs, batch, baseline_HW, crop=task.eval_crop, max_depth=task.max_depth)

    means: dict[str, Mean] = {}
    seen, without_depth = 0, 0
    steps = run_evaluation(step, data, batch_size=batch_size, mesh=mesh, label=prefix, progress=progress)
    for batch, (outputs, rows) in steps:
        rows = to_host(rows)
        real = rows["mask"] > 0
        for part, columns in rows["metrics"].items():
            means.setdefault(part, Mean()).add(columns, real & rows["has_depth"])
        if panels_dir is not None and seen < panels:
            _write_panels(to_host((batch, outputs)), data.eval.names, Path(panels_dir), panels)
        seen += int(real.sum())
        without_depth += int((real & ~rows["has_depth"]).sum())
    if without_depth == seen:
        raise ValueError(
            f"none of the {seen} evaluation images has a pixel with 0.001 < depth < {task.max_depth} m inside "
            f"eval_crop={task.eval_crop}; check that the depth maps are in metres, and the crop"
        )
    result = means["model"].result(prefix)
    if "baseline" in means:
        result |= means["baseline"].result("baseline")
    if without_depth:
        result[f"{prefix}/images_without_depth"] = float(without_depth)
    return result


@functools.partial(jax.jit, static_argnames=("crop", "max_depth"))
def _measure(outputs, batch, baseline_HW, *, crop, max_depth):
    """Columns of per-image numbers [B], with `mask` and `has_depth` to select rows by."""
    depth = batch["depth"]
    options = {"crop": crop, "max_depth": max_depth}
    columns = {"model": metrics.depth_metrics(outputs["depth"], depth, **options)}
    if "confidence" in outputs:
        quality = metrics.confidence_spearman(outputs["confidence"], outputs["depth"], depth, **options)
        columns["model"]["confidence_spearman"] = quality
    if baseline_HW is not None:
        constant = jax.image.resize(baseline_HW, depth.shape[1:], "linear")
        constant = jnp.broadcast_to(constant[None], depth.shape)
        columns["baseline"] = metrics.depth_metrics(constant, depth, **options)
    has_depth = metrics.valid_pixels(depth, **options).any(axis=(1, 2))
    return {"metrics": columns, "mask": batch["mask"], "has_depth": has_depth}


def _check_crop(crop, shape):
    if crop is None:
        return
    top, bottom, left, right = crop
    if not (0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]):
        raise ValueError(
            f"eval_crop={tuple(crop)} does not fit evaluation images of {shape[0]}x{shape[1]}; "
            "give (first row, row end, first column, column end) inside them, or None to measure everywhere"
        )


def _write_panels(arrays, names, folder: Path, panels: int) -> None:
    """Writes the pictures of those rows that are among the first `panels` examples (on the first host)."""
    if jax.process_index() != 0:
        return
    batch, outputs = arrays
    for row in np.flatnonzero((batch["mask"] > 0) & (batch["id"] < panels)):
        name = names[int(batch["id"][row])]
        confidence = outputs["confidence"][row] if "confidence" in outputs else None
        picture = visualize.depth_panel(
            batch["image"][row], outputs["depth"][row], truth=batch["depth"][row], confidence=confidence, title=name
        )
        visualize.save_png(folder / visualize.png_name(name), picture)
