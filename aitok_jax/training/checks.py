"""What can be wrong with a run and is known before its first step: ValueError, or OSError, with the way out."""

import difflib
import importlib.util
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aitok_jax import evaluators
from aitok_jax.config import check_given, check_mappings, ordered, short_key, translated, typed, unknown
from aitok_jax.parallel import overview
from aitok_jax.tasks.base import Part, variable_shapes
from aitok_jax.tasks.solver import part_prefix
from aitok_jax.training import checkpoint, optim, warm_start
from aitok_jax.training.keys import OPTIM, OPTIONAL, REQUIRED, run_options
from aitok_jax.training.state import TrainState

LOG = logging.getLogger(__name__)
_ALIKE = 0.75  # of a misspelt key to the right one
_LEAST = {"train_steps": 1, "log_every": 1, "keep_checkpoints": 1, "eval_every": 0, "checkpoint_every": 0}
_LEAST |= {"accumulate": 1, "fsdp": 1}


def check_runs(config: ConfigDict) -> None:
    """TensorFlow, and `check_keys` of a run, or of all its stages."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError("training needs TensorFlow, which is not installed here: pip install tensorflow-cpu")
    for name, run in config.stages.items() if "stages" in config else [("", config)]:
        try:
            check_keys(run)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}" if name else str(error)) from error


def check_keys(config: ConfigDict) -> None:
    """Missing and misspelt keys of a run.

    A key of one's own may hold the path of a run, for `start_from` to refer to.
    """
    check_given("config", config, REQUIRED)
    check_mappings(config)
    check_given("config.task", config.task, ["name"])
    check_given("config.task", config.task, ["parts"] * (config.task.name in ("solver", "tokenizer")))
    known = (*REQUIRED, *OPTIONAL)
    for key, value in config.items():
        is_path = isinstance(value, str) and not difflib.get_close_matches(key, known, 1, _ALIKE)
        if key not in known and not is_path:
            raise ValueError(f"config.{key}: {unknown(key, known)}")
    for key in config.optim:
        if key not in OPTIM:
            raise ValueError(f"config.optim.{key}: {unknown(key, OPTIM)}")
    check_given("config.optim", config.optim, OPTIM)


def with_types(config: ConfigDict) -> ConfigDict:
    """The configuration in the form of parts, whose values have their types: 1e3 is a whole number, 'yes' none."""
    config = translated(config)

    def checked(values: Mapping, kinds: Any, prefix: str) -> dict[str, Any]:
        result = {}
        for key, value in values.items():
            kind = kinds.get(key, kinds.get("*")) if isinstance(kinds, Mapping) else None
            name = f"{prefix}{key}"
            if isinstance(value, Mapping | ConfigDict) and kind not in (bool, int, float, str):
                result[key] = checked(value, kind, f"{name}.")
            else:
                value = value.to_dict() if isinstance(value, ConfigDict) else value
                result[key] = typed(f"config.{short_key(name, config.task)}", value, kind)
        return result

    return ordered(checked(config, run_options(config), ""))


def check_values(config: ConfigDict) -> None:
    """Numbers out of range."""
    for key, least in _LEAST.items():
        if config[key] < least:
            raise ValueError(f"{key}={config[key]} must be at least {least}")
    if config.best_mode not in ("min", "max"):
        raise ValueError(f"best_mode={config.best_mode!r} must be 'min' or 'max'")
    if not 0.0 <= config.ema_decay < 1.0:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1); 0 is off")
    if config.optim.warmup_steps > config.train_steps:
        raise ValueError(
            f"optim.warmup_steps={config.optim.warmup_steps} must be at most train_steps={config.train_steps}, or the "
            f"learning rate never gets to optim.learning_rate; give --config.optim.warmup_steps="
            f"{config.train_steps // 10} too"
        )
    schedule, steps = config.optim.schedule, config.train_steps
    if "boundaries" in schedule and schedule.boundaries and max(schedule.boundaries) >= steps:
        LOG.warning(
            "optim.schedule.boundaries=%s are not all below train_steps=%d: the learning rate does not fall as meant; "
            "they do not follow train_steps, give --config.optim.schedule.boundaries=(%d,) too",
            *(tuple(schedule.boundaries), steps, steps * 3 // 4),
        )


def check_by_part(config: ConfigDict, parts: Iterable[str]) -> None:
    """Data and sizes of batches that are not given for each part."""
    for key in ("data", "batch_size", "eval_batch_size"):
        check_given(f"config.{key}", config[key] or {}, parts)


def check_part(name: str, part: Part, config: ConfigDict, task: Any) -> None:
    """A part of a task, against its data and the sizes of its batches."""
    data, prefix = config.data[name], part_prefix(task, name)
    for key in ("batch_size", "eval_batch_size"):
        if config[key][name] < 1:
            raise ValueError(f"{f'{key}.{prefix}'.rstrip('./')}={config[key][name]} must be at least 1")
    size, also = config.batch_size[name], data.also_count if "also_count" in data else 0
    if also and not 0 < also < size:
        raise ValueError(f"{name}: data.also_count={also} must be between 1 and batch_size - 1 = {size - 1}; 0 is none")
    pairs = {"size": "image_size", "num_objects": "num_objects"}
    if getattr(part, "mask_tokens", 0):
        pairs["mask_size"] = "mask_size"
    if part.kind == "masks":
        pairs = {"mask_size": "image_size"}
    for given, field in pairs.items():
        wanted = getattr(part, field, None)
        if wanted is not None and given in data and data[given] != wanted:
            raise ValueError(f"{name}: data.{given}={data[given]} must be task.{field}={wanted}; change one of them")


def check_best_metric(config: ConfigDict, task: Any) -> None:
    """A `best_metric` that no evaluation between the steps measures."""
    best = config.best_metric
    if not best:
        return
    name = best.split("/")[0]
    if name not in task.parts:
        raise ValueError(f"best_metric={best!r} must begin with {' or '.join(f'{n}/' for n in task.parts)}")
    measured = [f"{name}/{metric}" for metric in evaluators.metric_names(task.parts[name])]
    if best not in measured:
        raise ValueError(f"best_metric: {unknown(best, measured)}")


def check_start_from(task: Any, config: ConfigDict, planned: Mapping[str, tuple[ConfigDict, Any]]) -> None:
    """Weights to start from that are not there or do not fit.

    Args:
      planned: folder of a run that is trained before this one -> its configuration and the shapes of its variables.
    """
    sources = {folder: (theirs, jax.tree.map(_blank, shapes)) for folder, (theirs, shapes) in planned.items()}
    warm_start.start_from(jax.tree.map(_blank, variable_shapes(task)), config, sources)


def _blank(leaf: Any) -> np.ndarray:
    """An array that takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def checkpoint_bytes(task: Any, config: ConfigDict, folder: Path) -> int:
    """What the checkpoints to come take on disk at most."""

    def create(variables):
        optimizer = optim.make_optimizer(config.optim, config.train_steps)
        return TrainState.create(variables["params"], variables["model_state"], optimizer, config.ema_decay)

    variables = variable_shapes(task)
    weights, state = overview.tree_bytes(variables), overview.tree_bytes(jax.eval_shape(create, variables))
    left = config.train_steps - max(checkpoint.latest_step(folder), 0)
    every = [each for each in (config.checkpoint_every, config.eval_every) if each]
    saves = min(1 + sum(left // each for each in every), config.keep_checkpoints + 1)  # one more while it is written
    kept = len(list((folder / checkpoint.FOLDER).glob("[0-9]*")))
    return (weights + state) * max(saves - kept, 1) + (2 * weights if config.best_metric else 0)


def check_disk(folder: Path, needed: int) -> None:
    """A local disk that the checkpoints to come do not fit on."""
    if "://" in str(folder):
        return
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"the checkpoints to come need {overview.size(needed)}, but {folder} has {overview.size(free)} left; make "
            "room, lower keep_checkpoints, or give another --workdir"
        )


def check_classes(config: ConfigDict, num_classes: int, categories: Iterable[str]) -> None:
    """More categories in the data than the model has classes."""
    if (count := len(list(categories))) > num_classes:
        key = f"config.{short_key('task.shared.vocabulary.num_classes', config.task)}"
        raise ValueError(
            f"the data has {count} categories, more than vocabulary.num_classes={num_classes}; give --{key}={count}"
        )
