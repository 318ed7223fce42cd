"""Everything that only an accelerator can say, in at most eight minutes, without TensorFlow and network.

    experiments/on_a_chip.sh [--out=FILE.json] [--minutes=8] [--only=device,steps] [--small]

Parts, one after the other, each in a process with a time limit of its own:
    device      kind, memory, versions, commit, rates of a matrix product and of a copy
    attention   window attention against the plain formula on the CPU
    parity      the tests of tests/parity on the device, with products at the highest precision
    steps       training steps of the published set-ups, at a moderate batch and at one that fills the memory
    decoding    latency of all tokens of 1 and of 32 images
    quickstart  a minute of the joint training on built-in scenes
    profile     the ten largest operations of the step with the lowest MFU, and the trace in a folder beside FILE

The numbers are written to FILE, and as a page of text beside it, after every part. What a part does not use of its
share of the time goes to those after it; parts are skipped once the time is used up. `--small` takes tiny models, to
try all of it on a CPU. This process never touches the device.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import chip_page

HERE = Path(__file__).parent
NEEDED = ("jax", "numpy", "flax")
TRAINING = (*NEEDED, "optax", "ml_collections", "absl", "orbax.checkpoint", "PIL", "scipy")
FIRST_PARTS = ("device", "attention", "parity", "steps", "decoding")
PARTS = (*FIRST_PARTS, "quickstart", "profile")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of --small, where compiling is most of the time
QUICK["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
STRETCH = 1.5  # how far a part may go beyond its share, at the cost of those after it


class Run(NamedTuple):
    """A process of a part.

    Attributes:
        seconds: its share of eight minutes.
        needs: packages.
        given: what the part takes.
        environment: variables of this part alone.
    """

    part: str
    name: str
    seconds: float
    needs: tuple[str, ...]
    given: Mapping[str, Any] = MappingProxyType({})
    environment: Mapping[str, str] = MappingProxyType({})


def _step(config: str, seconds: float, first: int, most: int = 512) -> Run:
    """Of a batch that 80 GB are likely to hold, then of one that fills the memory: to compile is most of the time."""
    return Run("steps", config, seconds, TRAINING, {"config": f"configs/{config}", "first": first, "most": most})


def _decoding(config: str, seconds: float) -> Run:
    return Run("decoding", config, seconds, TRAINING, {"config": f"configs/{config}"})


RUNS = (
    Run("device", "device", 20, ("jax",)),
    Run("attention", "attention", 30, NEEDED),
    Run("parity", "parity", 50, (*TRAINING, "pytest"), {}, {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}),
    _step("nyu.py", 45, 16),
    _step("nyu.py:backbone=swin_l", 40, 16),
    _step("nyu.py:parallel", 30, 16),
    _step("coco.py", 40, 8),
    _step("coco.py:task=detection", 30, 16),
    _step("joint.py", 35, 8),
    _step("vqvae_depth.py", 20, 32),
    _step("vqvae_mask.py", 15, 512, 8192),
    _decoding("nyu.py", 20),
    _decoding("nyu.py:parallel", 20),
    _decoding("coco.py", 35),
    Run("quickstart", "quickstart", 35, TRAINING),
    Run("profile", "profile", 15, TRAINING),
)


def limit(run: Run, later: Sequence[Run], left: float, minutes: float) -> float:
    """Seconds that a part may take, of those that are left for it and later ones."""
    share = left * run.seconds / (run.seconds + sum(each.seconds for each in later))
    return min(left, max(share, STRETCH * run.seconds * minutes / 8))


def start(run: Run, seconds: float, small: bool, device: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The entry of a part that has run: `status`, `seconds`, its numbers, and `said` where it failed."""
    files = {name: folder / f"{run.part}.{name}" for name in ("given", "result", "output")}
    files["result"].unlink(missing_ok=True)
    given = {"part": run.part, "result": str(files["result"]), "seconds": seconds - 2, "small": small, "device": device}
    files["given"].write_text(json.dumps({**given, **run.given}))
    command, began = [sys.executable, str(HERE / "chip_parts.py"), str(files["given"])], time.monotonic()
    with files["output"].open("w") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": HERE.parent, "start_new_session": True}
        process = subprocess.Popen(command, env=_environment(run, device, folder, small), **options)
        try:
            status = "done" if process.wait(seconds) == 0 else f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = "stopped at its time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    numbers = json.loads(files["result"].read_text()) if files["result"].exists() else {}
    entry = {"status": status, "seconds": time.monotonic() - began, "limit_s": seconds, **numbers}
    if status != "done":
        entry["said"] = files["output"].read_text(errors="replace").splitlines()[-15:]
    return entry


def _environment(run: Run, device: dict[str, Any], folder: Path, small: bool) -> dict[str, str]:
    """Of the process of a part: the device first and the CPU beside it, most of the memory, one cache of programs."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    own |= QUICK if small else {}
    variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **own}
    platform = {"gpu": "cuda"}.get(device.get("platform"), device.get("platform"))
    if platform and not os.environ.get("JAX_PLATFORMS"):
        variables["JAX_PLATFORMS"] = platform
    if variables.get("JAX_PLATFORMS") and "cpu" not in variables["JAX_PLATFORMS"]:
        variables["JAX_PLATFORMS"] += ",cpu"
    return variables | run.environment


def missing(run: Run, device: dict[str, Any]) -> list[str]:
    """The packages that a part needs and that are not there."""
    return [name for name in run.needs if device.get("packages", {}).get(name, "?") is None]


def slowest(parts: dict[str, Any]) -> dict[str, Any] | None:
    """Config and batch of the measured step with the lowest MFU."""
    last = {}
    for entry in parts.get("steps", {}).values():
        measured = [row for row in entry.get("rows", ()) if "mfu" in row]
        if measured:
            last[entry["config"]] = measured[-1]
    if not last:
        return None
    config = min(last, key=lambda name: last[name]["mfu"])
    return {"config": config, "batch": last[config]["batch"]}


def _given(run: Run, report: dict[str, Any], options: argparse.Namespace) -> Run | str:
    """The run with all that it takes, or why it is skipped."""
    small = {"first": 2, "most": 8} if options.small and run.part == "steps" else {}
    device = report["parts"].get("device", {})
    if absent := missing(run, device):
        return f"needs {', '.join(absent)}, not installed here"
    if run.part != "device" and "kind" not in device:
        return "the device was not found, see the part device"
    if run.part != "profile":
        return run._replace(given={**run.given, **small})
    chosen, folder = slowest(report["parts"]), options.out.with_name("trace")
    if chosen is None:
        return "no training step was measured"
    folder.mkdir(exist_ok=True)
    return run._replace(given={**chosen, "folder": str(folder.resolve())})


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """The report, written after every part."""
    began = time.monotonic()
    report = {"small": options.small, "minutes": options.minutes, "parts": {}}
    runs = [run for run in RUNS if run.part in ("device", *options.only)]
    if options.configs:
        runs = [run for run in runs if run.part not in ("steps", "decoding") or run.name in options.configs]
    with tempfile.TemporaryDirectory() as folder:
        for i, run in enumerate(runs):
            left, ready = 60 * options.minutes - (time.monotonic() - began), _given(run, report, options)
            if isinstance(ready, str):
                entry = {"status": "skipped", "why": ready}
            elif left < 5:
                entry = {"status": "skipped", "why": f"the {options.minutes:g} minutes are used up"}
            else:
                seconds = limit(run, runs[i + 1 :], left, options.minutes)
                print(f"{run.part} {run.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
                device = report["parts"].get("device", {})
                entry = start(ready, seconds, options.small, device, Path(folder))
            _enter(report, run, entry)
            report["seconds"] = time.monotonic() - began
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            options.out.with_suffix(".txt").write_text(chip_page.page(report))
    return report


def _enter(report: dict[str, Any], run: Run, entry: dict[str, Any]) -> None:
    if run.name == run.part:
        report["parts"][run.part] = entry
    else:
        report["parts"].setdefault(run.part, {})[run.name] = entry


def _arguments() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        if unknown := set(chosen := text.split(",")) - set(PARTS):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
        return chosen

    folder = Path(os.environ.get("OUT", "."))
    parser = argparse.ArgumentParser(prog="experiments/on_a_chip.sh", description="What only an accelerator can say.")
    parser.add_argument("--out", type=Path, default=folder / "on_a_chip.json", help="file (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together (default: %(default)s)")
    parser.add_argument("--only", type=names, default=list(PARTS), help=f"some of {','.join(PARTS)}; device is always")
    parser.add_argument("--configs", type=lambda text: text.split(";"), help="of steps and decoding, between ';'")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments().parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = run_all(options)
    print(chip_page.page(report))
    return 0 if report["parts"]["device"]["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
