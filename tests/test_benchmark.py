"""The benchmark: what it reports, and how two reports compare."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import configs

FILE = Path(__file__).parents[1] / "experiments" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_case_is_reported(benchmark, tmp_path, monkeypatch):
    config = configs.load("quickstart", "smoke").stages.tokenizer
    config.task.tokenizer.hidden, config.batch_size, config.eval_batch_size = 4, 8, 8

    def small(name):
        published = load(name)
        published.batch_size, published.data.size = 2, 48
        return published

    load = benchmark.load_config
    monkeypatch.setattr(benchmark, "load_config", small)
    for name, value in {"FRAMES": 3, "HEIGHT": 64, "WIDTH": 80}.items():
        monkeypatch.setattr(benchmark, name, value)
    report = benchmark.measure(list(benchmark.CASES), tmp_path / "scenes", config, images=6, steps=2)
    json.dumps(report)
    environment, cases = report["environment"], report["cases"]
    assert environment["devices"]["count"] == 8
    assert environment["versions"]["jax"]
    assert list(cases) == list(benchmark.CASES)
    for case in ("input_depth", "input_instances"):
        assert cases[case]["images_per_s"] > 0
        assert cases[case]["images_per_s_per_core"] > 0
        np.testing.assert_allclose(sum(cases[case]["share"].values()), 1)
    assert set(cases["input_instances"]["ms_per_image"]) == {"read", "transform", "batching"}
    assert cases["train"]["config"] == "tokenizer"
    assert cases["train"]["images_per_s"] == 8 / cases["train"]["step_s"]
    assert 0 <= cases["train"]["share_waiting_for_input"] <= 1
    assert cases["train"]["bytes_on_a_device"]["temporary"] > 0


def test_reports_compare_number_by_number(benchmark):
    old = {"cases": {"train": {"config": "a", "step_s": 2.0, "gone": 1.0}}}
    new = {"cases": {"train": {"config": "a", "step_s": 1.0, "more": {"x": 3.0}}}}
    assert benchmark.compare(new, old) == "train.step_s: 2 -> 1 (0.50x)"


def test_what_cannot_be_measured_is_a_clear_error(benchmark, tmp_path):
    with pytest.raises(ValueError, match="'input_dept' is unknown; did you mean 'input_depth'"):
        benchmark.measure(["input_dept"], tmp_path, None, 1, 1)
    with pytest.raises(ValueError, match="needs --config"):
        benchmark.measure(["train"], tmp_path, None, 1, 1)
