"""Evaluation of dense maps: a modality's metrics per image, averaged over the data set."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax import paths, visualize
from aitok_jax.data import pipeline
from aitok_jax.data.sources.files import READ_ERRORS, DataError
from aitok_jax.evaluators.batches import Evaluation, Mean, to_host
from aitok_jax.evaluators.metrics import confidence_spearman, inside
from aitok_jax.image import nearest, save_png
from aitok_jax.tasks.modalities import Modality


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Evaluates a predictor of maps on `data.eval`.

    Each of the modality's metrics is computed per image, over the pixels that it measures inside `part.eval_crop`, and
    averaged over the images; `Modality.overall` makes the numbers of these. The baseline is the mean map of
    `data.train`, resized where the evaluation maps have another size; left out where `data.train` is None.

    Args:
        evaluation: its `part` has `modality` and `eval_crop` (rows and columns as in `metrics.inside`); its outputs are
            the map under the modality's name and, optionally, `confidence` f32[B,H,W].
    Returns:
        `prefix/METRIC`; `prefix/confidence_spearman` (averaged) where there is a confidence; `baseline/METRIC`;
        `prefix/images_without_NAME`, the number of images left out because they have no valid pixel, where there are
        any.
    Raises:
        ValueError: the crop does not fit the images, or no image has a valid pixel.
    """
    part, data = evaluation.part, evaluation.data
    modality = part.modality
    constant = mean_map(data.train, modality) if evaluation.baseline and data.train is not None else None

    def measured(batch, outputs):
        return outputs, _measure(outputs, batch, constant, modality=modality, crop=part.eval_crop)

    means: dict[str, Mean] = {}
    seen, without = 0, 0
    for batch, (outputs, rows) in evaluation.run(measured):
        rows = to_host(rows)
        real = rows["mask"] > 0
        for kind, columns in rows["metrics"].items():
            means.setdefault(kind, Mean()).add(columns, real & rows["annotated"])
        if evaluation.panels_dir is not None and seen < evaluation.panels:
            _write_panels(to_host((batch, outputs)), evaluation)
        seen += int(real.sum())
        without += int((real & ~rows["annotated"]).sum())
    if without == seen:
        raise _nothing_measured(part, seen)
    numbers = {kind: _floats(modality.overall(mean.result())) for kind, mean in means.items()}
    result = numbers["model"]
    if without:
        result[f"images_without_{modality.name}"] = float(without)
    baseline = {f"baseline/{name}": value for name, value in numbers.get("baseline", {}).items()}
    return evaluation.named(result) | baseline


def metric_names(part: Any) -> list[str]:
    """What `evaluate` measures of every part of this kind."""
    modality, size = part.modality, (1, 8, 8)
    map_, valid = jax.ShapeDtypeStruct((*size, *modality.map_axes), np.float32), jax.ShapeDtypeStruct(size, bool)
    columns = jax.eval_shape(modality.metrics, map_, map_, valid)
    names = modality.overall({name: np.zeros(column.shape[1:]) for name, column in columns.items()})
    return [*names, *(["confidence_spearman"] if "confidence" in part.meanings else [])]


def check_data(part: Any, data: Any) -> None:
    """ValueError where no map of the data, to train or to evaluate on, has a pixel that counts; looks until one has.

    Also where the first evaluation map does not hold the crop.
    """
    modality = part.modality
    if not any(np.any(modality.measured(map_)) for map_ in _maps(data.train, modality)):
        raise DataError(
            f"none of the {len(data.train)} training images has a pixel of {modality.name} to learn from; check the "
            "unit and the folder of the maps"
        )
    for batch in pipeline.eval_batches(data.eval, data.eval_transform, batch_size=1):
        map_ = batch[modality.name]
        if batch["mask"][0] and np.any(modality.measured(map_) & inside(part.eval_crop, *map_.shape[1:3])[None]):
            return
    raise _nothing_measured(part, len(data.eval))


def _maps(source: Any, modality: Modality) -> Iterator[np.ndarray]:
    """All maps that can be read, f32[1,H,W,...]; raises for others but under on_error='skip'."""
    for index in range(len(source)):
        try:
            yield source.read(index)[modality.name][None]
        except READ_ERRORS:
            if getattr(source, "on_error", "raise") == "raise":
                raise


def _floats(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}


def _nothing_measured(part: Any, count: int) -> ValueError:
    return ValueError(
        f"none of the {count} evaluation images has a pixel to measure {part.modality.name} on inside eval_crop="
        f"{part.eval_crop}; check the unit of the maps, and the crop"
    )


@functools.partial(jax.jit, static_argnames=("modality", "crop"))
def _measure(outputs, batch, constant, *, modality, crop):
    """Columns of per-image numbers [B], with `mask` and `annotated` to select rows by."""
    truth, prediction = batch[modality.name], outputs[modality.name]
    height, width = truth.shape[1:3]
    valid_BHW = modality.measured(truth) & inside(crop, height, width)[None]
    columns = {"model": modality.metrics(prediction, truth, valid_BHW)}
    if "confidence" in outputs:
        error_BHW = modality.error(prediction, truth)
        columns["model"]["confidence_spearman"] = confidence_spearman(outputs["confidence"], error_BHW, valid_BHW)
    if constant is not None:
        raw = jax.image.resize(constant, (1, height, width, constant.shape[-1]), "linear")
        map_ = jnp.broadcast_to(modality.finish(raw), truth.shape)
        columns["baseline"] = modality.metrics(map_, truth, valid_BHW)
    return {"metrics": columns, "mask": batch["mask"], "annotated": valid_BHW.any(axis=(1, 2))}


def mean_map(source: Any, modality: Modality) -> np.ndarray:
    """f32[1,H,W,channels]: at each pixel the mean of what is annotated, as the VQ-VAE sees it.

    Pixels that no example annotates get the mean of all annotated values; maps of other sizes than the first are
    brought to its size.

    Args:
        source: of maps; broken examples are left out under on_error='skip'.
    """
    total = count = np.float64(0)
    for map_ in _maps(source, modality):
        values, valid = np.asarray(modality.encode(map_), np.float64), np.asarray(modality.valid(map_))[..., None]
        if np.ndim(total) and values.shape != total.shape:
            values, valid = (nearest(x[0], *total.shape[1:3])[None] for x in (values, valid))
        total, count = total + np.where(valid, values, 0.0), count + valid
    if not np.any(count):
        raise DataError(f"no annotated pixel in any map of {modality.name}; a mean map needs some")
    overall = total.sum((0, 1, 2)) / count.sum()
    return np.where(count > 0, total / np.maximum(count, 1), overall).astype(np.float32)


def _write_panels(arrays: tuple, evaluation: Evaluation) -> None:
    """Writes the pictures of those rows that are among the first `panels` examples (on the first host)."""
    if jax.process_index() != 0:
        return
    (batch, outputs), modality = arrays, evaluation.part.modality
    for row in np.flatnonzero((batch["mask"] > 0) & (batch["id"] < evaluation.panels)):
        name = evaluation.data.eval.names[int(batch["id"][row])]
        picture = visualize.map_panel(
            modality,
            batch["image"][row],
            outputs[modality.name][row],
            truth=batch[modality.name][row],
            confidence=outputs["confidence"][row] if "confidence" in outputs else None,
            title=name,
        )
        save_png(paths.expand(evaluation.panels_dir) / visualize.png_name(name), picture)
