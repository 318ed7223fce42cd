"""One solver for one or several parts: a batch holds the examples of each, their losses are added.

Images of all parts go through backbone and encoder together, as one batch of one size; every part then decodes its own
sequence, so that the short ones are not padded. Each part's loss is normalised and weighted by itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from aitok_jax.image import IMAGENET_MEAN, IMAGENET_STD
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.tasks import from_scratch
from aitok_jax.tasks.base import Batch, Part, Tree
from aitok_jax.tasks.vocabulary import Vocabulary


class Inputs(NamedTuple):
    """Images f32[B,S,S,3] in the solver's scale, input tokens int32[B,T-1], and what the loss compares with."""

    images: jax.Array
    tokens: jax.Array
    targets: Any


class SolverPart(Part, Protocol):
    """A part that a solver is trained for."""

    solver: TaskSolver
    task_id: int

    def init_heads(self, rng: jax.Array) -> Tree:
        """Fresh parameters beside those of the solver."""

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        """The frozen tokenizer, as part of `model_state`."""

    def inputs(self, model_state: Tree, batch: Batch, rng: jax.Array) -> Inputs:
        """Inputs and targets of a training batch."""

    def score(
        self,
        params: Tree,
        model_state: Tree,
        logits_BTV: jax.Array,
        memory_BMD: jax.Array,
        targets: Any,
        weight_B: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted loss and named metrics of the teacher-forced logits; `weight_B` is the batch's, see `base.Task`."""


@dataclasses.dataclass(frozen=True, eq=False)
class SolverTask:
    """A solver and what it is trained for.

    Attributes:
        solver, vocabulary: the same as those of the parts.
        parts: by name; at least one.
        init_variance: see `from_scratch.rescale`; 0 as published.
    """

    solver: TaskSolver
    vocabulary: Vocabulary
    parts: Mapping[str, SolverPart]
    init_variance: float = 0.0

    def __post_init__(self):
        transformer = self.solver.transformer
        if transformer.vocab_size != self.vocabulary.size:
            raise ValueError(
                f"vocab_size={transformer.vocab_size} must equal the vocabulary's {self.vocabulary.size} tokens"
            )
        for name, part in self.parts.items():
            if transformer.num_tasks <= part.task_id:
                raise ValueError(
                    f"num_tasks={transformer.num_tasks} must be more than {part.task_id}, the row of {name}"
                )
        seen = {name: getattr(part, "pad_to", 0) or part.image_size for name, part in self.parts.items()}
        if len(set(seen.values())) > 1:
            raise ValueError(f"the parts must bring images to one size, by image_size or pad_to; theirs are {seen}")

    def init(self, rng: jax.Array, batches: Mapping[str, Batch]) -> tuple[Tree, Tree]:
        solver_rng, tokenizer_rng = jax.random.split(rng)
        image = jax.tree.map(jnp.zeros_like, batches[next(iter(self.parts))]["image"][:1])
        params = self.solver.init(solver_rng, image, jnp.zeros((1, 1), jnp.int32), 0)["params"]
        params, model_state = from_scratch.rescale(params, self.init_variance), {}
        for name, part in self.parts.items():
            params |= part.init_heads(solver_rng)
            model_state |= part.init_state(tokenizer_rng, batches[name])
        return params, model_state

    def loss(
        self, params: Tree, model_state: Tree, batches: Mapping[str, Batch], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        """The sum of the parts' losses. Metrics of several parts are named PART/NAME."""
        dropout_rng, inputs_rng = jax.random.split(rng)
        keys = jax.random.split(inputs_rng, len(self.parts))
        inputs = {
            name: part.inputs(model_state, batches[name], key)
            for (name, part), key in zip(self.parts.items(), keys, strict=True)
        }
        outputs = self.solver.apply(
            {"params": solver_params(params)},
            jnp.concatenate([each.images for each in inputs.values()]),
            [(inputs[name].tokens, part.task_id) for name, part in self.parts.items()],
            train=True,
            rngs={"dropout": dropout_rng},
            method="forward",
        )
        total, metrics = 0.0, {}
        for (name, part), (logits_BTV, memory_BMD) in zip(self.parts.items(), outputs, strict=True):
            targets, weight_B = inputs[name].targets, batches[name].get("weight")
            loss, own = part.score(params, model_state, logits_BTV, memory_BMD, targets, weight_B)
            total += loss
            metrics |= {f"{part_prefix(self, name)}{key}": value for key, value in own.items()}
        return total, (metrics, model_state)


def part_prefix(task: Any, part: str) -> str:
    """What names of a part's logged metrics, options and panels begin with: nothing, where it is the only one."""
    return f"{part}/" if len(task.parts) > 1 else ""


def solver_params(params: Tree) -> Tree:
    """Without the heads of the parts."""
    return {name: params[name] for name in ("backbone", "transformer")}


def memory(solver: TaskSolver, params: Tree, images_BHWC: jax.Array) -> list:
    """Keys and values of scaled images for every decoder layer."""
    return solver.apply({"params": solver_params(params)}, images_BHWC, method="memory")


def normalize(images_BHWC: jax.Array) -> jax.Array:
    """RGB in 0..1 minus the mean of ImageNet's colours, over their standard deviation."""
    return (images_BHWC - IMAGENET_MEAN.reshape(1, 1, 1, 3)) / IMAGENET_STD.reshape(1, 1, 1, 3)
