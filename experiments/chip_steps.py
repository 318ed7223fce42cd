"""Training steps of the published set-ups on the device at hand, and a profile of one: parts of `on_a_chip.py`."""

import gzip
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chips
import jax
import numpy as np
import roofline
from chip_parts import Given, Report, median_s
from ml_collections import ConfigDict

from aitok_jax.parallel import sharding
from aitok_jax.training import loop

FULL = 0.9  # of the memory, for a batch that fills it
PROFILED = 2  # steps
SHRUNK = {
    "backbone": {
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "windows": (4, 4),
        "pretrain_windows": (4, 4),
        "use_shift": (True, False),
    },
    "transformer": {"dim": 16, "num_heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1},
}


def configuration(given: Given) -> ConfigDict:
    """The set-up `given['config']`, in bfloat16 but on a CPU, and with tiny models where small."""
    config = chips.load_config(given["config"])
    shared = config.task.get("shared", ConfigDict())
    for part in ("backbone", "transformer") if "backbone" in shared else ():
        if given["device"]["platform"] == "cpu":
            shared[part].dtype = "float32"
        if given["small"]:
            shared[part].update(SHRUNK[part])
    for part in config.task.parts.values():
        if "flip" in part:
            part.flip = False
        if given["small"]:
            _shrink(part)
    return config


def _shrink(part: ConfigDict) -> None:
    part.image_size = 32
    if "pad_to" in part:
        part.pad_to = 32
    if "num_objects" in part:
        part.num_objects, part.mask_size = 3, 16
    if part.get("tokenizer"):
        part.tokenizer.update({"hidden": 4, "downsample": 8, "num_res_blocks": 0, "code_dim": 8})


def sizes_of(config: ConfigDict, count: int) -> dict[str, int]:
    """Images of a batch by part, `count` in all, in the shares of the published batch."""
    whole = sum(config.batch_size.values())
    return {name: max(round(size * count / whole), 1) for name, size in config.batch_size.items()}


class Step:
    """The training step of `count` images, compiled; `numbers` has what is known without running it."""

    def __init__(self, config: ConfigDict, given: Given, count: int):
        mesh = sharding.make_mesh(1, jax.devices()[:1])
        sizes = sizes_of(config, count)
        started = time.monotonic()
        function, self.shapes = chips.step_of(config, mesh, sizes)
        traced = function.trace(*self.shapes)
        lowered, middle = traced.lower(), time.monotonic()
        self.compiled = lowered.compile()
        self.key = loop.random_key(config)
        flops = roofline.flops(traced.jaxpr, chips._objects(config))
        self.numbers = {"batch": sum(sizes.values()), "trace_s": middle - started}
        self.numbers |= {"compile_s": time.monotonic() - middle, "gflop": flops / 1e9, **chips._memory(self.compiled)}
        self.peak_flop_ms = flops / given["device"]["peak_tflops"] / 1e9

    def bound(self, device: dict[str, Any]) -> dict[str, Any]:
        """The roofline: the time that arithmetic and bytes of the compiled program take at the peak rates."""
        chip = chips.Chip(device["peak_tflops"], device["hbm_gb_s"], device["memory_gb"], 1.0)
        cost = chips._cost(self.compiled.as_text(), {}, self.numbers["gflop"] * 1e9, chip, self.numbers["batch"])
        return {"hbm_gb": cost["hbm_gb"], "bound_ms": cost["step_ms"], "bound_mfu": cost["mfu"]}

    def arguments(self) -> tuple[Any, Any, Any]:
        """A made-up state and batch, on the device; the optimizer starts at zero."""
        rng = np.random.default_rng(0)
        block = 0.02 * rng.standard_normal(2**20, np.float32)

        def leaf(path, x):
            names = jax.tree_util.keystr(path)
            if ".opt_state" in names or not np.issubdtype(x.dtype, np.floating):
                value = np.zeros(x.shape, x.dtype)
            elif re.search(r"'(scale|cluster_size)'\]$", names):
                value = np.ones(x.shape, x.dtype)
            else:
                value = np.resize(block, x.shape).astype(x.dtype)
            return jax.device_put(value, x.sharding)

        state = jax.tree_util.tree_map_with_path(leaf, self.shapes[0])
        batch = {name: _batch(part, rng) for name, part in self.shapes[1].items()}
        return state, batch, self.key

    def run(self, most_s: float) -> dict[str, Any]:
        """Milliseconds a step, images a second, the share of the peak, and the loss."""
        state, batch, key = self.arguments()
        metrics: dict[str, Any] = {}

        def work():
            nonlocal state, metrics
            state, metrics = self.compiled(state, batch, key)
            return metrics

        step_ms = 1e3 * median_s(work, most_s)
        loss, stats = float(metrics["loss"]), jax.devices()[0].memory_stats() or {}
        numbers = {"step_ms": step_ms, "images_s": 1e3 * self.numbers["batch"] / step_ms}
        numbers |= {"mfu": self.peak_flop_ms / step_ms, "loss": loss, "finite": bool(np.isfinite(loss))}
        return numbers | ({"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {})


def _batch(shapes: dict[str, Any], rng: np.random.Generator) -> dict[str, jax.Array]:
    """Images and masks in 0..1, maps in 1..9, boxes with corners in order; every other object is real."""
    made, side = {}, shapes["image"].shape[1] if "image" in shapes else 1
    for name, x in shapes.items():
        if name == "objects/boxes":
            value = np.sort(rng.uniform(0, side, (*x.shape[:2], 2, 2)), 2).reshape(x.shape)
        elif name == "objects/classes":
            value = np.where(np.arange(x.shape[1]) % 2, -1, rng.integers(0, 80, x.shape))
        elif name == "objects/kind":
            value = np.broadcast_to(np.arange(x.shape[1]) % 2, x.shape)
        elif x.dtype == np.uint8:
            value = rng.integers(0, 2, x.shape)
        else:
            value = rng.random(x.shape, np.float32)
            value = value if name in ("image", "instance") else 1 + 8 * value
        made[name] = jax.device_put(np.asarray(value, x.dtype), x.sharding)
    return made


def steps(given: Given, report: Report) -> None:
    """A row for the first batch, then for one that fills the memory, as far as there is time."""
    config, rows = configuration(given), []
    count = (
        given["first"] if given["small"] else max(int(given["first"] * min(1, given["device"]["memory_gb"] / 72)), 1)
    )
    report(config=given["config"], rows=rows)
    while count:
        began, row = time.monotonic(), {"batch": count}
        rows.append(row)
        try:
            step = Step(config, given, count)
            row |= step.numbers
            report(rows=rows)
            row |= step.run(min(5.0, report.left() / 4))
            report(rows=rows)
            row |= step.bound(given["device"])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["out_of_memory"] = str(error).splitlines()[0][:200]
        report(rows=rows)
        step, spent = None, time.monotonic() - began
        count = _next(given, rows, 1.3 * spent, report.left())


def _next(given: Given, rows: list[dict], needed_s: float, left_s: float) -> int:
    """Images of the next batch: what the memory is likely to hold; fewer after a failure; 0 at the end, or for lack of
    time."""
    *_, last = rows
    if left_s < needed_s or len(rows) > 4:
        return 0
    if "out_of_memory" in last:
        half = last["batch"] // 2
        return half if half > max((row["batch"] for row in rows if "mfu" in row), default=0) else 0
    if len(rows) > 1:
        return 0
    limit = FULL * given["device"]["memory_gb"] * 1e9 / chips.GIB
    fixed = last["arguments_gib"]
    for_all = (limit - fixed) * last["batch"] / max(last["peak_gib"] - fixed, 1e-3)
    in_time = (left_s - needed_s) / 6 / (last["step_ms"] / last["batch"] / 1e3)
    count = int(min(for_all, in_time, given["most"]))
    count -= count % 8 if count > 8 else 0
    return count if count > last["batch"] else 0


def profile(given: Given, report: Report) -> None:
    """Traces two steps into `given['folder']` and adds up its operations."""
    config, folder = configuration(given), Path(given["folder"])
    step = Step(config, given, given["batch"])
    state, batch, key = step.arguments()
    state, _ = jax.block_until_ready(step.compiled(state, batch, key))
    report(config=given["config"], batch=given["batch"], folder=str(folder))
    raw = folder / "raw"
    with jax.profiler.trace(str(raw)):
        for _ in range(PROFILED):
            state, metrics = step.compiled(state, batch, key)
        jax.block_until_ready(metrics)
    for file in raw.rglob("*.*"):
        if file.is_file():
            shutil.move(file, folder / file.name)
    shutil.rmtree(raw)
    traces = sorted(folder.glob("*.trace.json.gz"))
    if traces:
        report(largest=largest(json.loads(gzip.decompress(traces[-1].read_bytes()))))
    else:
        report(largest=[], why="no .trace.json.gz was written")


def largest(trace: dict[str, Any], count: int = 10) -> list[dict[str, Any]]:
    """Operations of a trace in Chrome's form by their own time (without what runs inside): name, ms and runs a step."""
    threads, spent, runs = {}, Counter(), Counter()
    events = trace["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    lines = {name for place, name in names.items() if place in threads}
    for place, own in threads.items():
        if "XLA Ops" in lines and names.get(place) != "XLA Ops":
            continue
        for event, microseconds in _own_time(own):
            name = re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])
            spent[name] += microseconds
            runs[name] += 1
    total = sum(spent.values()) or 1.0
    each = spent.most_common(count)
    return [
        {"what": name, "ms": us / 1e3 / PROFILED, "runs": runs[name] / PROFILED, "share": us / total}
        for name, us in each
    ]


def _own_time(events: list[dict]) -> list[tuple[dict, float]]:
    """Events of one thread with their duration less that of the events inside them."""
    own, inside = [], []
    for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0))):
        while inside and inside[-1][0]["ts"] + inside[-1][0].get("dur", 0) <= event["ts"]:
            own.append(tuple(inside.pop()))
        if inside:
            inside[-1][1] -= event.get("dur", 0)
        inside.append([event, event.get("dur", 0)])
    return own + [tuple(each) for each in inside]
