"""What every evaluator needs: running a step over all batches, on any number of devices and hosts, and averaging."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from aitok_jax.command_line.progress import progress_bar
from aitok_jax.data import pipeline
from aitok_jax.parallel import sharding
from aitok_jax.tasks.base import compiled_predict


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how; the numbers are the same for any batch size, mesh and number of hosts.

    Attributes:
        part: has `predict`, and what the evaluator of its kind reads.
        params, model_state: what `part.predict` takes.
        data: has `eval` and `eval_transform` for `pipeline.eval_batches`, and what the evaluator reads.
        batch_size: examples a step, over all hosts.
        prefix: first part of the metrics' names.
        mesh: spreads the batches over its devices; None runs where `params` lie.
        baseline: also measure a prediction that sees no image, where the kind has one.
        panels_dir: folder for pictures of the first `panels` images, NAME.png with '/' in names replaced by '_'.
        progress: show a progress bar.
    """

    part: Any
    params: Any
    model_state: Any
    data: Any
    _: dataclasses.KW_ONLY
    batch_size: int
    prefix: str
    mesh: Mesh | None = None
    baseline: bool = False
    panels_dir: str | Path | None = None
    panels: int = 8
    progress: bool = True

    def run(self, then: Callable[[dict, dict], Any] = lambda batch, outputs: outputs) -> Iterator[tuple[dict, Any]]:
        """(batch, then(batch, what `part.predict` says of it)) for this host's share of every batch."""
        predict, data = compiled_predict(self.part), self.data

        def step(batch):
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                outputs = predict(self.params, self.model_state, batch)
            return then(batch, outputs)

        batches = pipeline.eval_batches(
            data.eval,
            data.eval_transform,
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return run_batches(
            step,
            batches,
            mesh=self.mesh,
            total=pipeline.eval_steps(data.eval, self.batch_size),
            label=self.prefix,
            progress=self.progress,
        )

    def named(self, numbers: Mapping[str, float]) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in numbers.items()}


def run_batches(
    step: Callable[[dict], Any],
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh | None = None,
    total: int | None = None,
    label: str = "",
    progress: bool = True,
) -> Iterator[tuple[dict, Any]]:
    """Yields (batch, step(batch)) for every batch, each after the next one was started, so that devices never wait.

    Args:
        step: a compiled function of one batch.
        batches: this host's batches of NumPy arrays; all hosts must have equally many.
        mesh: spreads every batch over its devices; None leaves placing to `step`.
        total, label, progress: number of batches, name and presence of the progress bar (first host only).
    """
    hidden = not progress or jax.process_index() != 0
    with progress_bar(total=total, desc=label, unit="batch", disable=hidden, leave=False) as bar:
        waiting = None
        for batch in batches:
            if mesh is not None:
                batch = sharding.shard_batch(batch, mesh)
            started = batch, step(batch)
            if waiting is not None:
                yield waiting
                bar.update()
            waiting = started
        if waiting is not None:
            yield waiting
            bar.update()


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy, with the rows of all hosts; where there are several, every host must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


class Mean:
    """Average of each column over selected rows, in float64, so that it does not depend on the batch size."""

    def __init__(self) -> None:
        self.count = 0
        self._totals: dict[str, Any] = {}

    def add(self, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
        """Adds the entries of each column [B] or [B,...] where rows, bool[B], is true."""
        self.count += int(rows.sum())
        for name, values in columns.items():
            selected = np.asarray(values, np.float64)[rows]
            self._totals[name] = self._totals.get(name, 0.0) + selected.sum(0)

    def result(self) -> dict[str, Any]:
        """name -> average, float64; empty where no row was added."""
        return {name: total / self.count for name, total in self._totals.items()} if self.count else {}
