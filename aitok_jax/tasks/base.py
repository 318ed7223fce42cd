"""What the train loop, the evaluators and the predictor know of a task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax

Batch = Mapping[str, jax.Array]
Tree = Mapping[str, Any]


class Task(Protocol):
    """A hashable, immutable description of a model and what it is trained for; all state is passed in.

    `params` are trained by gradients; `model_state` is the rest: the EMA codebook of a tokenizer, the frozen tokenizer
    of a solver.

    A joint task has no `predict`, but `parts`: name -> task. Its batches are dictionaries of the parts' batches, and
    each part predicts, and is evaluated, with the weights of all.

    A task whose `model_state` moves by sums over a batch may have `open_step(model_state) -> model_state` and
    `close_step(model_state) -> model_state`, which come before and after the micro-batches of a step (`accumulate`).

    Attributes:
        evaluator: the kind of evaluation, a key of `evaluators.EVALUATORS`.
        image_size: side in pixels of the square images of a training batch.
    """

    evaluator: ClassVar[str]
    image_size: int

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """Fresh (params, model_state) for batches of this shape."""

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        """The training loss (f32 scalar), (named f32 scalars to log, the new model_state)."""

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """What the model says of a batch, e.g. depth f32[B,H,W] in metres; see the tasks."""


@functools.lru_cache(maxsize=16)
def compiled_predict(task: Task) -> Callable[[Tree, Tree, Batch], dict[str, jax.Array]]:
    """The jitted `task.predict`, one for evaluation, prediction and export."""
    return jax.jit(task.predict)
