"""A run of a toy task as a process of its own, for tests that kill, stop, starve and restart it.

A fork server has imported everything, so that a process starts in a fraction of a second.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from aitok_jax import main, tasks
from aitok_jax.data import pipeline
from aitok_jax.models import losses
from aitok_jax.training import checkpoint, events, loop, preemption, run_dir, setup

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["aitok_jax.main", "pytest"])
PACE = 0.01  # seconds at least between two steps, so that on any machine a test can signal before the last of them


@dataclasses.dataclass(frozen=True)
class LinePart:
    """Predicts depth = image @ kernel."""

    kind: ClassVar[str] = "maps"
    image_size: int = 4

    def predict(self, params, model_state, batch):
        hidden = jnp.einsum("bhwc,cd->bhwd", batch["image"], params["dense"]["kernel"])
        return {"depth": (hidden + params["dense"]["bias"].reshape(1, 1, 1, -1)).sum(-1)}


class LineTask:
    """Fits its part with noise from the step's key; counts its steps in model_state."""

    parts: ClassVar[dict[str, LinePart]] = {"line": LinePart()}
    noise = 0.1

    def init(self, rng, batches):
        params = {"dense": {"kernel": 0.1 * jax.random.normal(rng, (3, 8)), "bias": jnp.zeros(8)}}
        ballast = jax.random.normal(rng, (64, 1024))  # 256 KiB that do not compress
        return params, {"seen": {"count": jnp.zeros((), jnp.int32)}, "ballast": ballast}

    def loss(self, params, model_state, batches, rng):
        batch = batches["line"]
        error = self.parts["line"].predict(params, model_state, batch)["depth"] - batch["depth"]
        error = error + self.noise * jax.random.normal(rng, error.shape)
        count = model_state["seen"]["count"] + 1
        return losses.mean(error**2, batch.get("weight")), ({}, model_state | {"seen": {"count": count}})


def batch(seed, step, size):
    image = np.random.default_rng((seed, step)).random((size, 4, 4, 3), np.float32)
    return {"image": image, "depth": image.sum(-1), "id": np.arange(size)}


def config(**changes):
    optim = {"name": "adamw", "learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    optim |= {"layer_decay": 1.0, "clip_norm": 10.0, "warmup_steps": 2, "warmup_ratio": 0.1}
    return ConfigDict(
        {
            "name": "line",
            "seed": 3,
            "task": {"name": "line"},
            "data": {},
            "batch_size": 8,
            "eval_batch_size": 8,
            "train_steps": 40,
            "log_every": 1,
            "eval_every": 10,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "best_metric": "line/error",
            "ema_decay": 0.9,
            "fsdp": 1,
            "optim": optim | {"schedule": {"name": "constant"}},
        }
        | changes
    ).lock()


def fill_up(batch, shards):
    """As `pipeline.train_batches` fills batches up, on one host."""
    size = len(batch["id"])
    rows = pipeline.full_size(size, shards)
    return batch if rows == size else pipeline.fill_up(batch, rows, real=size)


def _train_batches(source, transform, *, batch_size, seed, start_step, process_index, process_count, shards):
    local = pipeline.full_size(batch_size, shards) // process_count
    rows = slice(local * process_index, local * (process_index + 1))
    for step in itertools.count(start_step):
        time.sleep(0.01)  # so that a signal comes before the end
        full = fill_up(batch(seed, step, batch_size), shards)
        yield {name: values[rows] for name, values in full.items()}


def _evaluate(part, params, model_state, data, *, batch_size, prefix, **_):
    example = {name: jnp.asarray(value) for name, value in batch(99, 0, batch_size).items()}
    error = jnp.abs(part.predict(params, model_state, example)["depth"] - example["depth"]).mean()
    return {f"{prefix}/error": float(error)}


def _run(values, workdir, *, devices, cache, output, slow, file_limit, stages, host):
    """In the new process: everything from here on is what a user's process does, but for task, data and TensorBoard."""
    with Path(output).open("a", buffering=1) as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: an OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def sleepy(function, name):
        def wrapped(*args, **options):
            if name == slow:
                Path(workdir, "asleep").touch()
                time.sleep(60)
            return function(*args, **options)

        return wrapped

    loop.sharding.MIN_SHARDED_BYTES = 64
    if host is not None:
        number, address = host
        jax.distributed.initialize(address, num_processes=2, process_id=number)
    tasks.build = lambda _: LineTask()
    setup.datasets.build = lambda config, modality: SimpleNamespace(train=None, train_transform=None, fingerprint=dict)
    loop.pipeline.train_batches = _train_batches
    loop.evaluators.metric_names = lambda _: ("error",)
    loop.evaluators.check_data = lambda *_: None
    loop.evaluators.evaluate = sleepy(_evaluate, "evaluation")
    checkpoint.save = sleepy(checkpoint.save, "save")
    loop._compile = sleepy(loop._compile, "compilation")
    calls = ("write_scalars", "write_texts", "write_hparams", "flush", "close")
    silent = SimpleNamespace(**dict.fromkeys(calls, lambda *_: None))
    events._writer = lambda _: silent
    run_dir.commit = lambda: None
    run = ConfigDict({"stages": {name: values for name in stages}}) if stages else ConfigDict(values)
    with preemption.handled():
        main.run(run.lock(), workdir)


def start(workdir, *, cache, devices=1, slow="", file_limit=0, stages=(), host=None, **changes):
    """Starts the run in `workdir`; its output goes to WORKDIR.log. Returns the process.

    Args:
      devices: simulated devices.
      slow: 'compilation', 'evaluation' or 'save', where the process writes the file WORKDIR/asleep and sleeps.
      file_limit: bytes that a file may have at most, where not 0.
      stages: names of stages; each is the same run.
      host: (number, address of the coordinator) where the process is one of two hosts.
    """
    workdir = Path(workdir)
    options = {"devices": devices, "cache": cache, "output": workdir.with_suffix(".log"), "slow": slow, "host": host}
    options |= {"file_limit": file_limit, "stages": stages}
    process = CONTEXT.Process(target=_run, args=(config(**changes).to_dict(), workdir), kwargs=options, daemon=True)
    process.start()
    return process


def finish(process, timeout=60):
    """The exit code."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the run does not end")
    return process.exitcode


def output(workdir):
    return Path(workdir).with_suffix(".log").read_text()


def lines(workdir):
    text = Path(workdir, "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]
    return [{k: v for k, v in line.items() if not k.endswith("_per_sec")} for line in records]


def wait_for(condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not happen")
        time.sleep(0.005)


def state(workdir, step=None):
    """All of a checkpoint, as NumPy arrays."""
    step = checkpoint.latest_step(workdir) if step is None else step
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        restored = checkpointer.restore(Path(workdir, "checkpoints", str(step), "state").resolve())
    return jax.tree.map(np.asarray, restored)
