"""What the tables measure beside the evaluation of a run: holes of the sensor, and what bins reconstruct."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from aitok_jax import evaluators, tasks
from aitok_jax.config import ordered
from aitok_jax.data import datasets, pipeline
from aitok_jax.evaluators.batches import Evaluation
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.parallel import sharding
from aitok_jax.tasks.base import Batch, Tree
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.training import checkpoint

EXACT = "test_exact.txt"  # list of the test scenes with the depth that the sensor did not lose


@dataclasses.dataclass(frozen=True)
class BinsPart:
    """A map to bins and back: what a solver that predicts every bin would reach."""

    kind: ClassVar[str] = "maps"

    modality: Depth
    tokenizer: BinsTokenizer
    eval_crop: tuple[int, int, int, int] | None

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
    (part,), data, metrics = tasks.build(config.task).parts.values(), datasets.build(config.data), {}
    if isinstance(part.tokenizer, BinsTokenizer):
        bins = BinsPart(part.modality, part.tokenizer, part.eval_crop)
        size = config.eval_batch_size
        metrics |= evaluators.evaluate(bins, {}, {}, data, batch_size=size, prefix="depth_tokenizer", progress=False)
    if Path(config.data.root) == scenes:
        without_holes = ordered(config.data)
        without_holes.test_list = EXACT
        exact, (_, variables) = datasets.build(without_holes), checkpoint.load_inference(weights)
        error = rmse_in_holes(part, variables, data, exact, config.eval_batch_size)
        metrics[f"{config.name}/rmse_in_holes"] = error
    return metrics


def write_exact_list(scenes: Path) -> None:
    """Beside test.txt, the same images with the depth that the sensor did not lose."""
    (scenes / EXACT).write_text((scenes / "test.txt").read_text().replace("/sync_depth_", "/exact_depth_"))


def rmse_in_holes(part: Any, variables: Tree, sensor: datasets.Data, exact: datasets.Data, batch_size: int) -> float:
    """See `measure`: of predictions from `sensor`, which has holes, against `exact`, which has none."""
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.state_shardings(variables, mesh))
    errors, options = [], {"batch_size": batch_size, "prefix": "holes", "mesh": mesh, "progress": False}
    steps = Evaluation(part, variables["params"], variables["model_state"], sensor, **options).run()
    truths = pipeline.eval_batches(exact.eval, exact.eval_transform, batch_size=batch_size)
    for (batch, outputs), truth in zip(steps, truths, strict=True):
        maps = map(np.asarray, (outputs["depth"], batch["depth"], truth["depth"]))
        errors += list(_errors(*maps)[np.asarray(batch["mask"]) > 0])
    return float(np.nanmean(errors))


def _errors(depth_BHW: np.ndarray, sensor_BHW: np.ndarray, exact_BHW: np.ndarray) -> np.ndarray:
    """f32[B], nan where the sensor lost no pixel."""
    holes_BHW = (sensor_BHW == 0) & (exact_BHW > 0)
    squares = np.sum((depth_BHW - exact_BHW) ** 2, axis=(1, 2), where=holes_BHW)
    count = holes_BHW.sum((1, 2))
    return np.sqrt(np.where(count, squares / np.maximum(count, 1), np.nan))
