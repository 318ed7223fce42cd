"""What all tasks of the solver share: one pass of backbone and encoder over the images of one or several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.config import build_dataclass
from aitok_jax.models.swin_v2 import INIT_STD, SwinV2
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.transformer import TokenTransformer
from aitok_jax.tasks.base import Batch, Tree
from aitok_jax.tasks.vocabulary import Vocabulary

IMAGENET_MEAN = np.array((123.675, 116.28, 103.53), np.float32) / 255
IMAGENET_STD = np.array((58.395, 57.12, 57.375), np.float32) / 255


DTYPES = ("auto", "float32", "bfloat16")


def build_solver(fields: dict[str, Any], vocabulary: Vocabulary) -> TaskSolver:
    """The solver of a config's `backbone` and `transformer`, which are taken out of `fields`.

    Their `dtype`, of arithmetic, is of DTYPES: 'auto', the default, is bfloat16 on accelerators and float32 on a CPU.
    Parameters, softmax, cosine attention, LayerNorm, logits and losses are float32 always; tokenizers are too, where
    nothing else is asked for, since they are small and a code is a decision.

    Raises:
        ValueError: an unknown field or dtype.
    """
    backbone, transformer = ({"dtype": "auto", **fields.pop(name, {})} for name in ("backbone", "transformer"))
    for name, values in (("backbone", backbone), ("transformer", transformer)):
        if values["dtype"] not in DTYPES:
            raise ValueError(f"{name}.dtype={values['dtype']!r} must be one of {', '.join(DTYPES)}")
        if values["dtype"] == "auto":
            values["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    transformer = {"vocab_size": vocabulary.size, **transformer}
    return TaskSolver(build_dataclass(SwinV2, backbone), build_dataclass(TokenTransformer, transformer))


class Prepared(NamedTuple):
    """Images f32[B,S,S,3] in the solver's scale, input tokens int32[B,T-1], and what the loss compares with."""

    images: jax.Array
    tokens: jax.Array
    targets: Any


class SolverPart(Protocol):
    """A task that a solver is trained for, alone or together with others."""

    solver: TaskSolver
    task_id: int
    init_variance: float

    def init_heads(self, rng: jax.Array) -> Tree:
        """Fresh parameters beside those of the solver."""

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        """The frozen tokenizer, as part of `model_state`."""

    def prepare(self, model_state: Tree, batch: Batch, rng: jax.Array) -> Prepared:
        """Inputs and targets of a training batch."""

    def score(
        self, params: Tree, model_state: Tree, logits_BTV: jax.Array, memory_BMD: jax.Array, targets: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted loss and named metrics of the teacher-forced logits."""


def init(parts: Mapping[str, SolverPart], rng: jax.Array, batches: Mapping[str, Batch]) -> tuple[Tree, Tree]:
    """Fresh (params, model_state) of a solver and the tokenizers of its tasks."""
    solver_rng, tokenizer_rng = jax.random.split(rng)
    solver = next(iter(parts.values())).solver
    image = jax.tree.map(jnp.zeros_like, next(iter(batches.values()))["image"][:1])
    params = solver.init(solver_rng, image, jnp.zeros((1, 1), jnp.int32), 0)["params"]
    params = _rescale(params, next(iter(parts.values())).init_variance)
    model_state = {}
    for name, part in parts.items():
        params |= part.init_heads(solver_rng)
        model_state |= part.init_state(tokenizer_rng, batches[name])
    return params, model_state


def _rescale(params: Tree, variance: float) -> Tree:
    """A copy whose linear layers keep `variance` of their input; 0 leaves the standard deviation of 0.02."""
    if variance < 0:
        raise ValueError(f"init_variance={variance} must be above 0, for example 0.5, or 0 for the published weights")

    def rescale(path, leaf):
        linear = path[-1].key == "kernel" and leaf.ndim == 2
        return leaf * ((variance / leaf.shape[0]) ** 0.5 / INIT_STD) if linear else leaf

    return jax.tree_util.tree_map_with_path(rescale, params) if variance else dict(params)


def loss(
    parts: Mapping[str, SolverPart],
    params: Tree,
    model_state: Tree,
    batches: Mapping[str, Batch],
    rng: jax.Array,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """Sum of the tasks' losses, and the metrics of each. All images must have one size after `prepare`."""
    dropout_rng, prepare_rng = jax.random.split(rng)
    keys = jax.random.split(prepare_rng, len(parts))
    prepared = {
        name: part.prepare(model_state, batches[name], key)
        for (name, part), key in zip(parts.items(), keys, strict=True)
    }
    solver = next(iter(parts.values())).solver
    outputs = solver.apply(
        {"params": solver_params(params)},
        jnp.concatenate([each.images for each in prepared.values()]),
        [(prepared[name].tokens, part.task_id) for name, part in parts.items()],
        train=True,
        rngs={"dropout": dropout_rng},
        method="forward",
    )
    total, metrics = 0.0, {}
    for (name, part), (logits_BTV, memory_BMD) in zip(parts.items(), outputs, strict=True):
        part_loss, metrics[name] = part.score(params, model_state, logits_BTV, memory_BMD, prepared[name].targets)
        total += part_loss
    return total, metrics


def solver_params(params: Tree) -> Tree:
    """Without the heads of the tasks."""
    return {name: params[name] for name in ("backbone", "transformer")}


def memory(solver: TaskSolver, params: Tree, images_BHWC: jax.Array) -> list:
    """Keys and values of scaled images for every decoder layer."""
    return solver.apply({"params": solver_params(params)}, images_BHWC, method="memory")


def normalize(images_BHWC: jax.Array) -> jax.Array:
    """RGB in 0..1 minus the mean of ImageNet's colours, over their standard deviation."""
    return (images_BHWC - IMAGENET_MEAN.reshape(1, 1, 1, 3)) / IMAGENET_STD.reshape(1, 1, 1, 3)


def frozen_tokenizer(tokenizer: Any, rng: jax.Array, maps_BHWC: jax.Array) -> Tree:
    """A fresh tokenizer as it stands in `model_state`: its parameters and its codebook."""
    variables = dict(tokenizer.init(rng, maps_BHWC))
    return {"params": variables.pop("params"), "model_state": variables}


def apply_frozen(tokenizer: Any, frozen: Tree, method: str, *args: jax.Array) -> jax.Array:
    """Calls a method of a tokenizer that stands in `model_state`."""
    return tokenizer.apply({"params": frozen["params"], **frozen["model_state"]}, *args, method=method)


def check_multiple(name: str, size: int, what: str, multiple: int) -> None:
    """ValueError, with the nearest sizes, where `size` is no multiple."""
    if size % multiple:
        raise ValueError(
            f"{name}={size} must be a multiple of the {what}, {multiple}; the nearest sizes are "
            f"{size // multiple * multiple} and {(size // multiple + 1) * multiple}"
        )


def check_last_stage(backbone: Any) -> None:
    """ValueError where the backbone gives another map than its last."""
    if backbone.out_stages not in ((), (len(backbone.depths) - 1,)):
        raise ValueError(f"backbone.out_stages={backbone.out_stages} must be (), the last stage")
