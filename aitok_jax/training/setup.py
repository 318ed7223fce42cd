"""The set-up of a run, before its first step: mesh, task, data, and a configuration that can work."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aitok_jax import evaluators, paths, tasks
from aitok_jax.config import unknown
from aitok_jax.data import datasets
from aitok_jax.parallel import sharding
from aitok_jax.tasks.base import Part, variable_shapes
from aitok_jax.tasks.solver import part_prefix
from aitok_jax.training import checkpoint, checks, optim, run_dir

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
    folder: run_dir.RunDir | None
    mesh: Mesh
    task: tasks.Task
    variants: dict[str, dict[str, Any]]
    data: dict[str, datasets.Data]


def set_up(config: ConfigDict, workdir: str | Path) -> Run:
    """Mesh, task and data of a configuration. ValueError for all that can be wrong with it, before time is spent."""
    run = _checked(config, paths.expand(workdir))
    return dataclasses.replace(run, folder=run_dir.RunDir(workdir))


def check_all(runs: Mapping[Path, ConfigDict]) -> dict[Path, Run]:
    """All that can be wrong with runs that come one after the other, before the first of them; returns their set-ups.

    Args:
      runs: folder -> configuration.

    Raises:
      ValueError, OSError: as `loop.train`, with the name of the folder.
    """
    needed, planned, checked = 0, {}, {}
    for folder, config in runs.items():
        try:
            run = checked[folder] = _checked(config, folder)
            if checkpoint.latest_step(folder) < 0:
                checks.check_start_from(run.task, run.config, planned)
        except ValueError as error:
            text = str(error).replace("--config.", f"--config.stages.{folder.name}.")
            raise ValueError(f"stage {folder.name}: {text}") from error
        planned[str(folder)] = run.config, variable_shapes(run.task)
        needed += checks.checkpoint_bytes(run.task, run.config, folder)
    checks.check_disk(next(iter(runs), Path()), needed)
    return checked


def _checked(config: ConfigDict, folder: Path) -> Run:
    """Without a folder, which is not touched."""
    checks.check_runs(config)
    config = checks.with_types(config)
    checks.check_values(config)
    mesh = sharding.make_mesh(config.fsdp)
    optim.make_optimizer(config.optim, config.train_steps)
    task = tasks.build(config.task)
    variants = {name: _variants(part, config.eval_variants.get(name) or {}) for name, part in task.parts.items()}
    checks.check_best_metric(config, task)
    checks.check_by_part(config, task.parts)
    for name, part in task.parts.items():
        checks.check_part(name, part, config, task)
    run = Run(config, None, mesh, task, variants, {})
    _check_micro_batches(run, folder)
    data = _build_data(task.parts, config.data)
    for name, part in task.parts.items():
        if part.kind == "objects":
            source = data[name].train
            checks.check_classes(config, part.vocabulary.num_classes, source.categories)
            pairs = zip(source.category_ids, source.categories, strict=True)
            config.categories = [{"id": number, "name": name} for number, name in pairs]  # for whoever predicts
        evaluators.check_data(part, data[name])
    return dataclasses.replace(run, data=data)


def _check_micro_batches(run: Run, folder: Path) -> None:
    """ValueError where a batch cannot be split evenly into micro-batches on all devices.

    A run that goes on may have had other devices, or another `accumulate`.
    """
    if run.config.accumulate == 1:  # filled up where it does not divide
        return
    for part, size in run.config.batch_size.items():
        try:
            name = f"batch_size.{part_prefix(run.task, part)}".rstrip("./")
            sharding.check_batch_size(size, run.mesh, name, run.config.accumulate)
        except ValueError as error:
            if checkpoint.latest_step(folder) < 0:
                raise
            raise ValueError(
                f"{error}, in a new --workdir: this run goes on with {size} alone, on fewer devices or a lower "
                "accumulate"
            ) from None


def _build_data(parts: Mapping[str, Part], configs: Mapping[str, ConfigDict]) -> dict[str, datasets.Data]:
    """The data of each part. Scenes that have to be rendered are the first host's work; the others wait for it."""

    def build() -> dict[str, datasets.Data]:
        return {name: datasets.build(configs[name], getattr(part, "modality", None)) for name, part in parts.items()}

    data = build() if jax.process_index() == 0 else {}
    if jax.process_count() > 1:  # no collective: those give up after half a minute
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"data {next(_barriers)}", timeout_ms=_HOURS_TO_RENDER * 3_600_000)
    return data or build()


def _variants(part: Any, changes: Mapping) -> dict[str, Any]:
    if not changes:
        return {}
    fields = [field.name for field in dataclasses.fields(part)]
    for prefix, values in changes.items():
        for key in values:
            if key not in fields:
                raise ValueError(f"eval_variants.{prefix}: {unknown(key, fields)}")
    return {prefix: dataclasses.replace(part, **dict(values.items())) for prefix, values in changes.items()}
