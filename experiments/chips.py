"""What a training step or a prediction costs on chips that are not there: compiled for them, and read.

    python experiments/chips.py --config=configs/nyu.py[:args] --chip=v5e:4x4 [--per_chip=2] [--fsdp=4]
        [--what=train|predict|decode] [--remat=blocks] [--depths=2,2,2,2] [--schedule] [--out=FILE.json]

compiles the very step that `aitok_jax.main` runs, or the very prediction, and prints memory, arithmetic, bytes through
HBM, collectives, the roofline of each chip and the operations that move most. For TPUs it takes `pip install
".[chips]"`, for GPUs (h100:8) see `GPU_FLAGS`. `--what=predict`, and `decode`, its steps alone, are one chip's.

Bytes are counted by `hlo.py`, since the compiler's cost analysis counts a loop's body once, and on-chip buffers as
traffic; FLOP are those of products and convolutions of the program as it is traced, by `roofline.flops`. Cycles of a
TPU are the compiler's estimates and, with --schedule, those of its schedule for what has none (`schedule.py`); a whole
training step then takes more than twice as long to compile.
"""

import argparse
import collections
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hlo
import jax
import numpy as np
import roofline
import schedule
from jax.experimental import topologies
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))
from aitok_jax import tasks
from aitok_jax.config import translated
from aitok_jax.data import pipeline
from aitok_jax.parallel import sharding
from aitok_jax.training import loop, optim
from aitok_jax.training.state import TrainState

GIB = 2**30
TPU = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
TPU |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"  # there is no device to tune on


class Chip(NamedTuple):
    """Of the makers' tables.

    Attributes:
        tflops: bfloat16, 10¹² a second.
        hbm_gb_s, memory_gb: 10⁹ bytes.
        links_gb_s: what a chip sends to others, 10⁹ bytes a second.
        clock_ghz: of the compiler's cycles; 0 where it has none.
    """

    tflops: float
    hbm_gb_s: float
    memory_gb: float
    links_gb_s: float
    clock_ghz: float = 0.0


CHIPS = {
    "v5e": Chip(197, 819, 16, 200, 1.5),
    "v5p": Chip(459, 2765, 95, 600, 1.75),
    "v6e": Chip(918, 1640, 32, 448, 1.75),
    "a100": Chip(312, 2039, 80, 300),
    "h100": Chip(989, 3350, 80, 450),
    "h200": Chip(989, 4800, 141, 450),
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(chip: str) -> list[Any]:
    """'v5e:4x4' or 'h100:8' -> devices to compile for. ValueError for what is not known, or not installed."""
    kind, _, shape = chip.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"--chip={chip} is unknown; use {', '.join(CHIPS)} with a shape, as in v5e:4x4 or h100:8")
    os.environ |= {name: os.environ.get(name, value) for name, value in TPU.items()}
    try:
        if kind == "h100":
            target = {"target_config": H100, "topology": f"1x1x{shape or 1}"}
            return list(topologies.get_topology_desc(platform="cuda", **target).devices)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape or '2x2'}").devices)
    except Exception as error:  # of the plugin, which may be absent
        raise ValueError(f"--chip={chip} cannot be compiled for here ({error}); install the extra chips") from error


def load_config(path: str) -> ConfigDict:
    """'configs/X.py[:args]' in the form of parts, with bfloat16 arithmetic where 'auto' would see the host's CPU."""
    file, _, arg = path.partition(":")
    module = importlib.import_module(f"configs.{Path(file).stem}")
    config = translated(module.get_config(arg or None))
    for part in ("backbone", "transformer"):
        if "shared" in config.task and config.task.shared[part].get("dtype", "auto") == "auto":
            config.task.shared[part].dtype = "bfloat16"
    return config


def batch_shapes(part: Any, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a training batch, as the data gives it."""
    side, shapes = part.image_size, {}
    if part.kind == "masks":
        return {"instance": jax.ShapeDtypeStruct((count, side, side), np.float32)}
    if hasattr(part, "solver"):
        shapes["image"] = ((count, side, side, 3), np.float32)
    if part.kind == "maps":
        shapes[part.modality.name] = ((count, side, side, *part.modality.map_axes), np.float32)
    else:
        n, crop = part.num_objects, part.mask_size
        shapes |= {"objects/boxes": ((count, n, 4), np.float32), "objects/classes": ((count, n), np.int32)}
        shapes |= {"objects/kind": ((count, n), np.int32), "objects/crops": ((count, n, crop, crop), np.uint8)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def filled_shapes(part: Any, count: int, devices: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The same, filled up by examples of weight 0 where the devices do not divide `count`."""
    rows = pipeline.full_size(count, devices)
    weight = {"weight": jax.ShapeDtypeStruct((rows,), np.float32)} if rows > count else {}
    return batch_shapes(part, rows) | weight


def step_of(config: ConfigDict, mesh: jax.sharding.Mesh, batch: dict[str, int]) -> tuple[Any, tuple]:
    """The jitted training step, and the shapes that it takes."""
    task = tasks.build(config.task)
    split = sharding.batch_sharding(mesh)
    shapes = {name: filled_shapes(part, batch[name], mesh.size) for name, part in task.parts.items()}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes)
    one = {name: batch_shapes(part, 1) for name, part in task.parts.items()}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    optimizer = optim.make_optimizer(config.optim, config.train_steps)

    def create(batch, key):
        params, model_state = task.init(jax.random.wrap_key_data(key), batch)
        return TrainState.create(params, model_state, optimizer, config.ema_decay)

    state = jax.eval_shape(create, one, key)
    shardings = sharding.state_shardings(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    run = SimpleNamespace(config=config, task=task, mesh=mesh)
    return loop.make_step(run, optimizer, shardings), (state, shapes, key)


def prediction_of(config: ConfigDict, device: Any, what: str, count: int) -> tuple[Any, tuple]:
    """The jitted prediction of the first part, on `count` square images, and the shapes that it takes.

    Args:
        what: 'predict'; or 'decode', the steps of the tokens alone, without mirror images.
    """
    task = tasks.build(config.task)
    part = next(iter(task.parts.values()))
    examples = {name: batch_shapes(each, 1) for name, each in task.parts.items()}
    params, model_state = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)), examples)
    batch = {name: x for name, x in batch_shapes(part, count).items() if "/" not in name}
    if what == "decode":
        memory = jax.eval_shape(part.memory, params, batch["image"])
        function, shapes = part.decode, ({"transformer": params["transformer"]}, memory)
    else:
        batch["id"] = jax.ShapeDtypeStruct((count,), np.int32)
        function, shapes = part.predict, (params, model_state, batch)
    one = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(function), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)


def sizes_of(config: ConfigDict, options: argparse.Namespace, chips: int) -> dict[str, int]:
    """Images of a batch, by part: the config's, or as many a chip as asked for, in the same shares."""
    sizes = dict(config.batch_size.items())
    if options.what != "train":
        return {next(iter(sizes)): options.per_chip or 1}
    if not options.per_chip:
        return {name: size * options.times for name, size in sizes.items()}
    factor = options.per_chip * chips / sum(sizes.values())
    return {name: max(round(size * factor), 1) for name, size in sizes.items()}


def measure(config: ConfigDict, options: argparse.Namespace, dumped: Path) -> tuple[dict[str, Any], str]:
    """All numbers, whose names end in their unit and which are a chip's, and the text of the compiled program.

    Args:
        dumped: the folder that schedules are written to, see `schedule.FLAGS`.
    """
    kind, devices = options.chip.partition(":")[0], devices_of(options.chip)
    devices = devices if options.what == "train" else devices[:1]
    sizes = sizes_of(config, options, len(devices))
    if options.what == "train":
        function, shapes = step_of(config, sharding.make_mesh(options.fsdp, devices), sizes)
    else:
        function, shapes = prediction_of(config, devices[0], options.what, *sizes.values())
    started = time.monotonic()
    traced = function.trace(*shapes)
    flops = roofline.flops(traced.jaxpr, _objects(config)) / len(devices)
    lowered = traced.lower()
    middle = time.monotonic()
    compiled = lowered.compile()
    numbers = {"trace_s": middle - started, "compile_s": time.monotonic() - middle, "cpu_s": _cpu_seconds()}
    numbers |= {"devices": len(devices), "batch": sum(sizes.values())}
    text = compiled.as_text()
    cost = _cost(text, schedule.read(dumped), flops, CHIPS[kind], numbers["batch"] / len(devices))
    return numbers | _memory(compiled) | cost, text


def _objects(config: ConfigDict) -> int:
    return max((part.get("num_objects", 1) for part in config.task.parts.values()), default=1)


def _memory(compiled: Any) -> dict[str, float]:
    analysis = compiled.memory_analysis()
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") / GIB for name in ("argument", "output", "alias", "temp")}
    peak = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    return {"arguments_gib": sizes["argument"], "temporaries_gib": sizes["temp"], "peak_gib": peak}


def _cost(text: str, scheduled: dict[str, float], flops: float, chip: Chip, images: float) -> dict[str, Any]:
    program = hlo.Program(text)
    operations = hlo.with_schedule(program.operations(), scheduled)
    exchanged = hlo.collectives(operations)
    moved, sent = hlo.hbm_bytes(operations), sum(entry["bytes"] for entry in exchanged.values())
    times = {"flop_ms": flops / chip.tflops / 1e9, "hbm_ms": moved / chip.hbm_gb_s / 1e6}
    times["links_ms"] = 2 * sent / chip.links_gb_s / 1e6  # an all-reduce sends what it sums twice round a ring
    if chip.clock_ghz:
        times["cycles_ms"] = hlo.cycles(operations) / chip.clock_ghz / 1e6
    if scheduled:
        kernels = [each for each in operations if "pallas_call" in each.label]
        times["kernels_ms"] = hlo.cycles(kernels) / chip.clock_ghz / 1e6  # of those cycles
    step = max(times.values())
    without = collections.Counter()
    for each in hlo.serial(operations, program):
        if each.cycles is None:
            without[f"{each.instruction.opcode} {each.label[-90:]}"] += each.times
    return {
        "gflop": flops / 1e9,
        "hbm_gb": moved / 1e9,
        "collectives": exchanged,
        **times,
        "step_ms": step,
        "mfu": times["flop_ms"] / step,
        "images_s": images / step * 1e3,
        "without_estimate": dict(without),
        "largest": [{"what": what, "gb": size / 1e9, "runs": runs} for what, size, runs in hlo.largest(operations)],
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def report(numbers: dict[str, Any], chip: Chip) -> str:
    lines = [f"compiled in {numbers['trace_s'] + numbers['compile_s']:.0f} s ({numbers['cpu_s']:.0f} s of CPU)"]
    lines.append(
        f"GiB of a chip: {numbers['arguments_gib']:.2f} arguments, {numbers['temporaries_gib']:.2f} temporaries, "
        f"{numbers['peak_gib']:.2f} at the peak, of {chip.memory_gb * 1e9 / GIB:.1f}"
    )
    if numbers["peak_gib"] * GIB > chip.memory_gb * 1e9:
        lines.append(f"THIS DOES NOT FIT: {_advice(numbers, chip.memory_gb * 1e9 / GIB)}")
    lines.append(f"{numbers['gflop']:.0f} GFLOP, {numbers['hbm_gb']:.2f} GB through HBM")
    for kind, entry in numbers["collectives"].items():
        lines.append(
            f"{kind}: {entry['instructions']} instructions, {entry['runs']} runs, {entry['bytes'] / 1e6:.1f} MB"
        )
    times = ", ".join(f"{name.removesuffix('_ms')} {numbers[name]:.2f}" for name in numbers if name.endswith("_ms"))
    lines.append(f"ms: {times}; MFU at most {100 * numbers['mfu']:.0f} %, {numbers['images_s']:.0f} images/s a chip")
    lines += [f"  {each['gb']:8.3f} GB  {each['runs']:5d} x  {each['what']}" for each in numbers["largest"]]
    if numbers["without_estimate"] and chip.clock_ghz:
        lines.append("without an estimate of cycles:")
        lines += [f"  {times:5d} x  {what}" for what, times in numbers["without_estimate"].items()]
    return "\n".join(lines)


def _advice(numbers: dict[str, Any], memory_gib: float) -> str:
    """What would fit, taking the arguments for the state, which fsdp splits, and the temporaries for the examples'."""
    devices, images = numbers["devices"], max(numbers["batch"] // numbers["devices"], 1)
    ways = [(n, m) for m in range(1, images + 1) for n in range(1, devices + 1) if not (devices % n or images % m)]
    for fsdp, parts in ways:
        if numbers["arguments_gib"] / fsdp + numbers["temporaries_gib"] / parts <= 0.9 * memory_gib:
            return (
                f"by these sizes, --fsdp={fsdp} with config.accumulate={parts} should; --remat=blocks may do with less"
            )
    return "take --remat=blocks, or more chips"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python experiments/chips.py", description="Costs on chips not at hand.")
    parser.add_argument("--config", required=True, help="configs/X.py[:args]")
    parser.add_argument("--chip", default="v5e:4x4", help="v5e:4x4, v5p:2x2x1, v6e:4x4, h100:8 (default: %(default)s)")
    parser.add_argument("--what", choices=("train", "predict", "decode"), default="train")
    parser.add_argument("--per_chip", type=int, default=0, help="images a chip (default: the config's batch)")
    parser.add_argument("--times", type=int, default=1, help="the config's batch, so many times")
    parser.add_argument("--fsdp", type=int, default=1, help="chips that share the state")
    parser.add_argument("--remat", default="", help="of backbone and transformer, see layers.REMAT")
    parser.add_argument("--depths", default="", help="blocks a stage, to compile a part of the backbone alone")
    parser.add_argument("--schedule", action="store_true", help="read it for what has no estimate (takes far longer)")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--hlo", type=Path, help="file for the text of the compiled program")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments().parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    dumped = Path(tempfile.mkdtemp())
    gpu = options.chip.startswith(("h100", "h200", "a100"))
    if gpu:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}"
    elif options.schedule:
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {schedule.FLAGS}{dumped}"
    try:
        config = load_config(options.config)
        if options.depths:
            config.task.shared.backbone.depths = tuple(int(n) for n in options.depths.split(","))
        for part in ("backbone", "transformer") if options.remat else ():
            config.task.shared[part].remat = options.remat
        numbers, text = measure(config, options, dumped)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(dumped)
    if options.hlo:
        options.hlo.write_text(text)
    if options.out:
        options.out.write_text(json.dumps(vars(options) | numbers, indent=1, default=str) + "\n")
    print(report(numbers, CHIPS[options.chip.partition(":")[0]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
