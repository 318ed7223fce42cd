"""The parts of `on_a_chip.py`, each run in a process of its own: `python experiments/chip_parts.py GIVEN.json`.

GIVEN holds `part`, `result` (the file for the numbers, written anew with every number), `seconds` (of the part's
limit), `small`, `device` (what the part of that name found) and what the part itself takes. Steps and profile are in
`chip_steps.py`, the quickstart in `chip_scenes.py`. Keys of numbers end in their unit. What needs packages is imported
where it is used, so that the others run without them.
"""

import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "ml_collections", "absl", "orbax.checkpoint", "PIL", "scipy")
PACKAGES += ("matplotlib", "tqdm", "pycocotools", "pytest")
DISTRIBUTIONS = {"orbax.checkpoint": "orbax-checkpoint", "absl": "absl-py", "PIL": "pillow"}
STAND_INS = {"matplotlib": ("backends", "backends.backend_agg", "colors", "figure", "patches"), "tqdm": ()}
STAND_INS["pycocotools"] = ("coco", "cocoeval", "mask")
KINDS = {"H200": "h200", "H100": "h100", "A100": "a100", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e"}
"""What the name of a device has in it -> its row of `chips.CHIPS`; the first that fits."""
Given = dict[str, Any]


class Report:
    """Numbers of a part, which a part that is ended leaves as far as it came."""

    def __init__(self, path: str, seconds: float):
        self.path, self.numbers, self.deadline = Path(path), {}, time.monotonic() + seconds

    def __call__(self, **numbers: Any) -> None:
        self.numbers |= numbers
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.numbers, indent=1, default=str))
        unfinished.replace(self.path)

    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()


Part = Callable[[Given, Report], None]


def stand_in(name: str) -> types.ModuleType:
    """A module for one that is absent, imported by all and used by few: what is made of it raises."""

    class Absent(types.ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)

            def refuse(*_, **__):
                raise ModuleNotFoundError(f"{name.partition('.')[0]} is not installed")

            return sys.modules.get(f"{self.__name__}.{attribute}") or type(attribute, (), {"__init__": refuse})

    module = Absent(name)
    module.__path__ = []
    return module


def add_stand_ins() -> None:
    """For the packages of STAND_INS that cannot be imported."""
    for package, modules in STAND_INS.items():
        try:
            importlib.import_module(package)
        except ImportError:
            sys.modules |= {name: stand_in(name) for name in (package, *(f"{package}.{each}" for each in modules))}


def packages() -> dict[str, str | None]:
    """Of those that the project imports: the version, or None where the import fails."""
    found = {}
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            found[name] = importlib.metadata.version(DISTRIBUTIONS.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
        except ImportError:
            found[name] = None
    return found


def device(given: Given, report: Report) -> None:
    """Kind, memory, versions and commit; rates of a matrix product and of a copy, beside those of the makers."""
    report(packages=packages(), python=sys.version.split()[0], commit=_commit())
    import jax
    import jax.numpy as jnp

    first, *_ = devices = jax.devices()
    stats = first.memory_stats() or {}
    report(kind=first.device_kind, platform=first.platform, count=len(devices), cores=os.cpu_count())
    report(memory_gb=stats.get("bytes_limit", (1 if given["small"] else 8) * 10**9) / 1e9)
    side = 1024 if given["small"] else 2048 if first.platform == "cpu" else 8192
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((side, side), dtype)
        seconds = median_s(functools.partial(jax.jit(jnp.matmul), x, x), 1.0)
        report(**{f"{dtype}_tflops": 2 * side**3 / seconds / 1e12})
    x = jnp.ones(16 * side**2)
    report(copy_gb_s=2 * x.nbytes / median_s(functools.partial(jax.jit(jnp.negative), x), 1.0) / 1e9)
    report(**_peak(first.device_kind, report.numbers))


def _peak(kind: str, measured: dict[str, Any]) -> dict[str, Any]:
    """The rates that shares are of: the maker's, or those measured where the device is in no table."""
    known = next((row for part, row in KINDS.items() if part in kind), None)
    rates = {"peak_tflops": measured["float32_tflops"], "hbm_gb_s": measured["copy_gb_s"]}
    if not known:
        return {**rates, "peak_of": "measured here"}
    add_stand_ins()
    try:
        from chips import CHIPS
    except ImportError as error:
        return {**rates, "peak_of": f"measured here, since the table cannot be read: {error}"}
    return {"peak_tflops": CHIPS[known].tflops, "hbm_gb_s": CHIPS[known].hbm_gb_s, "peak_of": f"the maker, {known}"}


def median_s(work: Callable[[], Any], most_s: float, least: int = 3, most: int = 20) -> float:
    """The median of `least` to `most` runs, within about `most_s`, after one that does not count."""
    import jax

    jax.block_until_ready(work())
    spent: list[float] = []
    while len(spent) < least or (sum(spent) < most_s and len(spent) < most):
        started = time.perf_counter()
        jax.block_until_ready(work())
        spent.append(time.perf_counter() - started)
    return sorted(spent)[len(spent) // 2]


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def attention(given: Given, report: Report) -> None:
    """Window attention on the device against the formula on the CPU in float32: output and all gradients."""
    import jax

    from aitok_jax.models import window_attention

    if jax.default_backend() == "tpu":
        report(used="the kernels", self_check_relative=window_attention.self_check())
    else:
        report(used=f"the plain formula, since the kernels are a TPU's and this is a {jax.default_backend()}")
    for window in (7, 12) if given["small"] else (7, 30):
        for shift in (0, window // 2):
            report(**{f"window_{window}_shift_{shift}": _differences(window, shift)})


def _differences(window: int, shift: int) -> dict[str, dict[str, float]]:
    """By dtype, of output and gradients: the largest difference relative to the largest value."""
    import jax
    import numpy as np

    from aitok_jax.models import window_attention
    from aitok_jax.models.swin_v2 import shift_regions

    rng, heads, width = np.random.default_rng(window), 4, 128
    regions = shift_regions(2 * window, 2 * window, window, shift) if shift else None
    formula = window_attention.attention(window, regions, window_attention._plain(window, regions))
    q, k, v, dout = rng.normal(0, 0.5, (4, 8, window**2, width)).astype(np.float32)
    bias = rng.normal(size=(heads, (2 * window - 1) ** 2)).astype(np.float32)

    def compute(q, k, v, bias, dout):
        out, pull = jax.vjp(formula, q, k, v, bias)
        return out, *pull(dout)

    def on(device, precision, *args):
        with jax.default_matmul_precision(precision):
            found = jax.jit(compute)(*jax.device_put(args, device))
        return [np.asarray(x, np.float32) for x in found]

    cpu, device, found = jax.devices("cpu")[0], jax.devices()[0], {}
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        low_v, low_dout = (x.astype(dtype) for x in (v, dout))
        wanted = on(cpu, "highest", q, k, low_v.astype("f4"), bias, low_dout.astype("f4"))
        ours = on(device, precision, q, k, low_v, bias, low_dout)
        pairs = zip(("out", "dq", "dk", "dv", "dbias"), ours, wanted, strict=True)
        found[f"{dtype}_relative"] = {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, a, b in pairs}
    return found


def parity(given: Given, report: Report) -> None:
    """The parity tests on the device, one after the other; failures by name, with the line that says why."""
    import jax
    import pytest

    folders = [ROOT.parent / "shared" / "parity", ROOT / "shared" / "parity", ROOT / "tests" / "parity" / "cases"]
    cases = os.environ.setdefault("AITOK_PARITY_DIR", str(next(folder for folder in folders if folder.is_dir())))
    report(cases=cases, passed=0, failed=0, skipped=0, failures={})

    class Recorder:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items):
            report(tests=len(items))
            items.reverse()  # the longest last

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_setup(self):
            if given["device"]["platform"] != "cpu":  # programs as they are used
                jax.config.update("jax_disable_most_optimizations", False)

        def pytest_collectreport(self, report):
            if report.failed:
                self.count("failed", report.nodeid, report.longrepr)

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                self.count(report.outcome, report.nodeid, report.longrepr)

        def count(self, outcome, name, said):
            crash, failures = getattr(said, "reprcrash", None), report.numbers["failures"]
            if outcome == "failed":
                why = crash.message.splitlines()[0] if crash else str(said).splitlines()[-1]
                failures = failures | {name.removeprefix("tests/parity/"): why[:200]}
            report(**{outcome: report.numbers[outcome] + 1, "failures": failures})

    options = ["-o", "addopts=--strict-markers --import-mode=importlib", "-p", "no:cacheprovider", "-q", "--no-header"]
    chosen = ["tests/parity/test_vqvae.py"] if given["small"] else ["tests/parity"]
    code = pytest.main([*options, "--rootdir", str(ROOT), *chosen], plugins=[Recorder()])
    report(exit_code=int(code))


def decoding(given: Given, report: Report) -> None:
    """All tokens of a batch of images, with random weights; without mirror images, by parts of the prediction."""
    import chip_steps
    import jax
    import latency
    import roofline

    from aitok_jax import tasks

    roofline.LEAST_RUNS, roofline.LEAST_SECONDS = 3, 0.5
    config = chip_steps.configuration(given)
    task = tasks.build(config.task)
    (part,) = task.parts.values()
    one = {name: latency.random_batch(each, 1) for name, each in task.parts.items()}
    params, model_state = latency.random_weights(jax.eval_shape(task.init, jax.random.key(0), one))
    steps = {"memory": (part.memory, params), "decode": (part.decode, params)}
    steps["detokenize"] = (part.detokenize, model_state)
    for count in (1, 4) if given["small"] else (1, 32):
        x, numbers = latency.random_batch(part, count)["image"], {}
        for name, (function, weights) in steps.items():
            program = latency.timed(function, weights, x)
            numbers |= {f"{name}_ms": 1e3 * program.latency_s, f"{name}_compile_s": program.compile_s}
            if name == "decode":
                numbers |= {"tokens": latency.tokens(program.result)}
                numbers["ms_per_token"] = numbers["decode_ms"] / numbers["tokens"]
            x = program.result
            report(**{f"batch_{count}": numbers})
        numbers["latency_ms"] = sum(numbers[f"{name}_ms"] for name in steps)
        numbers["images_s"] = 1e3 * count / numbers["latency_ms"]
        report(**{f"batch_{count}": numbers})


def quickstart(given: Given, report: Report) -> None:
    """The quickstart's joint step on scenes rendered here, from built-in tokenizers, for a minute at most."""
    import chip_scenes

    chip_scenes.train(given, report)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, str(ROOT))
    report = Report(given["result"], given["seconds"])
    if given["part"] == "device":
        return device(given, report)
    add_stand_ins()
    if given["part"] in ("steps", "profile"):
        import chip_steps

        return getattr(chip_steps, given["part"])(given, report)
    return {each.__name__: each for each in (attention, parity, decoding, quickstart)}[given["part"]](given, report)


if __name__ == "__main__":
    main()
