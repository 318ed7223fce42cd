"""What the train loop, the evaluators and the predictor know of a task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

Batch = Mapping[str, jax.Array]
Tree = Mapping[str, Any]


class Task(Protocol):
    """A hashable, immutable description of a model and what it is trained for; all state is passed in.

    `params` are trained by gradients; `model_state` is the rest: the EMA codebook of a tokenizer, the frozen tokenizer
    of a solver.

    Attributes:
        image_size: side in pixels of the square images of a training batch.
        eval_crop: rows and columns (top, bottom, left, right) that metrics look at, or None.
        max_depth: metres; annotation beyond it is left out of the metrics.
    """

    image_size: int
    eval_crop: tuple[int, int, int, int] | None
    max_depth: float

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """Fresh (params, model_state) for batches of this shape."""

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        """The training loss (f32 scalar), (named f32 scalars to log, the new model_state)."""

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Predicted maps of a batch whose images may be larger than `image_size`, e.g. depth f32[B,H,W] in metres."""


@functools.lru_cache(maxsize=16)
def compiled_predict(task: Task) -> Callable[[Tree, Tree, Batch], dict[str, jax.Array]]:
    """The jitted `task.predict`, one for evaluation, prediction and export."""
    return jax.jit(task.predict)
