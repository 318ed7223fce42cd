"""How much arithmetic a program does, how fast its devices could do it, and the memory: the meters of `benchmark.py`.

FLOPs are counted in the program as it is traced, not taken from XLA's cost analysis, which counts the body of a loop
once however often it runs, takes the integers of random numbers for floats, and sees one device's part only.
"""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of GLIBC_TUNABLES
SIDE, CPU_SIDE = 8192, 2048  # of the matrices whose product is timed
LEAST_RUNS, LEAST_SECONDS, MOST_RUNS = 5, 1.0, 100  # of one measurement


def flops(jaxpr: Any, while_steps: int | None = None) -> int:
    """Floating-point operations of all matrix products and convolutions of a program, on all devices together.

    A multiply-add is two. Loops count as often as they run; of a condition the largest branch does; the zeros of
    padding and dilation do not. What is computed again in a backward pass counts again. All else (softmax, norms,
    random numbers) is left out, as is usual for such rates.

    Args:
      jaxpr: `jax.jit(f).trace(*args).jaxpr`.
      while_steps: how often its `while` loops run, which the program does not say.

    Raises:
      ValueError: there are products in a `while` loop, and no `while_steps`.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [flops(each, while_steps) for each in jax.extend.core.jaxprs_in_params(params)]
            if name == "while" and any(inner) and while_steps is None:
                raise ValueError("products in a while loop: give while_steps, the number of times that it runs")
            if name == "cond":
                total += max(inner)
            elif any(inner):
                total += {"scan": params.get("length"), "while": while_steps}.get(name, 1) * sum(inner)
    return total


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    summed = (equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * _volume(equation.outvars[0].aval.shape) * _volume(summed)


def _convolution(equation: Any) -> int:
    params, specs = equation.params, equation.params["dimension_numbers"]
    shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
    # in the order of the dimension numbers: image batch, channels, sides; kernel out, in, sides; result as the image
    image, kernel, out = ([shape[axis] for axis in spec] for shape, spec in zip(shapes, specs, strict=True))
    total = 2 * out[0] * out[1] * kernel[1]
    sides = zip(image[2:], kernel[2:], out[2:], strict=True)
    options = (params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    for (pixels, taps, results), stride, (before, _), spread, reach in zip(sides, *options, strict=True):
        place = np.arange(results)[:, None] * stride + np.arange(taps)[None] * reach - before
        total *= int(np.sum((place >= 0) & (place <= (pixels - 1) * spread) & (place % spread == 0)))
    return total


def _volume(sides: Any) -> int:
    return int(np.prod(list(sides), dtype=np.int64))


def median_seconds(work: Callable[[], Any]) -> tuple[float, int]:
    """(median, runs) of at least 5 runs and a second, after one that does not count; waits for the results."""
    jax.block_until_ready(work())
    spent: list[float] = []
    while len(spent) < LEAST_RUNS or (sum(spent) < LEAST_SECONDS and len(spent) < MOST_RUNS):
        started = time.perf_counter()
        jax.block_until_ready(work())
        spent.append(time.perf_counter() - started)
    return statistics.median(spent), len(spent)


def matmul_rates(devices: Sequence[jax.Device], dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product in float32, in `dtype` and, on accelerators, in bfloat16."""
    names = ("float32", dtype) if devices[0].platform == "cpu" else ("float32", "bfloat16", dtype)
    return {name: matmul_rate(devices, name) for name in dict.fromkeys(names)}


def matmul_rate(devices: Sequence[jax.Device], dtype: str) -> float:
    """FLOP/s of products of square matrices, one on each of the devices at once, at JAX's default precision."""
    side = CPU_SIDE if devices[0].platform == "cpu" else SIDE
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, PartitionSpec("data"))

    def random(seed):
        return jax.random.normal(jax.random.key(seed), (len(devices), side, side), dtype)

    a, b = (jax.jit(random, out_shardings=split)(seed) for seed in range(2))
    traced = jax.jit(jnp.matmul, out_shardings=split).trace(a, b)
    product = traced.lower().compile()
    return flops(traced.jaxpr) / median_seconds(lambda: product(a, b))[0]


def compute_dtype(task: Any) -> str:
    """Of the arithmetic of most of a task: 'float32' or 'bfloat16'."""
    if hasattr(task, "parts"):
        return compute_dtype(next(iter(task.parts.values())))
    return jnp.dtype(task.solver.backbone.dtype if hasattr(task, "solver") else task.tokenizer.dtype).name


def rating(count: int, seconds: float, matmul: float) -> dict[str, float]:
    """Of a program of `count` FLOPs: the rate achieved, and its share of the matrix product's."""
    return {"flops": count, "flops_per_s": count / seconds, "share_of_matmul": count / seconds / matmul}


def peak_memory() -> dict[str, int]:
    """Most bytes so far: of this process, and of the device that took most, where the device says so.

    A high-water mark: it never falls, and holds imports and compilation too.
    """
    peak = {"process_bytes": _process_peak()}
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    device = max((each.get("peak_bytes_in_use", 0) for each in stats), default=0)
    return peak | ({"device_bytes": device} if device else {})


def _process_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with the peak of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
