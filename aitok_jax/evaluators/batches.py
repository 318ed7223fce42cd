"""What every evaluator needs: running a step over all batches, on any number of devices and hosts, and averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from aitok_jax.data import pipeline
from aitok_jax.parallel import sharding


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
    with tqdm(total=total, desc=label, unit="batch", disable=hidden, leave=False) as bar:
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


def run_evaluation(
    step: Callable[[dict], Any], data: Any, *, batch_size: int, mesh: Mesh | None, label: str, progress: bool
) -> Iterator[tuple[dict, Any]]:
    """`run_batches` over `data.eval`, transformed by `data.eval_transform`: this host's share of every batch."""
    batches = pipeline.eval_batches(
        data.eval,
        data.eval_transform,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    total = -(-len(data.eval) // batch_size)
    return run_batches(step, batches, mesh=mesh, total=total, label=label, progress=progress)


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy, with the rows of all hosts; where there are several, every host must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


class Mean:
    """Average of each column over selected rows, in float64, so that it does not depend on the batch size."""

    def __init__(self) -> None:
        self.count = 0
        self._totals: dict[str, float] = {}

    def add(self, columns: dict[str, np.ndarray], rows: np.ndarray) -> None:
        """Adds the entries of each column [B] where rows, bool[B], is true."""
        self.count += int(rows.sum())
        for name, values in columns.items():
            selected = np.asarray(values, np.float64)[rows]
            self._totals[name] = self._totals.get(name, 0.0) + float(selected.sum())

    def result(self, prefix: str) -> dict[str, float]:
        """`prefix/name` -> average; empty where no row was added."""
        if not self.count:
            return {}
        return {f"{prefix}/{name}": total / self.count for name, total in self._totals.items()}
