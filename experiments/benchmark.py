"""Measures speed and says where the time goes, as JSON with the devices, versions and commit, and as a table.

    python experiments/benchmark.py --cases=input_depth,input_instances [--out=NEW.json] [--compare=OLD.json]
    python experiments/benchmark.py --cases=train --config=configs/nyu.py:backbone=swin_b [--config.batch_size=8]
    python experiments/benchmark.py --cases=predict --config=configs/nyu.py:parallel [--batch=4]
    python experiments/benchmark.py --compare=OLD.json,NEW.json

Cases:
    input_depth        the published NYUv2 recipe of the solver, 480x480 crops of 640x480 files
    input_instances    the published COCO recipe, 640x640 with large-scale jitter
    train              the training step of --config (of --stage, where it has several), and the loop around it
    predict            latency of its prediction with random weights, as a whole and in parts (see latency.py)
    coco_evaluation    pasting, RLE and AP of --images made-up images of 100 objects (see evaluation.py)
    a, b, ... h        pieces of the published set-ups, training steps, backbone and decoding (see pieces.py), and
    window_attention   one layer; peer_torch.py measures some of these in PyTorch, for a ratio on the same machine

Files are built-in scenes, rendered once into --scenes; `train` reads the config's own where its root exists, `predict`
reads none. Numbers per core count the processor's time, not the clock's, so that other programs on the machine hardly
change them. --compare prints new / old of every number.

Every case runs in a process of its own, so that `peak_memory` is its own: `process_bytes` of the host, with imports and
compilation, and `device_bytes` of the device that takes most, where it counts them (GPU, TPU; a CPU's are the
process's). Compiled programs are not taken from a cache. Where GLIBC_TUNABLES is not set, the C
library (of Linux) is told to take huge pages: on a CPU, XLA asks for all memory of a program anew at each run, and
getting it in small pages is up to half of the time.

`flops` are those of all matrix products and convolutions, loops counted as often as they run (see roofline.py);
`share_of_matmul` compares their rate with that of a large matrix product in the same dtype, on the same devices, in the
same process: the roofline.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import evaluation
import jax
import latency
import numpy as np
import pieces
import roofline
import setups
from absl import app, flags
from ml_collections import ConfigDict

from aitok_jax.command_line import overrides
from aitok_jax.config import flatten, ordered, stage_order, unknown
from aitok_jax.data import datasets, object_transforms, pipeline, scenes
from aitok_jax.parallel import overview, sharding
from aitok_jax.training import checkpoint, keys, loop, optim, run_dir, setup

ROOT = Path(__file__).parents[1]
FRAMES, HEIGHT, WIDTH = 24, 480, 640
PUBLISHED = {"input_depth": setups.nyu, "input_instances": setups.coco}  # whose data, and batch size, a case takes
OF_CONFIG = ("train", "predict")
CASES = (*PUBLISHED, *OF_CONFIG, "coco_evaluation", *pieces.CASES)
WARM_UP = 2  # batches or steps before the clock starts


def measure(
    names: list[str], folder: Path, config: ConfigDict | None, images: int = 192, steps: int = 20, batch: int = 1
) -> dict[str, Any]:
    """The report: {'environment', 'cases': {case: numbers}}; every case has a process of its own.

    Args:
      names: of CASES.
      folder: of the scenes, rendered where absent.
      config: of one run, for 'train' and 'predict'.
      images: how many to read for each number of an input case, or to evaluate.
      steps: of the loop of 'train'.
      batch: images of a prediction.

    Raises:
      ValueError: an unknown case, one that needs a config without it, or a config that cannot work.
      OSError: the process of a case was killed.
    """
    for case in names:
        if case not in CASES:
            raise ValueError(f"--cases: {unknown(case, CASES)}")
        if case in OF_CONFIG and config is None:
            raise ValueError(f"--cases={case} needs --config=configs/X.py")
    os.environ.setdefault("GLIBC_TUNABLES", roofline.HUGE_PAGES)  # read when the process of a case starts
    fields = None if config is None else config.to_dict()
    report = {"environment": {}, "cases": {}}
    for case in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                done = pool.submit(_in_process, case, folder, fields, images, steps, batch).result()
            except BrokenProcessPool:
                raise OSError(f"--cases={case}: its process was killed, perhaps for lack of memory") from None
        report["environment"], report["cases"][case] = done
    return report


def _in_process(case: str, folder: Path, fields: dict | None, *options: int) -> tuple[dict, dict]:
    """The environment, and the numbers of a case; for a fresh process, since devices belong to one at a time."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = None if fields is None else ConfigDict(fields)
    numbers = measure_case(case, folder, config, *options)
    return run_dir.environment(sharding.make_mesh()) | {
        "cores": _cores(),
        "tunables": os.environ["GLIBC_TUNABLES"],
    }, numbers


def measure_case(
    case: str, folder: Path, config: ConfigDict | None, images: int, steps: int, batch: int
) -> dict[str, Any]:
    """The numbers of one case, in this process; see `measure`."""
    if case in pieces.CASES:
        return pieces.measure(case)
    if case == "coco_evaluation":
        return evaluation.measure(images)
    if case == "predict":
        return {"config": config.name, **latency.prediction(config, batch)}
    scenes.ensure(folder, train=FRAMES, test=1, height=HEIGHT, width=WIDTH, workers=os.cpu_count() or 1)
    if case == "train":
        return {"config": config.name, **training(on_scenes(config, folder), steps)}
    published = on_scenes(PUBLISHED[case].get_config(), folder)
    numbers = reading(datasets.build(published.data), published.batch_size, images)
    return numbers | {"peak_memory": roofline.peak_memory()}


def reading(data: datasets.Data, batch_size: int, images: int) -> dict[str, Any]:
    """Images a second, on one core and on all, of an input pipeline, and the share of its parts in the time."""
    source, transform = data.train, data.train_transform
    read = _time(lambda: [source.read(i % len(source)) for i in range(images)])
    held = _Held(source)
    parts = {"read": read["cpu"]}
    if isinstance(transform, object_transforms.HostTransform):  # runs in Python, where the transform alone can be timed
        generators = [np.random.default_rng((0, i)) for i in range(images)]
        spent = _time(lambda: [transform(held.read(i % len(held)), rng) for i, rng in enumerate(generators)])
        done = transform(held.read(0), generators[0])
        nothing = object_transforms.HostTransform(lambda example, rng: done, transform.spec)
        parts["transform"] = spent["cpu"]
        parts["batching"] = _pipeline(held, nothing, batch_size, images)["cpu"]
    else:
        parts["transform and batching"] = _pipeline(held, transform, batch_size, images)["cpu"]
    whole = _pipeline(source, transform, batch_size, images)
    return {
        "images_per_s": images / whole["wall"],
        "images_per_s_per_core": images / whole["cpu"],
        "ms_per_image": {name: 1e3 * seconds / images for name, seconds in parts.items()},
        "share": {name: seconds / sum(parts.values()) for name, seconds in parts.items()},
    }


class _Held:
    """A source whose examples are in memory, to leave reading out."""

    def __init__(self, source: Any):
        self.names, self.images = source.names, getattr(source, "images", True)
        self._examples = [source.read(i) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, index: int) -> dict[str, Any]:
        return dict(self._examples[index])


def _pipeline(source: Any, transform: Any, batch_size: int, images: int) -> dict[str, float]:
    """Time of `images` images, in whole batches, once the pipeline runs."""
    batches = pipeline.train_batches(source, transform, batch_size=batch_size, seed=0)
    for _ in range(WARM_UP):
        next(batches)
    count = -(-images // batch_size)
    spent = _time(lambda: [next(batches)["id"] for _ in range(count)])
    return {name: seconds * images / (count * batch_size) for name, seconds in spent.items()}


def training(config: ConfigDict, steps: int) -> dict[str, Any]:
    """Of the config's training step: alone, on one batch; and in the loop, which reads and places every batch."""
    with tempfile.TemporaryDirectory() as folder:
        run = setup.set_up(config, folder)
        optimizer = optim.make_optimizer(config.optim, config.train_steps)
        batches, example = loop.first_batches(run, 0)
        with checkpoint.open_manager(folder) as manager:
            state, shardings = loop.restore_or_init(run, manager, optimizer, example)
        key = loop.random_key(config)
        alone = latency.timed_step(loop.make_step(run, optimizer, shardings), state, example, key)
        state, step = alone.result
        seconds, waiting, placing = _loop(run, step, state, batches, key, steps)
    images = sum(run.config.batch_size.values())
    peak, dtype = roofline.peak_memory(), roofline.compute_dtype(run.task)
    rates = roofline.matmul_rates(run.mesh.devices.flatten().tolist(), dtype)
    numbers = alone.numbers(None, rates[dtype])
    return {
        "step_s": numbers.pop("latency_s"),
        "images_per_s": images / alone.latency_s,
        "loop_step_s": seconds,
        "loop_images_per_s": images / seconds,
        "share_waiting_for_input": waiting / seconds,
        "share_placing_on_devices": placing / seconds,
        "bytes_on_a_device": overview.step_memory(step),
        "peak_memory": peak,
        **numbers,
        "matmul_flops_per_s": rates,
    }


def _loop(run: Any, step: Any, state: Any, batches: Iterator, key: Any, steps: int) -> tuple[float, float, float]:
    """Seconds a step: of the loop as `train` has it, of that waiting for a batch, of that handing it to the devices."""
    waiting = placing = 0.0
    before: Any = {}
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            jax.block_until_ready(before)
            started, waiting, placing = time.perf_counter(), 0.0, 0.0
        asked = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        placed = sharding.shard_batch(batch, run.mesh)
        waiting, placing = waiting + got - asked, placing + time.perf_counter() - got
        state, metrics = step(state, placed, key)
        jax.block_until_ready(before)
        before = metrics
    jax.block_until_ready(before)
    return (time.perf_counter() - started) / steps, waiting / steps, placing / steps


def compare(new: dict, old: dict) -> str:
    """A line 'name: old -> new (ratio)' for every number that both reports have."""
    numbers = [flatten(report["cases"]) for report in (new, old)]
    lines = []
    for name, value in numbers[0].items():
        before = numbers[1].get(name)
        if isinstance(value, int | float) and isinstance(before, int | float) and before:
            lines.append(f"{name}: {before:.4g} -> {value:.4g} ({value / before:.2f}x)")
    return "\n".join(lines)


def read(file: str) -> dict:
    """A report; ValueError for a file that holds none."""
    try:
        report = json.loads(Path(file).read_text())
        return report | {"cases": report["cases"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of this program ({error!r}); give one that --out wrote") from error


def table(report: dict) -> str:
    """A line 'name  value' for every number."""
    numbers = flatten(report["cases"])
    width = max(map(len, numbers), default=0)
    return "\n".join(f"{name:{width}}  {_readable(name, value)}" for name, value in numbers.items())


def _readable(name: str, value: Any) -> str:
    if "bytes" in name:
        return overview.size(value)
    if "flops" in name:
        return f"{value / 1e9:.4g} G"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def on_scenes(config: ConfigDict, folder: Path) -> ConfigDict:
    """A copy that starts from random weights, and reads the scenes where its own data is not there."""
    config = ordered(config)
    config.start_from = {}
    data = config.data
    for part in [data] if "name" in data else data.values():
        if Path(part.root).is_dir():
            continue
        part.root, part.render = str(folder), {}
        if part.name == "nyu":
            part.update({"train_list": "train.txt", "test_list": "test.txt", "test_subfolder": ""})
        else:
            part.update({"train_images": "", "test_images": ""})
            part.update({f"{split}_annotations": f"annotations/instances_{split}.json" for split in ("train", "test")})
    return config


def _time(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock and of the processor, all threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(parsed: overrides.Parsed) -> None:
    options = flags.FLAGS
    try:
        if len(options.compare) > 2:
            raise ValueError(f"--compare={','.join(options.compare)} must name one file, or an old and a new one")
        others = [read(file) for file in options.compare]
        if len(others) == 2:
            print(compare(others[1], others[0]))
            return
        report = measure(
            options.cases, Path(options.scenes), chosen(parsed.config), options.images, options.steps, options.batch
        )
        text = json.dumps(report, indent=2)
        print(text, table(report), sep="\n\n")
        for old in others:
            print("", compare(report, old), sep="\n")
        if options.out:
            Path(options.out).write_text(text + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def chosen(config: ConfigDict | None) -> ConfigDict | None:
    """The config of --config and, where it has stages, of --stage or its last; ValueError for an unknown stage."""
    options = flags.FLAGS
    names = stage_order(config.stages) if config is not None and "stages" in config else []
    if options.stage and options.stage not in names:
        raise ValueError(f"--stage={unknown(options.stage, names)}")
    return config.stages[options.stage or names[-1]] if names else config


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Configuration of the cases 'train' and 'predict', with :arguments.")
    flags.DEFINE_list("cases", list(PUBLISHED), f"What to measure, of {', '.join(CASES)}.")
    flags.DEFINE_string("stage", None, "Stage of the config, where it has several; its last one otherwise.")
    flags.DEFINE_string("scenes", "runs/benchmark_scenes", "Folder of the rendered scenes.")
    flags.DEFINE_integer(
        "images", 192, "Images that an input case reads for each number, or that are evaluated.", lower_bound=1
    )
    flags.DEFINE_integer("steps", 20, "Steps of the training loop.", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Images of a prediction.", lower_bound=1)
    flags.DEFINE_string("out", None, "File for the report.")
    flags.DEFINE_list("compare", [], "Report to compare with; or an old and a new one, and nothing is measured.")
    app.run(main, flags_parser=lambda argv: overrides.parse_flags(argv, keys.run_options))
