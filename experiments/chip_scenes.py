"""The quickstart's joint training on scenes rendered in this process, without TensorFlow: a part of `on_a_chip.py`."""

import math
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from chip_parts import Given, Report

from aitok_jax import tasks
from aitok_jax.config import translated
from aitok_jax.data import object_transforms
from aitok_jax.parallel import sharding
from aitok_jax.scenes.render import Scene, render
from aitok_jax.training import loop, optim, warm_start
from aitok_jax.training.state import TrainState
from configs import quickstart

SCENES, SECONDS = 512, 60.0
BUILTIN = dict.fromkeys(("model_state/depth_tokenizer", "model_state/mask_tokenizer"), "builtin")


def train(given: Given, report: Report) -> None:
    """Steps a second, and the loss at the start and at the end: means of ten steps."""
    started = time.monotonic()
    scenes = [render(seed, quickstart.SIZE, quickstart.SIZE) for seed in range(64 if given["small"] else SCENES)]
    report(scenes=len(scenes), render_s=time.monotonic() - started)
    config = translated(quickstart.get_config().stages.joint)
    config.start_from = BUILTIN
    run = SimpleNamespace(config=config, task=tasks.build(config.task), mesh=sharding.make_mesh(1, jax.devices()[:1]))
    batches = _batches(config, scenes)
    step, state, key = _compiled(run, next(batches))
    report(compile_s=time.monotonic() - started - report.numbers["render_s"])
    losses, began = [], time.monotonic()
    until = min(SECONDS / 4 if given["small"] else SECONDS, report.left() - 5)
    while time.monotonic() - began < until:
        state, metrics = step(state, sharding.shard_batch(next(batches), run.mesh), key)
        losses.append(float(metrics["loss"]))
        if len(losses) % 50 == 1:
            _report(report, losses, time.monotonic() - began)
    _report(report, losses, time.monotonic() - began)


def _report(report: Report, losses: list[float], seconds: float) -> None:
    numbers = {"steps": len(losses), "steps_s": len(losses) / max(seconds, 1e-6)}
    if losses:
        first, last = (float(np.mean(some)) for some in (losses[:10], losses[-10:]))
        numbers |= {"first_loss": first, "last_loss": last, "finite": all(map(math.isfinite, losses))}
    report(**numbers)


def _compiled(run: SimpleNamespace, example: dict) -> tuple[Any, TrainState, np.ndarray]:
    """The step, the state that it starts from, and its key."""
    config, key = run.config, loop.random_key(run.config)
    optimizer = optim.make_optimizer(config.optim, config.train_steps)
    placed = sharding.shard_batch(example, run.mesh)
    variables = jax.jit(lambda batch, key: run.task.init(jax.random.wrap_key_data(key), batch))(placed, key)
    variables = warm_start.start_from(dict(zip(("params", "model_state"), variables, strict=True)), config)

    def create(variables):
        return TrainState.create(variables["params"], variables["model_state"], optimizer, config.ema_decay)

    shardings = sharding.state_shardings(jax.eval_shape(create, variables), run.mesh)
    state = jax.jit(create, out_shardings=shardings)(variables)
    return loop.make_step(run, optimizer, shardings).lower(state, placed, key).compile(), state, key


def _batches(config: Any, scenes: list[Scene]) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Batches for ever: depth mirrored by chance, objects as by the reader of COCO."""
    fields = config.data.instances
    size, crop = quickstart.SIZE, quickstart.CROP
    objects = object_transforms.training(size, quickstart.OBJECTS, crop, tuple(fields.jitter), fields.order)
    rng, sizes = np.random.default_rng(0), config.batch_size
    while True:
        rows = [_depth(scenes[i], rng) for i in rng.integers(0, len(scenes), sizes.depth)]
        others = [objects(_example(scenes[i]), rng) for i in rng.integers(0, len(scenes), sizes.instances)]
        yield {"depth": _stacked(rows), "instances": _stacked(others)}


def _depth(scene: Scene, rng: np.random.Generator) -> dict[str, np.ndarray]:
    turn = -1 if rng.random() < 0.5 else 1
    return {"image": np.float32(scene.image[:, ::turn]) / 255, "depth": scene.sensor_depth[:, ::turn]}


def _example(scene: Scene) -> dict[str, np.ndarray]:
    return {"image": scene.image, "boxes": scene.boxes, "classes": scene.classes, "masks": scene.masks.astype(np.uint8)}


def _stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
