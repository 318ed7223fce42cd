"""What is measured on an accelerator, in small on the CPU: the parts, the report, and what becomes of failures."""

import json
import sys

import chip_page
import chip_parts
import chip_steps
import on_a_chip
import pytest

DEVICE = {"packages": {"jax": "1", "numpy": "1", "flax": None}, "kind": "cpu", "platform": "cpu"}
DEVICE |= {"count": 1, "cores": 2}


def test_the_quick_parts_in_small(tmp_path):
    out = tmp_path / "report.json"
    options = ["--small", "--only=attention,steps,decoding", "--configs=vqvae_mask.py;nyu.py:parallel"]
    runs = [run for run in on_a_chip.RUNS if (run.part, run.name) != ("steps", "nyu.py:parallel")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_a_chip, "RUNS", runs)
        assert on_a_chip.main([*options, f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    parts, page = report["parts"], out.with_suffix(".txt").read_text()
    assert list(parts) == ["device", "attention", "steps", "decoding"]
    assert page == chip_page.page(report)
    assert parts["device"]["platform"] == "cpu"
    assert parts["device"]["packages"]["jax"]
    assert parts["device"]["peak_of"] == "measured here"
    assert "plain formula" in parts["attention"]["used"]
    for case in ("window_7_shift_0", "window_12_shift_6"):
        assert max(parts["attention"][case]["float32_relative"].values()) < 1e-5
        assert 0 < max(parts["attention"][case]["bfloat16_relative"].values()) < 2e-2
    (step,) = parts["steps"].values()
    assert step["status"] == "done"
    assert [row["batch"] for row in step["rows"]] == [2, 8]
    for row in step["rows"]:
        assert row["finite"]
        assert 0 < row["mfu"] == pytest.approx(row["gflop"] / row["step_ms"] / parts["device"]["peak_tflops"])
        assert row["bound_ms"] > 0
        assert row["images_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
    decoded = parts["decoding"]["nyu.py:parallel"]
    assert decoded["batch_1"]["tokens"] == decoded["batch_4"]["tokens"] == 16
    assert decoded["batch_4"]["latency_ms"] > decoded["batch_4"]["decode_ms"] > 0
    for heading in ("DEVICE: done", "TRAINING STEPS", "DECODING", "vqvae_mask.py"):
        assert heading in page


def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path):
    failed = on_a_chip.start(on_a_chip.Run("nothing", "nothing", 1, ()), 30, True, {}, tmp_path)
    assert failed["status"] == "failed with exit code 1"
    assert "KeyError: 'nothing'" in failed["said"][-1]
    stopped = on_a_chip.start(on_a_chip.RUNS[0], 0.3, True, {}, tmp_path)
    assert stopped["status"] == "stopped at its time limit"
    assert stopped["seconds"] < 5


def test_parts_are_skipped_with_a_reason(tmp_path):
    out = tmp_path / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_a_chip, "start", lambda *_: {"status": "done", "seconds": 1.0, **DEVICE})
        on_a_chip.main(["--only=attention,profile", f"--out={out}"])
    parts = json.loads(out.read_text())["parts"]
    assert parts["attention"] == {"status": "skipped", "why": "needs flax, not installed here"}
    assert parts["profile"]["why"].startswith("needs flax")
    assert "ATTENTION: skipped: needs flax" in out.with_suffix(".txt").read_text()
    on_a_chip.main(["--minutes=0.01", f"--out={out}"])
    parts = json.loads(out.read_text())["parts"]
    assert parts["device"] == {"status": "skipped", "why": "the 0.01 minutes are used up"}
    assert parts["steps"]["nyu.py"]["why"] == "the device was not found, see the part device"


def test_time_is_shared_out_and_what_is_left_goes_on():
    one, two, three = (on_a_chip.Run(name, name, seconds, ()) for name, seconds in (("a", 20), ("b", 60), ("c", 40)))
    assert on_a_chip.limit(one, [two, three], 480, 8) == 80
    assert on_a_chip.limit(one, [two, three], 60, 8) == 30  # beyond its share of 10
    assert on_a_chip.limit(three, [], 33, 8) == 33
    assert sum(run.seconds for run in on_a_chip.RUNS) <= 480


def test_the_slowest_step_is_profiled():
    rows = {"a": [{"batch": 2, "mfu": 0.01}, {"batch": 8, "mfu": 0.4}], "b": [{"batch": 4, "mfu": 0.2}, {"batch": 9}]}
    steps = {name: {"config": name, "rows": each} for name, each in rows.items()} | {"c": {"status": "skipped"}}
    assert on_a_chip.slowest({"steps": steps}) == {"config": "b", "batch": 4}
    assert on_a_chip.slowest({}) is None


def test_batches_grow_to_the_memory_and_shrink_after_a_failure():
    given = {"device": {"memory_gb": 100 / 0.9 * 1.073741824}, "most": 512}
    row = {"batch": 4, "arguments_gib": 4.0, "peak_gib": 8.0, "step_ms": 100.0}
    assert chip_steps._next(given, [row], 1.0, 1e6) == 96
    assert chip_steps._next(given, [row], 100.0, 50.0) == 0
    assert chip_steps._next(given | {"most": 4}, [row], 1.0, 1e6) == 0
    full = {"batch": 96, "out_of_memory": "RESOURCE_EXHAUSTED"}
    assert chip_steps._next(given, [row, full], 1.0, 1e6) == 48
    assert chip_steps._next(given, [row, full, row | {"batch": 48}], 1.0, 1e6) == 0


def test_operations_of_a_trace_count_without_what_runs_inside():
    def event(name, ts, dur, tid=1):
        return {"ph": "X", "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": {"hlo_op": name}}

    events = [event("while.1", 0, 10), event("dot.3", 1, 4), event("dot.7", 6, 2), event("copy", 20, 6, tid=2)]
    found = chip_steps.largest({"traceEvents": [*events, {"ph": "X", "name": "other", "ts": 0, "dur": 99}]})
    assert [(each["what"], each["ms"], each["runs"]) for each in found] == [
        ("dot", 0.003, 1.0),
        ("copy", 0.003, 0.5),
        ("while", 0.002, 0.5),
    ]
    assert sum(each["share"] for each in found) == pytest.approx(1)


def test_absent_packages_are_stood_in_for(monkeypatch):
    names = ("absent_package", "absent_package.mask")
    monkeypatch.setattr(chip_parts, "STAND_INS", {"absent_package": ("mask",)})
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    chip_parts.add_stand_ins()
    from absent_package import Tool, mask

    assert mask is sys.modules.pop("absent_package.mask")
    assert sys.modules.pop("absent_package")
    for made in (Tool, mask.encode):
        with pytest.raises(ModuleNotFoundError, match="absent_package is not installed"):
            made("anything")
