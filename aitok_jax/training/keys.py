"""The keys of a run's configuration and the types of their values (see `config.typed`)."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from aitok_jax.data import datasets
from aitok_jax.tasks.options import task_options
from aitok_jax.training import schedules

REQUIRED = {"name": str, "seed": int, "task": {}, "data": {}, "batch_size": int, "eval_batch_size": int}
REQUIRED |= {"train_steps": int, "log_every": int, "eval_every": int, "checkpoint_every": int, "keep_checkpoints": int}
REQUIRED |= {"optim": {}}
OPTIONAL = {"best_metric": str | None, "best_mode": str, "ema_decay": float, "fsdp": int, "accumulate": int}
OPTIONAL |= {"start_from": {"*": str | None}, "categories": None, "eval_variants": {}}
OPTIONAL |= dict.fromkeys(("eval_baseline", "eval_first"), bool)
OPTIM = {"name": str, **dict.fromkeys(("learning_rate", "b1", "b2", "eps", "weight_decay", "layer_decay"), float)}
OPTIM |= {"clip_norm": float, "warmup_steps": int, "warmup_ratio": float, "schedule": {}}


def run_options(run: Mapping) -> dict[str, Any]:
    """Key -> type of all that a run's configuration may have, also where it does not: nested as it is.

    That of a plan has what it has.
    """
    if "finetune" in run:
        return {}
    task = task_options(run["task"]) if "task" in run else {}
    parts = task.get("parts", None)
    optim = run.get("optim", {})
    data = run.get("data", {})
    options = {
        **REQUIRED,
        **OPTIONAL,
        "task": task,
        "optim": OPTIM | {"schedule": _schedule(optim.get("schedule", {}))},
    }
    if parts is None:
        return options | {"data": _data(data), "eval_variants": {"*": task}}
    sizes = {key: dict.fromkeys(parts, int) for key in ("batch_size", "eval_batch_size")}
    variants = {name: {"*": fields} for name, fields in parts.items()}
    return options | sizes | {"data": {name: _data(own) for name, own in data.items()}, "eval_variants": variants}


def _data(own: Any) -> dict[str, Any]:
    named = isinstance(own, Mapping | ConfigDict) and "name" in own and own["name"] in datasets.KEYS
    return datasets.KEYS[own["name"]] if named else {}


def _schedule(own: Mapping) -> dict[str, Any]:
    named = "name" in own and own["name"] in schedules.OPTIONS
    return {"name": str, **(schedules.OPTIONS[own["name"]] if named else {})}
