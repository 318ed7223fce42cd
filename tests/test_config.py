import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from aitok_jax.config import build_dataclass, format_workdir, parse_arg, stage_order

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


def test_stages_run_after_those_they_mention():
    stages = {"a": {"start_from": "{workdir}/c"}, "b": {"start_from": "{workdir}/a"}, "c": {"x": 1}}
    assert stage_order(ConfigDict(stages)) == ["c", "a", "b"]


CONFIG = """
from aitok_jax.config_utils import parse_arg
from ml_collections import ConfigDict
def get_config(arg=""):
    arg = parse_arg(arg, fast=False)
    return ConfigDict({"batch_size": 8, "optim": {"learning_rate": 1e-3, "warmup_steps": 0}, "sizes": (1, 2)})
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=4"], "error: --config.batch_sise is unknown; did you mean --config.batch_size?"),
        (["--config.optim.learning_rat=4"], "did you mean --config.optim.learning_rate?"),
        (["--config.batch_size=few"], "invalid literal for int() with base 10: 'few'"),
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
