"""The set-up of a run, before its first step: mesh, task, data, and a configuration that can work."""

import dataclasses
import difflib
import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.config import translated, unknown
from aitok_jax.data import datasets
from aitok_jax.parallel import sharding
from aitok_jax.tasks.solver import part_prefix
from aitok_jax.training import checkpoint, optim, run_dir

_REQUIRED = ("name", "seed", "task", "data", "batch_size", "eval_batch_size", "train_steps", "log_every", "eval_every")
_REQUIRED += ("checkpoint_every", "keep_checkpoints", "optim")
_OPTIONAL = ("best_metric", "best_mode", "ema_decay", "fsdp", "accumulate", "start_from", "categories")
_OPTIONAL += ("eval_variants", "eval_baseline", "eval_first")
_OPTIM = ("name", "learning_rate", "b1", "b2", "eps", "weight_decay", "layer_decay", "clip_norm")
_OPTIM += ("warmup_steps", "warmup_ratio", "schedule")
_ALIKE = 0.75  # of a misspelt key to the right one
_LEAST = {"train_steps": 1, "log_every": 1, "keep_checkpoints": 1, "eval_every": 0, "checkpoint_every": 0}
_HOURS_TO_RENDER = 24
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same during a run.

    Attributes:
      config: with a task made of parts; `data`, `batch_size`, `eval_batch_size` and `eval_variants` are by part.
      variants: by part, tasks' parts with other fields, evaluated at the end.
      data: by part.
    """

    config: ConfigDict
    folder: run_dir.RunDir
    mesh: Mesh
    task: tasks.Task
    variants: dict[str, dict[str, Any]]
    data: dict[str, datasets.Data]


def set_up(config: ConfigDict, workdir: str | Path) -> Run:
    """Mesh, task and data of a configuration. ValueError for all that can be wrong with it, before time is spent."""
    check_keys(config)
    config = translated(config)
    _check_values(config)
    mesh = sharding.make_mesh(config.fsdp)
    optim.make_optimizer(config.optim, config.train_steps)
    task = tasks.build(config.task)
    variants = {name: _variants(part, config.eval_variants.get(name) or {}) for name, part in task.parts.items()}
    for name, part in task.parts.items():
        _check_sizes(name, config.data[name], part)
    run = Run(config, run_dir.RunDir(workdir), mesh, task, variants, {})
    _check_batch_sizes(run)
    data = _build_data({name: config.data[name] for name in task.parts})
    for name, part in task.parts.items():
        if part.kind == "objects":
            _name_classes(config, part.vocabulary.num_classes, data[name].train)
    return dataclasses.replace(run, data=data)


def check_keys(config: ConfigDict) -> None:
    """ValueError for missing and misspelt keys of a run, and where TensorFlow is missing.

    A key of one's own may hold the path of a run, for `start_from` to refer to.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError("training needs TensorFlow, which is not installed here: pip install tensorflow-cpu")
    if missing := [key for key in _REQUIRED if key not in config]:
        raise ValueError(f"config: {', '.join(missing)} must be given")
    known = (*_REQUIRED, *_OPTIONAL)
    for key, value in config.items():
        is_path = isinstance(value, str) and not difflib.get_close_matches(key, known, 1, _ALIKE)
        if key not in known and not is_path:
            raise ValueError(f"config.{key}: {unknown(key, known)}")
    for key in config.optim:
        if key not in _OPTIM:
            raise ValueError(f"config.optim.{key}: {unknown(key, _OPTIM)}")
    if missing := [key for key in _OPTIM if key not in config.optim]:
        raise ValueError(f"config.optim: {', '.join(missing)} must be given")


def _check_values(config: ConfigDict) -> None:
    for key, value in _LEAST.items():
        if config[key] < value:
            raise ValueError(f"{key}={config[key]} must be at least {value}")
    if config.best_mode not in ("min", "max"):
        raise ValueError(f"best_mode={config.best_mode!r} must be 'min' or 'max'")
    if config.accumulate < 1:
        raise ValueError(f"accumulate={config.accumulate} must be at least 1, the number of micro-batches of a step")
    if not 0.0 <= config.ema_decay < 1.0:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1); 0 is off")
    parts = config.task.parts
    if config.best_metric and config.best_metric.split("/")[0] not in parts:
        raise ValueError(f"best_metric={config.best_metric!r} must begin with {' or '.join(f'{n}/' for n in parts)}")


def _check_batch_sizes(run: Run) -> None:
    """ValueError where a batch is empty, or cannot be split evenly into micro-batches on all devices.

    A run that goes on may have had other devices, or another `accumulate`.
    """
    for key in ("batch_size", "eval_batch_size"):
        for part, size in run.config[key].items():
            if size < 1:
                name = f"{key}.{part_prefix(run.task, part)}".rstrip("./")
                raise ValueError(f"{name}={size} must be at least 1")
    if run.config.accumulate == 1:  # filled up where it does not divide
        return
    for part, size in run.config.batch_size.items():
        try:
            name = f"batch_size.{part_prefix(run.task, part)}".rstrip("./")
            sharding.check_batch_size(size, run.mesh, name, run.config.accumulate)
        except ValueError as error:
            if checkpoint.latest_step(run.folder.path) < 0:
                raise
            raise ValueError(
                f"{error}, in a new --workdir: this run goes on with {size} alone, on fewer devices or a lower "
                "accumulate"
            ) from None


def _build_data(configs: Mapping[str, ConfigDict]) -> dict[str, datasets.Data]:
    """The data of each part. Scenes that have to be rendered are the first host's work; the others wait for it."""
    first = jax.process_index() == 0
    data = {name: datasets.build(config) for name, config in configs.items()} if first else {}
    if jax.process_count() > 1:  # no collective: those give up after half a minute
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"data {next(_barriers)}", timeout_ms=_HOURS_TO_RENDER * 3_600_000)
    return data or {name: datasets.build(config) for name, config in configs.items()}


def _check_sizes(name: str, data: Mapping, part: Any) -> None:
    """ValueError where the data would come in other sizes than the part reads."""
    pairs = {"size": "image_size", "num_objects": "num_objects"}
    if getattr(part, "mask_tokens", 0):
        pairs["mask_size"] = "mask_size"
    for given, field in pairs.items():
        wanted = getattr(part, field, None)
        if wanted is not None and given in data and data[given] != wanted:
            raise ValueError(f"{name}: data.{given}={data[given]} must be task.{field}={wanted}; change one of them")


def _name_classes(config: ConfigDict, num_classes: int, source: Any) -> None:
    """Writes the data's categories into the configuration, for whoever predicts with the weights."""
    if len(source.categories) > num_classes:
        raise ValueError(
            f"the data has {len(source.categories)} categories, more than vocabulary.num_classes={num_classes}; "
            "raise that"
        )
    pairs = zip(source.category_ids, source.categories, strict=True)
    config.categories = [{"id": number, "name": name} for number, name in pairs]


def _variants(part: Any, changes: Mapping) -> dict[str, Any]:
    if not changes:
        return {}
    fields = [field.name for field in dataclasses.fields(part)]
    for prefix, values in changes.items():
        for key in values:
            if key not in fields:
                raise ValueError(f"eval_variants.{prefix}: {unknown(key, fields)}")
    return {prefix: dataclasses.replace(part, **dict(values.items())) for prefix, values in changes.items()}
