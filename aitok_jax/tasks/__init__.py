"""Tasks: what the loop trains and the predictor runs. A new task is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from aitok_jax.config import unknown
from aitok_jax.tasks import depth, instances, joint, tokenizer
from aitok_jax.tasks.base import Task

BUILDERS = {
    "depth_tokenizer": tokenizer.build,
    "mask_tokenizer": tokenizer.build_mask,
    "depth": depth.build,
    "instances": instances.build,
    "joint": joint.build,
}


def build(config: Mapping) -> Task:
    """The task of `config.task`: `name` picks the kind, the other keys are its fields.

    Raises:
        ValueError: for an unknown name or field (with the nearest valid one), or sizes that do not fit each other.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if name not in BUILDERS:
        raise ValueError(f"task.name={name!r}: {unknown(str(name), BUILDERS)}")
    return BUILDERS[name](fields)
