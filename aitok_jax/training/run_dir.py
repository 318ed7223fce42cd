"""The files of a run: JSON, parameters.txt, metrics.jsonl and TensorBoard events, by the first host."""

import contextlib
import importlib.metadata
import json
import logging
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aitok_jax import paths
from aitok_jax.config import flatten
from aitok_jax.image import read_image
from aitok_jax.training.events import Events

LOG = logging.getLogger(__name__)
_PACKAGES = ("aitok_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu", "tensorflow")
_MAX_IMAGES = 16  # panels shown in TensorBoard


class RunDir:
    """Writes into a run directory, which is made where absent; hosts other than the first write nothing."""

    def __init__(self, path: str | Path):
        self.path = paths.expand(path)
        self.panels = self.path / "panels"
        self._first_host = jax.process_index() == 0
        self._events = None
        self._untimed = 0.0
        self._evaluated = set()
        if self._first_host:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not paths.is_url(path):
                    tempfile.TemporaryFile(dir=self.path).close()
            except OSError as error:
                raise OSError(f"cannot write to the run directory {path} ({error}); give another --workdir") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2))

    def write_text(self, name: str, text: str) -> None:
        if self._first_host:
            paths.write_text(self.path / name, text + "\n")

    def write_environment(self, mesh: Mesh, start: int) -> None:
        """Writes env.json, with the command lines that have trained the run so far."""
        path = self.path / "env.json"
        before = json.loads(path.read_text()).get("commands", []) if start and path.exists() else []
        command = shlex.join(sys.orig_argv)
        self.write_json("env.json", environment(mesh) | {"commands": list(dict.fromkeys([*before, command]))})

    def check_data(self, fingerprint: dict[str, Any], start: int) -> None:
        """Keeps a fingerprint of the data in data.json.

        Raises:
          ValueError: a run that goes on (start > 0) had another one.
        """
        path = self.path / "data.json"
        if not start or not path.exists():
            self.write_json("data.json", fingerprint)
            return
        before, now = (flatten(values) for values in (json.loads(paths.read(path)), fingerprint))
        changed = [
            f"{name} was {str(before.get(name))[:12]}, is {str(now.get(name))[:12]}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"the data is not the one that {self.path} trained on to step {start}: {'; '.join(changed)}. "
                f"Restore it, train in a new directory, or delete {path} to go on with other data"
            )

    def remove(self, name: str) -> None:
        if self._first_host:
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def logging(self, start: int, batch_size: int) -> Iterator[None]:
        """Opens the logs of a run that goes on from step `start`; what was logged after that step is dropped.

        Within, `training` and `evaluation` may be called.
        """
        self._drop_lines_after(start)
        if self._first_host:
            self._events = Events(self.path, start)
        self._batch_size, self._last = batch_size, (start, self._now())
        try:
            yield
        finally:
            if self._events is not None:
                self._events.close()
                self._events = None

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent within does not count for steps_per_sec."""
        started = time.perf_counter()
        yield
        self._untimed += time.perf_counter() - started

    def training(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs the metrics (scalars on the host) of a training step, with the speed since the last call."""
        now, (last_step, last_time) = self._now(), self._last
        self._last = (step, now)
        speed = (step - last_step) / max(now - last_time, 1e-9)
        speeds = {"steps_per_sec": speed, "images_per_sec": speed * self._batch_size}
        self._write(step, {name: float(value) for name, value in metrics.items()} | speeds, "train/")

    def evaluations(self) -> dict[int, dict[str, float]]:
        """What the evaluations measured, by step."""
        lines = [json.loads(line) for line in paths.read(self.path / "metrics.jsonl").splitlines()]
        return {
            line.pop("step"): {name: math.nan if value is None else value for name, value in line.items()}
            for line in lines
            if "loss" not in line
        }

    def configuration(self, step: int, config: Mapping, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Shows the configuration in TensorBoard, as text and as hyper-parameters; what is `changed` comes first."""
        if self._events is None:
            return
        values = flatten(config)
        values = {key: values[key] for key in (*(key for key in changed if key in values), *values)}
        lines = ["| key | value | in the file |", "|---|---|---|"]
        lines += [f"| {k} | {v} | {changed[k][0] if k in changed else ''} |" for k, v in values.items()]
        numbers = {k: v if isinstance(v, int | float | str) else str(v) for k, v in values.items()}
        self._events.configuration(step, "\n".join(lines), numbers)

    def flush(self) -> None:
        """What was logged is there to stay when this process is killed."""
        if self._events is not None:
            self._events.flush()

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of this step was logged before the run went on."""
        return step in self._evaluated

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of an evaluation, and shows the panels it left."""
        self._write(step, {name: float(value) for name, value in metrics.items()}, "")
        if self._events is not None:
            for file in paths.find(self.panels, {".png"})[0][:_MAX_IMAGES]:
                self._events.image(step, file.relative_to(self.path).with_suffix("").as_posix(), read_image(file))
            self.flush()

    def _write(self, step: int, metrics: dict[str, float], prefix: str) -> None:
        if not self._first_host:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        paths.append(self.path / "metrics.jsonl", json.dumps({"step": step} | numbers) + "\n")
        self._events.scalars(step, {prefix + name: value for name, value in metrics.items()})

    def _drop_lines_after(self, step: int) -> None:
        """All hosts must know what was evaluated; the first one alone writes."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = [line for line in paths.read(file).decode().splitlines(keepends=True) if line.endswith("}\n")]
            kept = {line: json.loads(line) for line in lines if json.loads(line)["step"] <= step}
            self._evaluated = {values["step"] for values in kept.values() if "loss" not in values}
            if self._first_host:
                paths.write_text(file, "".join(kept))

    def _now(self) -> float:
        return time.perf_counter() - self._untimed


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with '-dirty' where it was changed; None without one."""
    is_tracked = ["ls-files", "--error-unmatch", __file__]  # an installed copy may lie inside of somebody's repository
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for args in (is_tracked, describe):
            command = ["git", "-C", str(Path(__file__).parent), *args]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.strip()


def environment(mesh: Mesh) -> dict[str, Any]:
    """Commit and versions of what computes, and the devices."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    devices = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    devices |= {"hosts": jax.process_count(), "mesh": dict(mesh.shape)}
    return {"commit": commit(), "versions": versions, "devices": devices}
