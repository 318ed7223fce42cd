"""The report of `on_a_chip.py` as a page of text."""

from collections.abc import Iterator
from typing import Any

COLUMNS = {  # of a training step: heading -> (key, format)
    "batch": ("batch", "d"),
    "compile s": ("compile_s", ".1f"),
    "step ms": ("step_ms", ".1f"),
    "images/s": ("images_s", ".1f"),
    "GFLOP": ("gflop", ".3g"),
    "MFU %": ("mfu", ".1%"),
    "bound ms": ("bound_ms", ".1f"),
    "bound %": ("bound_mfu", ".1%"),
    "HBM GB": ("hbm_gb", ".3g"),
    "plan GiB": ("peak_gib", ".3g"),
    "peak GB": ("peak_gb", ".3g"),
    "loss": ("loss", ".3g"),
}
DECODING = {
    "latency ms": ("latency_ms", ".1f"),
    "memory ms": ("memory_ms", ".1f"),
    "decode ms": ("decode_ms", ".1f"),
    "ms/token": ("ms_per_token", ".3f"),
    "tokens": ("tokens", "d"),
    "images/s": ("images_s", ".1f"),
}


def page(report: dict[str, Any]) -> str:
    """Part by part, as far as there are parts."""
    lines = [f"{report.get('seconds', 0):.0f} s of {60 * report['minutes']:.0f} s{', small' * report['small']}"]
    for part, entry in report["parts"].items():
        lines += ["", *{"steps": _steps, "decoding": _decoding}.get(part, _one)(part, entry)]
    return "\n".join(lines) + "\n"


def _head(part: str, entry: dict[str, Any]) -> str:
    spent = f", {entry['seconds']:.0f} s" if "seconds" in entry else ""
    return f"{part}: {entry['status']}{spent}{': ' * ('why' in entry)}{entry.get('why', '')}"


def _said(entry: dict[str, Any]) -> list[str]:
    return [f"    | {line[:160]}" for line in entry.get("said", ())[-6:]]


def _one(part: str, entry: dict[str, Any]) -> list[str]:
    describe = {"device": _device, "attention": _attention, "parity": _parity, "quickstart": _quickstart}
    described = list({**describe, "profile": _profile}[part](entry)) if entry["status"] != "skipped" else []
    return [_head(part.upper(), entry), *(f"  {line}" for line in described), *_said(entry)]


def _device(entry: dict[str, Any]) -> Iterator[str]:
    if "kind" in entry:
        where = f"{entry['count']} x {entry['kind']} ({entry['platform']})"
        yield f"{where}, {entry.get('memory_gb', 0):.1f} GB usable, {entry['cores']} cores of the host"
    yield f"commit {entry.get('commit')}, python {entry.get('python')}"
    found = entry.get("packages", {})
    yield ", ".join(f"{name} {version}" for name, version in found.items() if version)
    absent = [name for name, version in found.items() if not version]
    yield f"not installed: {', '.join(absent)}; parts that cannot do without say so" if absent else "nothing is missing"
    if "hbm_gb_s" in entry:
        measured = f"{entry['float32_tflops']:.2f} TFLOP/s float32, {entry['bfloat16_tflops']:.2f} bfloat16"
        yield f"measured: {measured}, copy {entry['copy_gb_s']:.0f} GB/s"
        peak = f"{entry['peak_tflops']:.4g} TFLOP/s, bytes of {entry['hbm_gb_s']:.0f} GB/s"
        yield f"MFU is of {peak} ({entry['peak_of']})"


def _attention(entry: dict[str, Any]) -> Iterator[str]:
    yield f"used: {entry.get('used')}"
    if "self_check_relative" in entry:
        yield f"kernels against the formula: {entry['self_check_relative']:.1e}"
    for name, each in entry.items():
        for dtype in ("float32", "bfloat16") if name.startswith("window_") else ():
            differences = ", ".join(f"{k} {v:.1e}" for k, v in each[f"{dtype}_relative"].items())
            yield f"{name:20} {dtype:8} {differences}"


def _parity(entry: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{entry.get(name, 0)} {name}" for name in ("passed", "failed", "skipped"))
    yield f"{counts} of {entry.get('tests', '?')} tests, cases of {entry.get('cases')}"
    yield from (f"{name}: {why}" for name, why in entry.get("failures", {}).items())


def _quickstart(entry: dict[str, Any]) -> Iterator[str]:
    if "first_loss" in entry:
        yield f"{entry['scenes']} scenes rendered in {entry['render_s']:.1f} s, compiled in {entry['compile_s']:.1f} s"
        losses = f"loss {entry['first_loss']:.3f} -> {entry['last_loss']:.3f}"
        yield f"{entry['steps']} steps, {entry['steps_s']:.1f} a second, {losses}, finite: {entry['finite']}"


def _profile(entry: dict[str, Any]) -> Iterator[str]:
    yield f"{entry.get('config')}, batch {entry.get('batch')}; trace in {entry.get('folder')}"
    for each in entry.get("largest", ()):
        yield f"{each['ms']:10.2f} ms {each['share']:6.1%} {each['runs']:7.0f} x  {each['what'][:90]}"


def _steps(part: str, runs: dict[str, Any]) -> list[str]:
    rows = [(name, row) for name, entry in runs.items() for row in entry.get("rows", ())]
    return [f"TRAINING {part.upper()}", *_table(rows, COLUMNS), *_problems(runs)]


def _decoding(part: str, runs: dict[str, Any]) -> list[str]:
    batches = [(name, key, row) for name, entry in runs.items() for key, row in entry.items() if "batch_" in key]
    rows = [(f"{name} {key.replace('_', ' ')}", row) for name, key, row in batches]
    return [f"{part.upper()}, without mirror images", *_table(rows, DECODING), *_problems(runs)]


def _table(rows: list[tuple[str, dict[str, Any]]], columns: dict[str, tuple[str, str]]) -> list[str]:
    width = max([28, *(len(name) for name, _ in rows)])
    lines = [" " * width + "".join(f"{heading:>11}" for heading in columns)]
    for name, row in rows:
        cells = [format(row[key], form) if row.get(key) is not None else "–" for key, form in columns.values()]
        note = "  out of memory" * ("out_of_memory" in row) + "  NOT FINITE" * (row.get("finite") is False)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells) + note)
    return lines


def _problems(runs: dict[str, Any]) -> list[str]:
    lines = []
    for name, entry in runs.items():
        if entry["status"] != "done":
            lines += [_head(name, entry), *_said(entry)]
    return lines
