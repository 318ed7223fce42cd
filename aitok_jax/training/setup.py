"""What a run needs before its first step: mesh, task, data, and a configuration that can work."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.config import unknown
from aitok_jax.data import pipeline
from aitok_jax.parallel import sharding
from aitok_jax.training import checkpoint, optim, run_dir

_REQUIRED = ("name", "seed", "task", "data", "batch_size", "eval_batch_size", "train_steps", "log_every", "eval_every")
_REQUIRED += ("checkpoint_every", "keep_checkpoints", "optim")
_HOURS_TO_RENDER = 24
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same during a run.

    A joint task has several parts, with data and metrics of their own; any other task is its only part, named as the
    run. `variants` are, by part, tasks with other fields, evaluated at the end.
    """

    config: ConfigDict
    folder: run_dir.RunDir
    mesh: Mesh
    task: tasks.Task
    parts: dict[str, tasks.Task]
    variants: dict[str, dict[str, tasks.Task]]
    data: dict[str, pipeline.Data]

    def each(self, key: str) -> dict[str, Any]:
        """A value of the configuration that a joint task has one of for every part."""
        return dict(self.config[key]) if self.joint else {self.config.name: self.config[key]}

    @property
    def joint(self) -> bool:
        return hasattr(self.task, "parts")


def prepare(config: ConfigDict, workdir: str | Path) -> Run:
    """Mesh, task and data of a configuration. ValueError for all that can be wrong with it, before time is spent."""
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ValueError(f"config: {', '.join(missing)} must be given")
    least = {"train_steps": 1, "log_every": 1, "keep_checkpoints": 1, "eval_every": 0, "checkpoint_every": 0}
    micro_batches = config.get("accumulate", 1)
    for key, value in least.items():
        if config[key] < value:
            raise ValueError(f"{key}={config[key]} must be at least {value}")
    if config.get("best_mode", "min") not in ("min", "max"):
        raise ValueError(f"best_mode={config.best_mode!r} must be 'min' or 'max'")
    if micro_batches < 1:
        raise ValueError(f"accumulate={micro_batches} must be at least 1, the number of micro-batches of a step")
    if not 0.0 <= config.get("ema_decay", 0.0) < 1.0:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1); 0 is off")
    mesh = sharding.make_mesh(config.get("fsdp", 1))
    optim.make_optimizer(config.optim, config.train_steps)
    task = tasks.build(config.task)
    parts = getattr(task, "parts", {config.name: task})
    changes, configs = config.get("eval_variants") or {}, config.data
    if not hasattr(task, "parts"):
        changes, configs = {config.name: changes}, {config.name: configs}
    variants = {name: _variants(part, changes.get(name) or {}) for name, part in parts.items()}
    for name, part in parts.items():
        _check_sizes(name, configs[name], part)
    best = config.get("best_metric", "")
    if best and best.split("/")[0] not in parts:
        raise ValueError(f"best_metric={best!r} must begin with {' or '.join(f'{name}/' for name in parts)}")
    run = Run(config, run_dir.RunDir(workdir), mesh, task, parts, variants, {})
    _check_batch_sizes(run, micro_batches)
    data = _build_data({name: configs[name] for name in parts})
    for name, part in parts.items():
        if part.evaluator == "objects":
            _name_classes(config, part.vocabulary.num_classes, data[name].train)
    return dataclasses.replace(run, data=data)


def _check_batch_sizes(run: Run, micro_batches: int) -> None:
    """ValueError where a batch cannot be split over the devices, of which there may have been more before."""
    for size in run.each("eval_batch_size").values():
        sharding.check_batch_size(size, run.mesh, "eval_batch_size")
    for part, size in run.each("batch_size").items():
        try:
            name = f"batch_size.{part}" if run.joint else "batch_size"
            sharding.check_batch_size(size, run.mesh, name, micro_batches)
        except ValueError as error:
            if checkpoint.latest_step(run.folder.path) < 0:
                raise
            raise ValueError(
                f"{error}, in a new --workdir: this run goes on with {size} alone, on fewer devices or a lower "
                "accumulate"
            ) from None


def _build_data(configs: Mapping[str, ConfigDict]) -> dict[str, pipeline.Data]:
    """The data of each part. Scenes that have to be rendered are the first host's work; the others wait for it."""
    first = jax.process_index() == 0
    data = {name: pipeline.build(config) for name, config in configs.items()} if first else {}
    if jax.process_count() > 1:  # no collective: those give up after half a minute
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"data {next(_barriers)}", timeout_ms=_HOURS_TO_RENDER * 3_600_000)
    return data or {name: pipeline.build(config) for name, config in configs.items()}


def _check_sizes(name: str, data: Mapping, task: tasks.Task) -> None:
    """ValueError where the data would come in other sizes than the task reads."""
    pairs = {"size": "image_size", "num_objects": "num_objects"}
    if getattr(task, "mask_tokens", 0):
        pairs["mask_size"] = "mask_size"
    for given, field in pairs.items():
        wanted = getattr(task, field, None)
        if wanted is not None and data.get(given, wanted) != wanted:
            raise ValueError(f"{name}: data.{given}={data[given]} must be task.{field}={wanted}; change one of them")


def _name_classes(config: ConfigDict, num_classes: int, source: Any) -> None:
    """Writes the data's categories into the configuration, for whoever predicts with the weights."""
    if len(source.categories) > num_classes:
        raise ValueError(
            f"the data has {len(source.categories)} categories, more than vocabulary.num_classes={num_classes}; "
            "raise that"
        )
    pairs = zip(source.category_ids, source.categories, strict=True)
    with config.unlocked():
        config.categories = [{"id": number, "name": name} for number, name in pairs]


def _variants(task: tasks.Task, changes: Mapping) -> dict[str, tasks.Task]:
    fields = [field.name for field in dataclasses.fields(task)]
    for prefix, values in changes.items():
        for key in values:
            if key not in fields:
                raise ValueError(f"eval_variants.{prefix}: {unknown(key, fields)}")
    return {prefix: dataclasses.replace(task, **dict(values.items())) for prefix, values in changes.items()}
