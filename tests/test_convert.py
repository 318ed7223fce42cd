"""Conversion: what became of every name, what is refused, and the command line in both directions."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_objects
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.convert import published, rules
from aitok_jax.convert.__main__ import to_directory, to_file
from aitok_jax.convert.weight_files import read_weights, write_weights
from aitok_jax.tasks.base import variable_shapes
from aitok_jax.training import checkpoint, warm_start

ROOT = Path(__file__).parents[1]
CONFIG = ConfigDict({"name": "run", "task": tiny_objects.CONFIG})


def with_windows(window: int) -> ConfigDict:
    config = ConfigDict(CONFIG.to_dict())
    config.task.backbone.windows = [window]
    return config


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    shapes = variable_shapes(tasks.build(CONFIG.task))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def state_dict(variables):
    return published.state_dict(variables, CONFIG)


def same(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_name_is_accounted_for(variables, state_dict):
    converted, config, report = published.convert({**state_dict, "extra.weight": np.ones(3)}, CONFIG)
    same(converted, variables)
    assert config == CONFIG
    assert not report.missing
    assert report.unused == ("extra.weight",)
    assert {name for name in state_dict if rules.locate(name) is None} == set(report.recomputed)
    assert set(report.used) | set(report.recomputed) == set(state_dict)
    assert "insseg_head.loss_seq.weight" in report.recomputed
    assert report.used["transformer.det_embed"] == "params/transformer/task_embed"
    lines = str(report).splitlines()
    assert "unused: extra.weight" in lines
    assert "used: transformer.voc_embed -> params/transformer/voc_embed" in lines
    assert lines[-1] == f"{len(report.used)} used, {len(report.recomputed)} recomputed, 1 unused, 0 missing"


def test_copies_and_tables_of_a_solver(state_dict):
    np.testing.assert_array_equal(
        state_dict["insseg_head.transformer.proj.weight"], state_dict["transformer.proj.weight"]
    )
    assert state_dict["transformer.enc_embed"].shape == (1, 3, 3, 16)
    weights = state_dict["insseg_head.loss_seq.weight"]
    np.testing.assert_array_equal(np.flatnonzero(weights != 1), 18 + np.arange(tiny_objects.CODES))
    assert weights.dtype == np.float32


def test_what_is_missing_is_named(state_dict, tmp_path):
    del (lacking := dict(state_dict))["transformer.norm.bias"]
    write_weights(tmp_path / "in.safetensors", lacking)
    report = to_directory(tmp_path / "in.safetensors", tmp_path / "out", CONFIG)
    assert report.missing == ("transformer.norm.bias",)
    assert not (tmp_path / "out").exists()


def test_shapes_that_differ_name_both(state_dict):
    wrong = {**state_dict, "transformer.proj.weight": np.ones((16, 8), np.float32)}
    message = r"transformer\.proj\.weight is \(16, 8\) .* params/transformer/proj/kernel here is \(16, 16\)"
    with pytest.raises(ValueError, match=message):
        published.convert(wrong, CONFIG)


def test_whole_numbers_are_no_weights(state_dict):
    wrong = {**state_dict, "transformer.outp_bias": state_dict["transformer.outp_bias"].astype(np.int32)}
    with pytest.raises(ValueError, match=r"outp_bias is of int32 .* is float32"):
        published.convert(wrong, CONFIG)


def test_two_names_of_one_parameter(state_dict):
    twice = {**state_dict, "module.transformer.outp_bias": state_dict["transformer.outp_bias"]}
    with pytest.raises(ValueError, match=r"transformer\.outp_bias and module\.transformer\.outp_bias are both"):
        published.convert(twice, CONFIG)


def test_nothing_fits():
    with pytest.raises(
        ValueError, match=r"nothing in the file fits the task of the config; it holds classifier\.weight"
    ):
        published.convert({"classifier.weight": np.ones((3, 3), np.float32)}, CONFIG)


def test_half_precision_is_converted(variables, state_dict):
    half = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in state_dict.items()
    }
    converted, _, _ = published.convert(half, CONFIG)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted))
    kernel = converted["params"]["transformer"]["proj"]["kernel"]
    np.testing.assert_allclose(kernel, variables["params"]["transformer"]["proj"]["kernel"], rtol=1e-3)


PREFIXES = (
    *("module.", "_orig_mod.", "model.", "state_dict.", "weights.", "module._orig_mod.", "_orig_mod.module."),
    *(
        "state_dict.model.module.",
        "module.module.",
        "model._orig_mod.model.",
        "weights.state_dict.model.",
        "_fsdp_wrapped_module.",
    ),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_all_wrappers(prefix, variables, state_dict):
    converted, _, report = published.convert({f"{prefix}{name}": array for name, array in state_dict.items()}, CONFIG)
    assert not report.missing + report.unused
    same(converted, variables)


def test_wrappers_inside(variables, state_dict):
    """As torch.compile and checkpointing of parts alone name them."""
    inside = {name.replace("backbone.", "backbone._orig_mod."): array for name, array in state_dict.items()}
    inside = {name.replace(".blocks.0.", ".blocks.0._checkpoint_wrapped_module."): a for name, a in inside.items()}
    converted, _, report = published.convert(inside, CONFIG)
    assert not report.missing + report.unused
    same(converted, variables)


def test_published_names_stay(state_dict):
    assert {name: rules.strip(name) for name in state_dict} == {name: name for name in state_dict}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_a_tokenizer(prefix):
    task = {"name": "mask_tokenizer", "tokenizer": {"hidden": 2, "downsample": 16, "num_codes": 4, "code_dim": 3}}
    task["tokenizer"]["objective"] = "mse"
    shapes = variable_shapes(tasks.build(task))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    names = published.state_dict(variables, ConfigDict({"task": task}))
    _, _, report = published.convert({f"{prefix}{n}": a for n, a in names.items()}, ConfigDict({"task": task}))
    assert not report.missing + report.unused


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "", "module.", "module.encoder.", "model._orig_mod."])
def test_pretrained_backbone(prefix, variables, state_dict, tmp_path):
    """As SimMIM saves it, from windows of another size, with what only pretraining needs."""
    other = published.state_dict(variables, with_windows(2))
    backbone = {name.removeprefix("backbone."): a for name, a in other.items() if name.startswith("backbone.")}
    assert backbone["layers.0.blocks.0.attn.relative_position_index"].shape == (4, 4)
    backbone = {name.replace("norm0.", "norm."): array for name, array in backbone.items()}  # the last of one stage
    file = {f"{prefix}{name}": array for name, array in backbone.items()}
    file |= {f"{prefix}mask_token": np.zeros((1, 1, 8), np.float32), "decoder.0.weight": np.ones((9, 8, 1, 1))}
    write_weights(tmp_path / "in.safetensors", file)
    report = to_directory(tmp_path / "in.safetensors", tmp_path / "backbone", CONFIG)
    assert not report.missing
    assert set(report.unused) == {f"{prefix}mask_token", "decoder.0.weight"}
    assert len(report.recomputed) == 2

    config, loaded = checkpoint.load_inference(tmp_path / "backbone")
    same(loaded["params"], {"backbone": variables["params"]["backbone"]})
    fresh = jax.tree.map(np.zeros_like, variables)
    merged, merge_report = warm_start.merge(fresh, loaded, "params/backbone")
    assert not merge_report.missing
    same(merged["params"]["backbone"], variables["params"]["backbone"])
    with pytest.raises(ValueError, match=r"task\.name='backbone'"):
        tasks.build(config.task)

    to_file(tmp_path / "backbone", tmp_path / "out.safetensors")
    back = read_weights(tmp_path / "out.safetensors")
    same(dict(back), {name: array for name, array in state_dict.items() if name.startswith("backbone.")})


def test_a_last_norm_under_both_names(state_dict):
    both = {name: array for name, array in state_dict.items() if name.startswith("backbone.")}
    both |= {"backbone.norm.weight": np.ones(8, np.float32), "backbone.norm.bias": np.ones(8, np.float32)}
    _, _, report = published.convert(both, CONFIG)
    assert set(report.unused) == {"backbone.norm.weight", "backbone.norm.bias"}
    assert "backbone.norm0.weight" in report.used


def test_parts_that_were_not_published_go_along():
    """A stem and a head that reads the memory, of the quickstart, keep names made in the same way."""
    fields = {**tiny_objects.CONFIG, "memory_weight": 1.0}
    fields["backbone"] = {**fields["backbone"], "stem": [4, 8], "stem_blocks": 1}
    config = ConfigDict({"name": "run", "task": fields})
    rng = np.random.default_rng(0)
    shapes = variable_shapes(tasks.build(config.task))
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    state_dict = published.state_dict(variables, config)
    assert {"backbone.patch_embed.stem_norm_2.weight", "instances_memory_head.weight"} <= state_dict.keys()
    converted, _, report = published.convert(state_dict, config)
    assert not report.missing + report.unused
    same(converted, variables)


def test_batch_norm_was_not_published(variables):
    with_statistics = {**variables["model_state"], "batch_stats": {"norm": {"mean": np.zeros(2)}}}
    with pytest.raises(ValueError, match="batch norm"):
        published.state_dict({**variables, "model_state": with_statistics}, CONFIG)


def test_a_directory_with_checkpoints_is_not_touched(state_dict, tmp_path):
    write_weights(tmp_path / "in.safetensors", state_dict)
    to_directory(tmp_path / "in.safetensors", tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="holds checkpoints already"):
        to_directory(tmp_path / "in.safetensors", tmp_path / "run", CONFIG)


def test_several_stages_are_no_config_of_one_run(tmp_path):
    with pytest.raises(ValueError, match="the config has no task"):
        to_directory(tmp_path / "in.pth", tmp_path / "run", ConfigDict({"stages": {}}))


def command(*words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "aitok_jax.convert", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


def test_command_line(tmp_path):
    """A tokenizer of another size than the config's default, and the file without one of its names."""
    task = {"name": "mask_tokenizer", "tokenizer": {"hidden": 2, "downsample": 16, "num_codes": 4, "code_dim": 3}}
    task["tokenizer"]["objective"] = "mse"
    config = ConfigDict({"task": task})
    rng = np.random.default_rng(0)
    shapes = variable_shapes(tasks.build(task))
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    weights = published.state_dict(variables, config)
    flags = ["--config=configs/vqvae_mask.py:hidden=2,num_codes=4", "--config.task.tokenizer.code_dim=3"]

    np.savez(tmp_path / "vae.npz", **weights, note=np.ones(2))
    result = command(tmp_path / "vae.npz", tmp_path / "run", *flags)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "used: encoder.0.bias -> params/encoder/layers_0/bias" in lines
    assert lines[-3:-1] == ["unused: note", f"{len(weights)} used, 0 recomputed, 1 unused, 0 missing"]
    same(checkpoint.load_inference(tmp_path / "run")[1], variables)

    result = command(tmp_path / "run", tmp_path / "back.safetensors")
    assert result.returncode == 0, result.stderr
    assert "written: encoder.0.bias [2]" in result.stdout.splitlines()
    same(read_weights(tmp_path / "back.safetensors"), dict(sorted(weights.items())))

    averaged = {f"model_ema.module.{name}": array + 1 for name, array in weights.items()}
    np.savez(tmp_path / "both.npz", **weights, **averaged)
    result = command(tmp_path / "both.npz", tmp_path / "averaged", *flags, "--key=model_ema")
    assert result.returncode == 0, result.stderr
    same(checkpoint.load_inference(tmp_path / "averaged")[1], jax.tree.map(lambda leaf: leaf + 1, variables))
    report = to_directory(tmp_path / "both.npz", tmp_path / "plain", config)
    assert f"beside: model_ema: {len(weights)} arrays; --key=model_ema takes them" in str(report).splitlines()
    same(checkpoint.load_inference(tmp_path / "plain")[1], variables)

    del weights["encoder.0.bias"]
    np.savez(tmp_path / "lacks.npz", **weights)
    result = command(tmp_path / "lacks.npz", tmp_path / "lacks", *flags)
    assert result.returncode == 1
    assert "missing: encoder.0.bias" in result.stdout.splitlines()
    assert not (tmp_path / "lacks").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pth", "out", "--config=configs/nyu.py"], "No such file"),
        (["tests/weights/zip.pth", "out"], "--config=configs/X.py is needed"),
        (["tests", "out.safetensors"], "no checkpoint in tests"),
        (["tests", "out.safetensors", "--key=ema"], "--key chooses in a file, and belongs to no directory"),
        (
            ["tests/weights/zip.pth", "out", "--config=configs/nyu.py", "--key=ema"],
            "zip.pth: holds no dictionary under the key 'ema'; leave it out or give another",
        ),
        (
            ["tests/weights/zip.pth", "out", "--config=configs/nyu.py"],
            "nothing in the file fits the task of the config",
        ),
        (["tests/weights/zip.pth", "out", "--config=configs/nyu.py", "--config.bach=1"], "did you mean --config."),
    ],
)
def test_command_line_errors_are_one_line(words, message):
    result = command(*words)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
