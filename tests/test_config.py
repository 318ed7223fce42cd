import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from aitok_jax.config import (
    build_dataclass,
    format_workdir,
    ordered,
    parse_arg,
    stage_order,
    to_json,
    translated,
    translated_task,
)

ROOT = Path(__file__).parents[1]


def test_arguments_take_the_type_of_their_default():
    config = parse_arg("backbone=swin_l,parallel,steps=20", backbone="b", parallel=False, steps=1, lr=1.0)
    assert config.to_dict() == {"backbone": "swin_l", "parallel": True, "steps": 20, "lr": 1.0}
    assert parse_arg("parallel=false, lr=1e-3", parallel=True, lr=1.0).to_dict() == {
        "parallel": False,
        "lr": 1e-3,
    }
    assert parse_arg(None, steps=1).steps == 1


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("backbon=x", "'backbon' is unknown; did you mean 'backbone'?"),
        ("steps=many", "steps=many must be a whole number"),
        ("steps", "steps= must be a whole number"),
        ("parallel=maybe", "parallel=maybe must be true or false"),
    ],
)
def test_wrong_arguments_are_errors(arg, message):
    with pytest.raises(ValueError, match="config argument") as error:
        parse_arg(arg, backbone="b", parallel=False, steps=1)
    assert message in str(error.value)


@dataclasses.dataclass(frozen=True)
class _Inner:
    width: int = 3


@dataclasses.dataclass(frozen=True)
class _Outer:
    size: int
    inner: _Inner = _Inner()
    sizes: tuple[int, ...] = ()
    backup: _Inner | None = None


def test_dataclass_from_config():
    config = ConfigDict({"name": "outer", "size": 2, "inner": {"width": 5}, "sizes": [1, [2, 3]], "backup": {}})
    assert build_dataclass(_Outer, config) == _Outer(2, _Inner(5), (1, (2, 3)), _Inner())
    with pytest.raises(ValueError, match="_Inner: option 'widht' is unknown; did you mean 'width'"):
        build_dataclass(_Outer, ConfigDict({"size": 2, "inner": {"widht": 5}}))
    with pytest.raises(ValueError, match="_Outer: size must be given"):
        build_dataclass(_Outer, ConfigDict())


def test_workdir_is_put_into_all_strings():
    config = ConfigDict({"a": {"path": "{workdir}/tokenizer", "n": 1}, "b": ("x{workdir}", 2)})
    formatted = format_workdir(config, "/runs/1")
    assert formatted.to_dict() == {"a": {"path": "/runs/1/tokenizer", "n": 1}, "b": ("x/runs/1", 2)}
    assert config.a.path == "{workdir}/tokenizer"


def test_keys_keep_their_order():
    """Also in nested ones, and after the work directory was put in and older forms were translated."""
    config = ordered({"b": 1, "a": {"z": "{workdir}/x", "c": 2}})
    assert list(config) == list(format_workdir(config, "/runs")) == ["b", "a"]
    assert list(config.a) == list(format_workdir(config, "/runs").a) == ["z", "c"]
    start_from = {"params/backbone": "x", "params": "y", "model_state/a": "z"}
    run = translated({"name": "depth", "start_from": start_from, "task": {"name": "depth", "image_size": 8}})
    assert list(run.start_from) == list(start_from)
    assert list(json.loads(to_json(run))["start_from"]) == list(start_from)


SHARED_FIELDS = {"backbone": {"embed_dim": 8}, "transformer": {"dim": 16}, "init_variance": 0.5}


def test_a_run_of_one_part_is_one_of_parts():
    """Its part has the run's name; what is shared is taken out of it, and all that is by part gets the name."""
    flat = {
        "name": "rooms",
        "task": {"name": "depth", "image_size": 8, **SHARED_FIELDS},
        "data": {"name": "nyu", "root": "x"},
        "batch_size": 4,
        "eval_batch_size": 2,
        "eval_variants": {"rooms_hard": {"soft_input": False}},
    }
    run = translated(ConfigDict(flat)).to_dict()
    assert run["task"] == {
        "name": "solver",
        "shared": SHARED_FIELDS,
        "parts": {"rooms": {"name": "depth", "image_size": 8}},
    }
    data = {"also_root": "", "also_count": 0, "modality": "depth", "depth_scale": 0.0, "fit": "crop"}
    data |= {"name": "nyu", "root": "x"}
    assert run["data"] == {"rooms": data}
    assert (run["batch_size"], run["eval_batch_size"]) == ({"rooms": 4}, {"rooms": 2})
    assert run["eval_variants"] == {"rooms": flat["eval_variants"]}
    assert translated(run).to_dict() == run
    coco = translated(flat | {"data": {"name": "coco", "root": "x"}}).data.rooms
    assert coco.to_dict() == {"also_root": "", "also_count": 0, "name": "coco", "root": "x"}


@pytest.mark.parametrize(("old", "kind"), [("depth_tokenizer", "depth"), ("mask_tokenizer", "mask")])
def test_a_tokenizer_is_one_of_parts(old, kind):
    task = translated_task({"name": old, "image_size": 8}, "tokenizer")
    assert task == {"name": "tokenizer", "parts": {"tokenizer": {"name": kind, "image_size": 8}}}
    assert translated_task({"name": old, "image_size": 8})["parts"] == {old: {"name": kind, "image_size": 8}}
    assert translated_task(task) == task


def test_the_earlier_form_of_a_joint_run():
    """What is by part stays as it is."""
    old = {
        "name": "joint",
        "task": {"name": "joint", "shared": SHARED_FIELDS, "depth": {"pad_to": 4}, "instances": {"num_objects": 5}},
        "data": {"depth": {"name": "nyu"}, "instances": {"name": "coco"}},
        "batch_size": {"depth": 4, "instances": 8},
        "eval_batch_size": {"depth": 4, "instances": 8},
        "eval_variants": {"depth": {}, "instances": {"x": {"top_p": 0.3}}},
    }
    run = translated(old).to_dict()
    parts = {"depth": {"pad_to": 4}, "instances": {"num_objects": 5}}
    assert run["task"] == {"name": "solver", "shared": SHARED_FIELDS, "parts": parts}
    for key in ("batch_size", "eval_batch_size", "eval_variants"):
        assert run[key] == old[key]
    assert run["data"]["depth"]["modality"] == "depth"
    assert "modality" not in run["data"]["instances"]
    assert translated(run).to_dict() == run


def test_fields_that_are_called_otherwise_now():
    """Numbers of codes, of which either may be missing, and remat as a boolean."""
    shared = {"backbone": {"remat": True}, "transformer": {"remat": False}}
    for given, codes in (
        ({"num_mask_codes": 5, "num_depth_codes": 7}, (("mask", 5), ("depth", 7))),
        ({"num_depth_codes": 7, "num_bins": 3}, (("depth", 7),)),
        ({"num_mask_codes": 0}, (("mask", 0),)),
    ):
        task = translated_task({"name": "depth", **shared, "vocabulary": given})
        assert task["shared"]["vocabulary"]["codes"] == codes
        assert set(task["shared"]["vocabulary"]) == {"codes"} | (set(given) & {"num_bins"})
    assert (task["shared"]["backbone"]["remat"], task["shared"]["transformer"]["remat"]) == ("blocks", "none")
    kept = {"backbone": {"remat": "dots"}, "vocabulary": {"codes": (("mask", 2),)}}
    assert translated_task({"name": "depth", **kept})["shared"] == kept
    assert shared == {"backbone": {"remat": True}, "transformer": {"remat": False}}, "the argument is left alone"


def test_keys_that_earlier_configurations_lack_are_filled_in():
    run = translated({"name": "a", "task": {"name": "depth"}, "best_mode": "max"})
    filled = {
        **{"ema_decay": 0.0, "fsdp": 1, "accumulate": 1, "start_from": {}, "categories": ()},
        **{"eval_variants": {"a": {}}, "eval_baseline": False, "best_metric": "", "best_mode": "max"},
    }
    assert {key: run.to_dict()[key] for key in filled} == filled


def test_stages_run_after_those_they_mention():
    stages = {"a": {"start_from": "{workdir}/c"}, "b": {"start_from": "{workdir}/a"}, "c": {"x": 1}}
    assert stage_order(ConfigDict(stages)) == ["c", "a", "b"]


CONFIG = """
from aitok_jax.config import parse_arg
from ml_collections import ConfigDict
def get_config(arg=""):
    arg = parse_arg(arg, fast=False)
    return ConfigDict({"batch_size": 8, "optim": {"learning_rate": 1e-3, "warmup_steps": 0}, "sizes": (1, 2)})
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=4"], "error: --config.batch_sise is unknown; did you mean --config.batch_size=4?"),
        (["--config.optim.learning_rat=4"], "did you mean --config.optim.learning_rate=4?"),
        (["--config.batch_size=few"], "--config.batch_size=few must be a whole number, as in --config.batch_size=8"),
    ],
)
def test_a_wrong_flag_is_one_line_and_a_failure(tmp_path, arguments, message):
    line = _command_line(tmp_path, "config.py", *arguments)
    assert message in line


def test_a_wrong_configuration_is_one_line(tmp_path):
    assert "'fats' is unknown; did you mean 'fast'?" in _command_line(tmp_path, "config.py:fats")
    assert "No such file" in _command_line(tmp_path, "other.py")


def _command_line(folder, config, *arguments):
    (folder / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "aitok_jax.main", f"--config={folder / config}"]
    command += [f"--workdir={folder / 'run'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert not (folder / "run").exists()
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]
