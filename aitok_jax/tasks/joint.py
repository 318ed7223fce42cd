"""One solver for several tasks: a batch holds the examples of each, their losses are added (AIT.md section 6.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from aitok_jax.config import unknown
from aitok_jax.tasks import depth, instances, solving
from aitok_jax.tasks.base import Batch, Tree

SHARED = ("backbone", "transformer", "vocabulary", "init_variance")
BUILDERS = {"depth": depth.build, "instances": instances.build}


@dataclasses.dataclass(frozen=True)
class JointTask:
    """Depth and instance segmentation with one set of weights.

    Images of all tasks go through backbone and encoder together, as one batch of one size; every task then decodes
    its own sequence, so that the short ones are not padded. Each part's loss is normalised and weighted by itself.

    Attributes:
        depth, instances: the tasks; both have the same solver and vocabulary.
    """

    depth: depth.DepthTask
    instances: instances.InstancesTask

    def __post_init__(self):
        shared = ("solver", "vocabulary", "init_variance")
        if any(getattr(self.depth, name) != getattr(self.instances, name) for name in shared):
            raise ValueError(f"depth and instances must have one of {', '.join(SHARED)}: give them once, in `shared`")
        seen = self.depth.pad_to or self.depth.image_size
        if seen != self.instances.image_size:
            raise ValueError(
                f"depth.pad_to={self.depth.pad_to} must bring its images of {self.depth.image_size} pixels to "
                f"instances.image_size={self.instances.image_size}"
            )

    @property
    def parts(self) -> dict[str, solving.SolverPart]:
        """The tasks by name: a batch is a dictionary of their batches."""
        return {"depth": self.depth, "instances": self.instances}

    def init(self, rng: jax.Array, batch: Mapping[str, Batch]) -> tuple[Tree, Tree]:
        return solving.init(self.parts, rng, batch)

    def loss(
        self, params: Tree, model_state: Tree, batch: Mapping[str, Batch], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        total, metrics = solving.loss(self.parts, params, model_state, batch, rng)
        flat = {f"{part}/{name}": value for part, values in metrics.items() for name, value in values.items()}
        return total, (flat, model_state)


def build(fields: Mapping) -> JointTask:
    """From `config.task`: `depth` and `instances` hold what is their own, `shared` what both have.

    `shared` holds what SHARED names; the vocabulary's numbers of codes are the tokenizers'.
    """
    own = {name: dict(fields.get(name) or {}) for name in ("shared", *BUILDERS)}
    shared = own.pop("shared")
    for given, valid in ((fields, ("shared", *BUILDERS)), (shared, SHARED)):
        for name in given:
            if name not in valid:
                raise ValueError(f"task: {unknown(name, valid)}")
    codes = {
        vocabulary: own[part]["tokenizer"]["num_codes"]
        for vocabulary, part in (("num_depth_codes", "depth"), ("num_mask_codes", "instances"))
        if "num_codes" in (own[part].get("tokenizer") or {})
    }
    shared["vocabulary"] = {**codes, **shared.get("vocabulary", {})}
    return JointTask(**{name: build({**shared, **own[name]}) for name, build in BUILDERS.items()})
