"""The published set-ups piece by piece: the cases that `benchmark.py` knows by a letter.

Weights and inputs are random, of the published sizes, on one device; no file is read. Every number is the median of at
least 5 runs on warm programs. `peak_memory` stands with each program, since that of a process never falls; it holds
what came before it in the same case.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import latency
import numpy as np
import roofline
from latency import Program
from ml_collections import ConfigDict
from setups import coco, nyu, vqvae_depth, vqvae_mask

from aitok_jax import tasks
from aitok_jax.models.layers import Widths
from aitok_jax.models.window_attention import WindowAttention
from aitok_jax.parallel import sharding
from aitok_jax.training import loop, optim
from aitok_jax.training.state import TrainState

ATTENTION = {
    "windows": 4,
    "window": 30,
    "heads": 16,
    "width": 512,
}  # a block of Swin-B's third stage at 640x640: 40x40 positions, padded to 60x60


def measure(case: str) -> dict[str, Any]:
    """{'what', one entry of numbers a program, 'matmul_flops_per_s'} of a key of CASES."""
    what, programs = CASES[case]
    timed = {name: (program, dtype, steps, roofline.peak_memory()) for name, program, dtype, steps in programs()}
    dtypes = {dtype for _, dtype, _, _ in timed.values()}
    rates = {dtype: roofline.matmul_rate(jax.devices()[:1], dtype) for dtype in sorted(dtypes | {"float32"})}
    numbers = {
        name: program.numbers(steps, rates[dtype]) | {"peak_memory": peak}
        for name, (program, dtype, steps, peak) in timed.items()
    }
    return {"what": what, **numbers, "matmul_flops_per_s": rates}


Programs = Iterator[tuple[str, Program, str, int | None]]  # name, program, dtype of its products, steps of a while loop


def _depth_tokenizer_step() -> Programs:
    yield _step("step", vqvae_depth.get_config(), 8)


def _depth_tokenizer() -> Programs:
    task, params, model_state = _random(vqvae_depth.get_config())
    (part,), (batch,) = task.parts.values(), _batches(task, 8).values()
    given, variables = part.maps(batch), {"params": params, **model_state}
    for name in ("encode", "decode"):
        program = latency.timed(functools.partial(part.tokenizer.apply, method=name), variables, given)
        yield name, program, roofline.compute_dtype(task), None
        given = program.result


def _mask_tokenizer_step() -> Programs:
    for count in (128, 512):
        yield _step(f"batch_{count}", vqvae_mask.get_config(), count)


def _backbone() -> Programs:
    for configs in (nyu, coco):
        task, params, _ = _random(configs.get_config())
        (batch,) = _batches(task, 1).values()
        program = latency.timed(task.solver.backbone.apply, {"params": params["backbone"]}, batch["image"])
        yield "x".join(map(str, batch["image"].shape[1:3])), program, roofline.compute_dtype(task), None


def _decoding(configs: ModuleType, arg: str | None = None) -> Callable[[], Programs]:
    def programs() -> Programs:
        task, params, _ = _random(configs.get_config(arg))
        (part,), (batch,) = task.parts.values(), _batches(task, 1).values()
        memory = latency.random_weights(jax.eval_shape(part.memory, params, batch["image"]))
        program = latency.timed(part.decode, {"transformer": params["transformer"]}, memory)
        yield "decode", program, roofline.compute_dtype(task), latency.while_steps(program.result)

    return programs


def _depth_step() -> Programs:
    yield _step("step", nyu.get_config(), 1)


def _window_attention() -> Programs:
    windows, window, heads, width = ATTENTION.values()
    layer = WindowAttention(Widths(width, heads, 0), window, window)
    x_NTC = jnp.asarray(np.random.default_rng(0).standard_normal((windows, window**2, width), np.float32))
    params = latency.random_weights(jax.eval_shape(layer.init, jax.random.key(0), x_NTC, None))

    def loss(params, x_NTC):
        return jnp.sum(layer.apply(params, x_NTC, None))

    yield "forward", latency.timed(lambda p, x: layer.apply(p, x, None), params, x_NTC), "float32", None
    yield "gradient", latency.timed(jax.grad(loss, (0, 1)), params, x_NTC), "float32", None


CASES = {
    "a": ("depth VQ-VAE, 480x480, batch 8: training step", _depth_tokenizer_step),
    "b": ("depth VQ-VAE, 480x480, batch 8: encode and decode", _depth_tokenizer),
    "c": ("mask VQ-VAE, 64x64, batch 128 and 512: training step", _mask_tokenizer_step),
    "d": ("Swin-V2-B backbone, one image of 480x480 and of 640x640", _backbone),
    "e": ("depth of one image, 225 soft tokens, one after the other: decoding", _decoding(nyu)),
    "f": ("depth of one image, 225 tokens in one pass: decoding", _decoding(nyu, "parallel")),
    "g": ("objects of one 640x640 image, 2100 soft tokens, one after the other: decoding", _decoding(coco)),
    "h": ("Swin-V2-B depth solver, 480x480, batch 1: training step", _depth_step),
    "window_attention": ("4 windows of 900 positions, 16 heads of width 32: forward and gradient", _window_attention),
}


def _random(config: ConfigDict) -> tuple[tasks.Task, Any, Any]:
    """The task, with random (params, model_state)."""
    task = tasks.build(config.task)
    return task, *latency.random_weights(jax.eval_shape(task.init, jax.random.key(0), _batches(task, 1)))


def _batches(task: tasks.Task, count: int) -> dict[str, dict[str, np.ndarray]]:
    return {name: latency.random_batch(part, count) for name, part in task.parts.items()}


def _step(name: str, config: ConfigDict, count: int) -> tuple[str, Program, str, None]:
    """The training step of `count` examples; its time is all of it, optimizer and moving average included."""
    task, *variables = _random(config)
    optimizer = optim.make_optimizer(config.optim, config.train_steps)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def create(params, model_state):
        return TrainState.create(params, model_state, optimizer, config.ema_decay)

    state = jax.jit(create, donate_argnums=(0, 1))(*variables)
    step = loop.make_step(
        SimpleNamespace(config=config, task=task, mesh=mesh), optimizer, sharding.state_shardings(state, mesh)
    )
    batch = sharding.shard_batch(_batches(task, count), mesh)
    program = latency.timed_step(step, state, batch, loop.random_key(config))
    return name, program, roofline.compute_dtype(task), None
