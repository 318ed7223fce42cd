"""From tables to runs: every row becomes runs of its set-ups, and what rows have in common becomes one run."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from tables import TABLES, Row, at_scale

from aitok_jax.config import ordered, to_json, unknown

ONE_SEED = ("detection",)  # as the published pre-trained weights are the same for all


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, trained, or an evaluation of another run's weights with other switches.

    Attributes:
        folder: name below WORKDIR/runs; has a digest of all that the result depends on.
        config: of the run, with '{workdir}/runs/FOLDER' where it starts from others.
        needs: folders of the jobs that come before.
        weights: folder of the job whose weights are evaluated; '' trains.
    """

    folder: str
    config: ConfigDict
    needs: tuple[str, ...]
    weights: str = ""


@dataclasses.dataclass
class Plan:
    """Jobs by folder, each after those it needs; and by (table, row's label, seed) the folders of a row's metrics."""

    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)
    cells: dict[tuple[str, str, int], tuple[str, ...]] = dataclasses.field(default_factory=dict)


def make_plan(
    names: Sequence[str],
    scale: str,
    seeds: int,
    setups: Mapping[str, ConfigDict],
    available: Collection[str],
    backbone: str = "",
) -> Plan:
    """Everything that the tables need; all of the first seed comes first.

    Args:
      names: of TABLES.
      scale: a key of `setups.SCALES`; picks values that differ between scales.
      seeds: how many, from 0.
      setups: name -> config.
      available: names of the set-ups that rows may ask for; rows without any of them are left out.
      backbone: run that published set-ups take their backbone from; '' is random weights.

    Raises:
      ValueError: an unknown table, a table of which no row can run, or a changed key that the config lacks.
    """
    planner, plan = _Planner(scale, setups, backbone), Plan()
    for name in names:
        if name not in TABLES:
            raise ValueError(f"--table: {unknown(name, TABLES)}")
        if not any(set(row.runs or TABLES[name].runs) & set(available) for row in TABLES[name].rows):
            raise ValueError(f"--table={name} has no row at --scale={scale}; its runs are {TABLES[name].runs}")
    for seed, name in itertools.product(range(seeds), names):
        for row in TABLES[name].rows:
            runs = [run for run in row.runs or TABLES[name].runs if run in available]
            if runs:
                plan.cells[name, row.label, seed] = tuple(planner.add(run, row, seed, plan.jobs) for run in runs)
    return plan


@dataclasses.dataclass
class _Planner:
    scale: str
    setups: Mapping[str, ConfigDict]
    backbone: str

    def add(self, name: str, row: Row, seed: int, jobs: dict[str, Job]) -> str:
        """Adds what a row needs of a set-up; returns the folder with its metrics."""
        config = ordered(self.setups[name])
        for key, value in row.changes.get(name, {}).items():
            change(config, key, at_scale(value, self.scale))
        config.seed = 0 if name in ONE_SEED else seed
        needs = []
        for prefix, source in config.start_from.items():
            needed = re.fullmatch(r"\{(\w+)\}", source)
            if needed and needed[1] == "backbone":
                config.start_from[prefix] = self.backbone
            elif needed:
                needs.append(self.add(needed[1], row, seed, jobs))
                config.start_from[prefix] = f"{{workdir}}/runs/{needs[-1]}"
        folder = _folder(name, config)
        jobs.setdefault(folder, Job(folder, config, tuple(needs)))
        switches = {k: v for k, v in row.evaluated.get(name, {}).items() if config.task[k] != v}
        if not switches:
            return folder
        variant = ordered(config)
        for key, value in switches.items():
            change(variant, f"task.{key}", value)
        other = _folder(name, variant, folder)
        jobs.setdefault(other, Job(other, variant, (folder,), weights=folder))
        return other


def change(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key, which must be there."""
    *path, last = key.split(".")
    for i, part in enumerate(path):
        if part not in config:
            raise ValueError(f"{key}: {unknown('.'.join(path[: i + 1]), config)}")
        config = config[part]
    if last not in config:
        raise ValueError(f"{key}: {unknown(last, config)}")
    config[last] = value


def _folder(name: str, config: ConfigDict, weights: str = "") -> str:
    digest = hashlib.sha256((to_json(config) + weights).encode()).hexdigest()
    return f"{name}-{digest[:10]}"
