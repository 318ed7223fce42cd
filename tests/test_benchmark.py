"""The benchmark: what it reports, how it counts, and how two reports compare."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import config_files
import jax
import jax.numpy as jnp
import latency
import numpy as np
import pieces
import pytest
import roofline
import tiny_objects
import tiny_runs
from ml_collections import ConfigDict

FILE = Path(benchmark.__file__)


OWN = {"image_size": 16, "pad_to": 24, "tokenizer": tiny_runs.TOKENIZER}  # depth, beside the objects of 24 pixels
SHARED = {**tiny_objects.SHARED, "vocabulary": tiny_objects.VOCABULARY}
JOINT = {"name": "joint", "shared": SHARED, "depth": OWN, "instances": tiny_objects.OWN}
PARALLEL = {"name": "depth", **SHARED, **OWN, "soft_input": False}
PARALLEL["transformer"] = {**SHARED["transformer"], "parallel": True}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"LEAST_RUNS": 1, "LEAST_SECONDS": 0.0, "CPU_SIDE": 64}.items():
        monkeypatch.setattr(roofline, name, value)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_every_case_is_reported(tmp_path, monkeypatch):
    config = config_files.load("quickstart", "smoke").stages.tokenizer
    config.task.tokenizer.hidden, config.batch_size, config.eval_batch_size = 4, 8, 8

    def small(configs):
        published = configs.get_config()
        published.batch_size, published.data.size = 2, 48
        return SimpleNamespace(get_config=lambda: published)

    monkeypatch.setattr(benchmark, "PUBLISHED", {case: small(configs) for case, configs in benchmark.PUBLISHED.items()})
    for name, value in {"FRAMES": 3, "HEIGHT": 64, "WIDTH": 80}.items():
        monkeypatch.setattr(benchmark, name, value)
    options = {"images": 6, "steps": 2, "batch": 3}
    names = (*benchmark.PUBLISHED, *benchmark.OF_CONFIG, "coco_evaluation")
    cases = {case: benchmark.measure_case(case, tmp_path / "scenes", config, **options) for case in names}
    for case in ("input_depth", "input_instances"):
        assert cases[case]["images_per_s"] > 0
        assert cases[case]["images_per_s_per_core"] > 0
        np.testing.assert_allclose(sum(cases[case]["share"].values()), 1)
    assert set(cases["input_instances"]["ms_per_image"]) == {"read", "transform", "batching"}
    assert cases["coco_evaluation"]["mask_ap"] > 0.3  # results near the objects, and 90 others an image
    assert cases["coco_evaluation"]["paste_and_rle_ms_per_image"] > 0
    train, predict = cases["train"], cases["predict"]
    assert train["config"] == predict["config"] == "tokenizer"
    assert train["images_per_s"] == 8 / train["step_s"]
    assert 0 <= train["share_waiting_for_input"] <= 1
    assert train["bytes_on_a_device"]["temporary"] > 0
    assert predict["batch_size"] == 3
    assert predict["images_per_s"] == 3 / predict["latency_s"]
    assert set(predict["parts"]) == {"encode", "decode"}
    # a step of 8 images sees them forwards and, but for the gradient of the image, twice backwards; the products of
    # kernel gradients also run over the rim, which is much of a small map
    assert 2 < train["flops"] / 8 / (predict["flops"] / 3) < 3.5
    for numbers in (train, predict):
        seconds = numbers["step_s"] if numbers is train else numbers["latency_s"]
        np.testing.assert_allclose(numbers["flops_per_s"], numbers["flops"] / seconds)
        peak = numbers["matmul_flops_per_s"]["float32"]
        np.testing.assert_allclose(numbers["share_of_matmul"], numbers["flops_per_s"] / peak)
    assert all(numbers["peak_memory"]["process_bytes"] > 2**27 for numbers in cases.values())


def test_a_prediction_is_the_sum_of_its_parts():
    joint = latency.prediction(ConfigDict({"name": "joint", "task": JOINT}), 2)
    depth, instances = joint["depth"], joint["instances"]
    parallel = latency.prediction(ConfigDict({"name": "depth", "task": PARALLEL}), 1)
    assert depth["tokens"] == parallel["tokens"] == 4
    assert instances["tokens"] == tiny_objects.OBJECTS * tiny_objects.LENGTH
    for numbers in (depth, instances, parallel):
        assert list(numbers["parts"]) == ["memory", "decode", "detokenize"]
        assert numbers["flops"] == sum(part["flops"] for part in numbers["parts"].values())
        spent = numbers["parts"]["decode"]["latency_s"]
        np.testing.assert_allclose(numbers["ms_per_token"], 1e3 * spent / numbers["tokens"])
    one_pass, steps = parallel["parts"], depth["parts"]  # of 2 squares and of 4, mirror images among them
    assert instances["parts"]["memory"]["flops"] == one_pass["memory"]["flops"] < steps["memory"]["flops"]
    # a step attends to the whole cache, so that all steps multiply as much as one pass, and embed soft tokens besides
    soft_tokens = 2 * 4 * 4 * tiny_objects.CODES * SHARED["transformer"]["dim"]
    assert steps["decode"]["flops"] == 2 * one_pass["decode"]["flops"] + soft_tokens


def test_pieces_of_the_published_set_ups(tmp_path, monkeypatch):
    tiny = {
        "vqvae_depth": {"name": "depth_tokenizer", "image_size": 32, "tokenizer": tiny_runs.TOKENIZER},
        "vqvae_mask": {"name": "mask_tokenizer", "image_size": 16, "tokenizer": tiny_runs.MASKS},
        "nyu": {"name": "depth", **SHARED, **OWN},
        "nyu:parallel": PARALLEL,
        "coco": {"name": "instances", **SHARED, **tiny_objects.OWN},
    }

    def small(name, get_config):
        def tiny_config(arg=None):
            config = get_config()
            config.task = ConfigDict(tiny[f"{name}:{arg}" if arg else name])
            return config

        return tiny_config

    for name in ("vqvae_depth", "vqvae_mask", "nyu", "coco"):
        module = getattr(pieces, name)
        monkeypatch.setattr(module, "get_config", small(name, module.get_config))
    monkeypatch.setattr(pieces, "ATTENTION", {"windows": 3, "window": 4, "heads": 2, "width": 8})
    done = {case: benchmark.measure_case(case, tmp_path, None, 1, 1, 1) for case in pieces.CASES}
    programs = {
        "a": ["step"],
        "b": ["encode", "decode"],
        "c": ["batch_128", "batch_512"],
        "d": ["16x16", "24x24"],
        "e": ["decode"],
        "f": ["decode"],
        "g": ["decode"],
        "h": ["step"],
        "window_attention": ["forward", "gradient"],
    }
    for case, names in programs.items():
        assert list(done[case]) == ["what", *names, "matmul_flops_per_s"]
        for name in names:
            numbers = done[case][name]
            assert numbers["latency_s"] > 0
            assert numbers["compile_s"] > 0
            assert numbers["peak_memory"]["process_bytes"] > 2**27
            np.testing.assert_allclose(numbers["flops_per_s"], numbers["flops"] / numbers["latency_s"])
    flops = {case: [done[case][name]["flops"] for name in names] for case, names in programs.items()}
    assert 2 < flops["a"][0] / sum(flops["b"]) < 3.5
    assert flops["c"][1] == 4 * flops["c"][0]
    soft_tokens = 2 * 4 * tiny_objects.CODES * SHARED["transformer"]["dim"]
    assert flops["e"][0] == flops["f"][0] + soft_tokens
    n, t, c, heads = 3, 16, 8, 2
    lengths = 4 * heads  # of the queries and keys of every head, and back to its channels
    assert flops["window_attention"][0] == 2 * n * t * c * (4 * c + 2 * t + lengths) + 2 * 49 * 512 * (2 + heads)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(7, 5), (5, 3)], 2 * 7 * 5 * 3),
        (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 6, 3, 4), (2, 5, 3, 4)], 2 * 2 * 3 * 6 * 5 * 4),
        (lambda a, b: jax.lax.map(lambda x: x @ b, a), [(9, 2, 4), (4, 3)], 9 * 2 * 2 * 4 * 3),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b.T @ b), [(2, 4), (4, 3)], 3 * 48),
        (jax.checkpoint(lambda a: jax.nn.relu(jnp.tanh(a)) + a), [(4, 4)], 0),
    ],
)
def test_products_are_counted(function, shapes, expected):
    assert roofline.flops(jax.jit(function).trace(*map(jnp.ones, shapes)).jaxpr) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 2), "padding": "SAME"},
        {"window_strides": (1, 1), "padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 2)},
        {"window_strides": (1, 2), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_convolutions_are_counted_as_xla_counts_them(options):
    channels = 4 // options.get("feature_group_count", 1)

    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    traced = jax.jit(convolve).trace(jnp.ones((3, 9, 8, 4)), jnp.ones((4, 3, channels, 6)))
    assert roofline.flops(traced.jaxpr) == traced.lower().cost_analysis()["flops"]


def test_loops_of_unknown_length_need_their_steps():
    def power(a, n):
        return jax.lax.while_loop(lambda carry: carry[0] < n, lambda carry: (carry[0] + 1, carry[1] @ a), (0, a))

    jaxpr = jax.jit(power).trace(jnp.ones((4, 4)), 3).jaxpr
    assert roofline.flops(jaxpr, 3) == 3 * 2 * 4**3
    with pytest.raises(ValueError, match="give while_steps"):
        roofline.flops(jaxpr)


def test_a_case_has_a_process_of_its_own(tmp_path):
    task = {**tiny_runs.MASKS, "soft_temperature": 1.0}
    fields = {"name": "masks", "task": {"name": "mask_tokenizer", "image_size": 16, "tokenizer": task}}
    (tmp_path / "tiny.py").write_text(
        f"from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({fields})"
    )
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"cases": {"predict": {"tokens": 8}}}))
    options = [f"--config={tmp_path / 'tiny.py'}", "--cases=predict", f"--out={new}", f"--compare={old}"]
    done = subprocess.run([sys.executable, FILE, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(new.read_text())
    assert report["environment"]["devices"]["count"] == 8
    assert report["environment"]["versions"]["jax"] == jax.__version__
    shown, end = json.JSONDecoder().raw_decode(done.stdout)
    lines = done.stdout[end:].split("\n")
    numbers = report["cases"]["predict"]
    assert shown == report
    assert [line.split() for line in lines[:3]] == [[], [], ["predict.config", "masks"]]
    assert lines[-2:] == ["predict.tokens: 8 -> 4 (0.50x)", ""]
    assert 2**27 < numbers["peak_memory"]["process_bytes"] < 2**31


def test_the_peak_is_that_of_the_process_itself():
    """Not of the one that started it, from which Linux's ru_maxrss would begin."""
    held = np.ones(2**26)
    code = "import roofline; print(roofline.peak_memory()['process_bytes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FILE.parent)
    assert 2**26 < int(done.stdout) < held.nbytes < roofline.peak_memory()["process_bytes"]


def test_reports_compare_number_by_number(tmp_path):
    old = {"cases": {"train": {"config": "a", "step_s": 2.0, "gone": 1.0}}}
    new = {"cases": {"train": {"config": "a", "step_s": 1.0, "more": {"x": 3.0}}}}
    assert benchmark.compare(new, old) == "train.step_s: 2 -> 1 (0.50x)"
    (tmp_path / "new.json").write_text(json.dumps(new))
    assert benchmark.read(tmp_path / "new.json") == new
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json is no report"):
        benchmark.read(tmp_path / "other.json")


def test_the_table_has_readable_units():
    numbers = {"step_s": 0.123456, "peak_memory": {"process_bytes": 3 * 2**30}, "flops_per_s": 2.5e12, "runs": 5}
    lines = benchmark.table({"cases": {"train": numbers}}).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == ["0.1235", "3.0 GiB", "2500 G", "5"]


def test_what_cannot_be_measured_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="'input_dept' is unknown; did you mean 'input_depth'"):
        benchmark.measure(["input_dept"], tmp_path, None)
    for case in ("train", "predict"):
        with pytest.raises(ValueError, match=f"--cases={case} needs --config"):
            benchmark.measure([case], tmp_path, None)
    with pytest.raises(
        ValueError, match=r"task: 'dept' is unknown; did you mean 'depth'"
    ):  # said by the process of the case
        benchmark.measure(["predict"], tmp_path, ConfigDict({"name": "a", "task": {"name": "dept"}}))
    with pytest.raises(ValueError, match="--batch=0 must be at least 1"):
        latency.prediction(ConfigDict({"name": "a", "task": {}}), 0)
