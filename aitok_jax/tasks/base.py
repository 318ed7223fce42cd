"""What the loop, the evaluators, the predictor and the export know of a task: it is made of parts.

Batches, metrics and data are by part, `{part: batch}`, also where there is only one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]
Tree = Mapping[str, Any]


class Part(Protocol):
    """A kind of output that is predicted, with data and metrics of its own; hashable, all state is passed in.

    Attributes:
        kind: 'maps', 'objects' or 'masks', a key of `evaluators.EVALUATORS`.
        image_size: side in pixels of the square images of a training batch.
        answers: what a predictor can be asked for, names of results; () where it does not predict from images.
        meanings: name of every output of `predict` -> what its numbers mean.
    """

    kind: ClassVar[str]
    image_size: int
    answers: tuple[str, ...]
    meanings: Mapping[str, str]

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """What the model says of a batch; see the parts."""


class Task(Protocol):
    """A description of a model and what it is trained for.

    `params` are trained by gradients; `model_state` is the rest: the EMA codebook of a tokenizer, the frozen tokenizers
    of a solver.

    A batch that the devices do not divide is filled up: `weight` f32[B] is 0 for the rows that were added, which must
    count nowhere, neither in loss, metrics nor `model_state`. Batches that divide have no such key.

    A task whose `model_state` moves by sums over a batch may have `open_step(model_state) -> model_state` and
    `close_step(model_state) -> model_state`, which come before and after the micro-batches of a step (`accumulate`).
    """

    parts: Mapping[str, Part]

    def init(self, rng: jax.Array, batches: Mapping[str, Batch]) -> tuple[Tree, Tree]:
        """Fresh (params, model_state) for batches of this shape."""

    def loss(
        self, params: Tree, model_state: Tree, batches: Mapping[str, Batch], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        """The training loss (f32 scalar), (named f32 scalars to log, the new model_state)."""


def variable_shapes(task: Task) -> dict[str, Any]:
    """{'params', 'model_state'} of a task as jax.ShapeDtypeStruct leaves; nothing is allocated."""

    def batch(part: Part) -> dict[str, jax.ShapeDtypeStruct]:
        side = (1, part.image_size, part.image_size)
        axes = {"image": (3,), "instance": ()}
        if hasattr(part, "modality"):
            axes[part.modality.name] = part.modality.map_axes
        return {name: jax.ShapeDtypeStruct((*side, *more), jnp.float32) for name, more in axes.items()}

    batches = {name: batch(part) for name, part in task.parts.items()}
    params, model_state = jax.eval_shape(task.init, jax.random.key(0), batches)
    return {"params": params, "model_state": model_state}


@functools.lru_cache(maxsize=16)
def compiled_predict(part: Part) -> Callable[[Tree, Tree, Batch], dict[str, jax.Array]]:
    """The jitted `part.predict`, one for evaluation, prediction and export."""
    return jax.jit(part.predict)


def init_tokenizer(tokenizer: Any, rng: jax.Array, maps_BHWC: jax.Array) -> Tree:
    """A fresh frozen tokenizer as it stands in a solver's `model_state`: its parameters and its codebook."""
    variables = dict(tokenizer.init(rng, maps_BHWC))
    return {"params": variables.pop("params"), "model_state": variables}


def apply_tokenizer(tokenizer: Any, frozen: Tree, method: str, *args: jax.Array) -> jax.Array:
    """Calls a method of a frozen tokenizer."""
    return tokenizer.apply({"params": frozen["params"], **frozen["model_state"]}, *args, method=method)


def check_multiple(name: str, size: int, what: str, multiple: int) -> None:
    """ValueError, with the nearest sizes, where `size` is no multiple."""
    if size < 1 or size % multiple:
        near = max(size // multiple, 1) * multiple
        raise ValueError(
            f"{name}={size} must be a multiple of the {what}, {multiple}; the nearest sizes are {near} and "
            f"{near + multiple}"
        )
