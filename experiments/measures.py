"""What the tables measure beside the evaluation of a run: holes of the sensor, and what bins reconstruct."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aitok_jax import checkpoint, evaluators, tasks
from aitok_jax.data import pipeline
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.tasks.base import Batch, Tree, compiled_predict

EXACT = "test_exact.txt"  # list of the test scenes with the depth that the sensor did not lose


@dataclasses.dataclass(frozen=True)
class BinsTask:
    """A map to bins and back: what a solver that predicts every bin would reach."""

    evaluator: ClassVar[str] = "depth"

    tokenizer: BinsTokenizer
    eval_crop: tuple[int, int, int, int] | None
    max_depth: float

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        codes = self.tokenizer.apply({}, batch["depth"][..., None], method="encode")
        return {"depth": self.tokenizer.apply({}, codes, method="decode")[..., 0]}


def measure(config: ConfigDict, weights: Path, scenes: Path) -> dict[str, float]:
    """Further metrics of a run of depth; {} for others.

    Args:
      config: of the run.
      weights: its directory.
      scenes: folder of the built-in scenes; where the run does not read them, holes are not known.
    Returns:
      NAME/rmse_in_holes: metres, root mean square per image over the pixels that the sensor lost, averaged over the
      images that have any. With bins also depth_tokenizer/…, metrics of maps turned to bins and back.
    """
    if config.name not in ("depth", "depth_tokenizer"):
        return {}
    task, data, metrics = tasks.build(config.task), pipeline.build(config.data), {}
    if isinstance(task.tokenizer, BinsTokenizer):
        bins = BinsTask(task.tokenizer, task.eval_crop, task.max_depth)
        size = config.eval_batch_size
        metrics |= evaluators.evaluate(bins, {}, {}, data, batch_size=size, prefix="depth_tokenizer", progress=False)
    if Path(config.data.root) == scenes:
        _, variables = checkpoint.load_inference(weights)
        metrics[f"{config.name}/rmse_in_holes"] = rmse_in_holes(task, variables, config)
    return metrics


def write_exact_list(scenes: Path) -> None:
    """Beside test.txt, the same images with the depth that the sensor did not lose."""
    (scenes / EXACT).write_text((scenes / "test.txt").read_text().replace("/sync_depth_", "/exact_depth_"))


def rmse_in_holes(task: Any, variables: Tree, config: ConfigDict) -> float:
    """See `measure`; `variables` are {'params', 'model_state'}."""
    exact = ConfigDict(config.data.to_dict())
    exact.test_list = EXACT
    sensor, exact = (pipeline.build(data) for data in (config.data, exact))
    sizes = {"batch_size": config.eval_batch_size}
    pairs = zip(
        pipeline.eval_batches(sensor.eval, sensor.eval_transform, **sizes),
        pipeline.eval_batches(exact.eval, exact.eval_transform, **sizes),
        strict=True,
    )
    predict, errors = compiled_predict(task), []
    for batch, true in pairs:
        depth = predict(variables["params"], variables["model_state"], batch)["depth"]
        errors += list(_errors(depth, batch["depth"], true["depth"])[batch["mask"] > 0])
    return float(np.nanmean(errors))


def _errors(depth_BHW: jax.Array, sensor_BHW: Any, exact_BHW: Any) -> np.ndarray:
    """f32[B], nan where the sensor lost no pixel."""
    holes_BHW = (sensor_BHW == 0) & (exact_BHW > 0)
    squares = jnp.sum(jnp.where(holes_BHW, (depth_BHW - exact_BHW) ** 2, 0), (1, 2))
    return np.asarray(jnp.sqrt(squares / jnp.sum(holes_BHW, (1, 2))))
