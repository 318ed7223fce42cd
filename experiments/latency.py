"""Latency of prediction, as a whole and in parts: the case `predict` of `benchmark.py`."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import roofline
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.models.layers import INIT_STD


class Program(NamedTuple):
    """A compiled program, and what running it on one input has shown."""

    jaxpr: Any
    compile_s: float
    latency_s: float  # the median
    runs: int
    result: Any

    def numbers(self, while_steps: int | None, matmul: float) -> dict[str, float]:
        rating = roofline.rating(roofline.flops(self.jaxpr, while_steps), self.latency_s, matmul)
        return {"compile_s": self.compile_s, "latency_s": self.latency_s, "runs": self.runs, **rating}


def prediction(config: ConfigDict, batch_size: int) -> dict[str, Any]:
    """Of `predict` of each part, with random weights, on `batch_size` random square images.

    The whole is one program. Its parts are compiled by themselves too: `memory` (backbone and encoder), `decode` (all
    tokens) and `detokenize`; of a tokenizer `encode` and `decode`. `tokens` is the number that an image has, and
    `ms_per_token` a solver's time for one position of `decode`, in all rows of the batch at once; where depth is
    averaged with mirror images, these are rows of their own.

    Raises:
      ValueError: a batch size below 1, or a task that cannot be built.
    """
    if batch_size < 1:
        raise ValueError(f"--batch={batch_size} must be at least 1")
    task = tasks.build(config.task)
    batches = {name: random_batch(part, batch_size) for name, part in task.parts.items()}
    weights = random_weights(jax.eval_shape(task.init, jax.random.key(0), batches))
    timed = {name: _timed_parts(part, *weights, batches[name]) for name, part in task.parts.items()}
    peak = roofline.peak_memory()
    dtype = roofline.compute_dtype(task)
    rates = roofline.matmul_rates(jax.devices()[:1], dtype)
    each = {name: _numbers(programs, batch_size, rates[dtype]) for name, programs in timed.items()}
    shared = {"batch_size": batch_size, "peak_memory": peak, "matmul_flops_per_s": rates}
    return shared | (each if len(each) > 1 else next(iter(each.values())))


def random_batch(part: Any, count: int) -> dict[str, np.ndarray]:
    """What a part predicts from, all of it random: images and masks in 0..1, maps up to 10."""
    rng, size = np.random.default_rng(0), part.image_size
    batch = {"image": rng.random((count, size, size, 3), np.float32), "id": np.arange(count, dtype=np.int32)}
    if part.kind == "maps":
        shape = (count, size, size, *part.modality.map_axes)
        return batch | {part.modality.name: 10 * rng.random(shape, np.float32)}
    return batch | {"instance": rng.random((count, size, size), np.float32)}


def random_weights(shapes: Any) -> Any:
    """Arrays of these shapes and dtypes, normal with the published standard deviation of 0.02, without compiling."""
    rng = np.random.default_rng(0)

    def leaf(x):  # put on the device one by one, so that the host never holds a second copy of all
        return jax.device_put((INIT_STD * rng.standard_normal(x.shape, np.float32)).astype(x.dtype))

    return jax.tree.map(leaf, shapes)


def _timed_parts(part: Any, params: Any, model_state: Any, batch: dict[str, np.ndarray]) -> dict[str, Program]:
    """The parts of a prediction, each of what the one before gives, and the `whole`."""
    if hasattr(part, "solver"):
        given = batch["image"]
        if getattr(part, "flip", False):
            given = np.concatenate([given, given[:, :, ::-1]])
        steps = {"memory": (part.memory, params), "decode": (part.decode, params)}
        steps["detokenize"] = (part.detokenize, model_state)
    else:
        given = part.maps(batch)
        variables = {"params": params, **model_state}
        steps = {
            name: (functools.partial(part.tokenizer.apply, method=name), variables) for name in ("encode", "decode")
        }
    programs = {}
    for name, (function, weights) in steps.items():
        programs[name] = timed(function, weights, given)
        given = programs[name].result
    return programs | {"whole": timed(part.predict, params, model_state, batch)}


def timed(function: Callable[..., Any], *args: Any) -> Program:
    """A function, compiled and run on these arguments."""
    args = jax.device_put(args)
    jaxpr, compiled, compile_s = _compiled(jax.jit(function), *args)
    latency_s, runs = roofline.median_seconds(lambda: compiled(*args))
    return Program(jaxpr, compile_s, latency_s, runs, compiled(*args))


def timed_step(step: Any, state: Any, *inputs: Any) -> Program:
    """A jitted training step, which takes the state it is given; its result is (state after all runs, the program)."""
    jaxpr, compiled, compile_s = _compiled(step, state, *inputs)

    def run():
        nonlocal state
        state, _ = compiled(state, *inputs)
        return state

    latency_s, runs = roofline.median_seconds(run)
    return Program(jaxpr, compile_s, latency_s, runs, (state, compiled))


def _compiled(function: Any, *args: Any) -> tuple[Any, Any, float]:
    """(jaxpr, program, seconds) of a jitted function."""
    started = time.perf_counter()
    traced = function.trace(*args)
    compiled = traced.lower().compile()
    return traced.jaxpr, compiled, time.perf_counter() - started


def tokens(decoded: Any) -> int:
    """How many tokens of an image were decoded, one after the other or at once."""
    return int(decoded.steps) if hasattr(decoded, "steps") else decoded.tokens.shape[1]


def while_steps(decoded: Any) -> int | None:
    """How often the loop over objects ran, which may end early; the steps of depth are counted in the program."""
    return int(decoded.steps) // decoded.tokens.shape[2] if hasattr(decoded, "steps") else None


def _numbers(programs: dict[str, Program], batch_size: int, matmul: float) -> dict[str, Any]:
    if "memory" in programs:
        decoded = programs["decode"].result
        count, loops = tokens(decoded), while_steps(decoded)
        per_token = {"ms_per_token": 1e3 * programs["decode"].latency_s / count}
    else:
        count, loops, per_token = int(np.prod(programs["encode"].result.shape[1:])), None, {}
    numbers = {name: program.numbers(loops, matmul) for name, program in programs.items()}
    whole = numbers.pop("whole")
    rate = {"images_per_s": batch_size / whole["latency_s"], "tokens": count, **per_token}
    return whole | rate | {"parts": numbers}
