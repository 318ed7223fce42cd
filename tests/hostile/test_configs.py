"""Configurations that are wrong are one sentence, wherever the mistake is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_run
from config_files import load

from aitok_jax import main
from aitok_jax.data import datasets
from aitok_jax.training import checks

ROOT = Path(__file__).parents[2]


def said(tmp_path, text, *words, environment=()):
    (tmp_path / "mine.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "aitok_jax.main",
        f"--config={tmp_path / 'mine.py'}",
        f"--workdir={tmp_path / 'w'}",
    ]
    values = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment)
    done = subprocess.run([*command, *words], env=values, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(\n", "mine.py: SyntaxError: "),
        (
            "import numpy\nimport no_such_module\n",
            "mine.py, line 2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def get_config():\n    return {}['x']\n", "mine.py, line 2: KeyError: 'x'"),
        ("def get_config():\n    return undefined\n", "mine.py, line 2: NameError: name 'undefined'"),
        ("def get_config():\n    raise RuntimeError('no')\n", "mine.py, line 2: RuntimeError: no"),
        ("x = 1\n", "mine.py"),
    ],
)
def test_a_file_that_does_not_run(text, message, tmp_path):
    line = said(tmp_path, text)
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ((), "train_step", 5, "config.train_step: 'train_step' is unknown; did you mean 'train_steps'?"),
        ((), "best_metrik", "x", "config.best_metrik: 'best_metrik' is unknown; did you mean 'best_metric'?"),
        ((), "lr", 0.1, "config.lr: 'lr' is unknown;"),
        (
            ("optim",),
            "learning_rat",
            0.1,
            "config.optim.learning_rat: 'learning_rat' is unknown; did you mean 'learning_rate'?",
        ),
        (("optim",), "momentum", 0.1, "config.optim.momentum: 'momentum' is unknown"),
        (("data",), "on_eror", "skip", "config.data.on_eror: 'on_eror' is unknown; did you mean 'on_error'?"),
        (("data",), "mask_size", 3, "config.data.mask_size: 'mask_size' is unknown;"),
    ],
)
def test_misspelt_keys(place, key, value, message, tmp_path):
    config = load("nyu").to_dict()
    inner = config
    for name in place:
        inner = inner[name]
    inner[key] = value
    config["data"]["root"] = str(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        main.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_of_ones_own_may_be_a_key():
    checks.check_keys(toy_run.config(my_pretrained_run="runs/x"))


def test_optim_must_be_complete():
    optim = toy_run.config().optim.to_dict()
    del optim["b1"], optim["schedule"]
    with pytest.raises(ValueError, match=r"config\.optim: b1, schedule must be given"):
        checks.check_keys(toy_run.config(optim=optim))


@pytest.mark.parametrize("name", ["nyu", "coco", "joint", "vqvae_depth", "vqvae_mask", "quickstart"])
def test_all_configurations_have_known_keys(name):
    config = load(name)
    for stage in config.get("stages", {"": config}).values():
        checks.check_keys(stage)
        parts = stage.data.values() if "name" not in stage.data else [stage.data]
        for data in parts:
            assert set(data) <= set(datasets.KEYS[data.name])


def test_training_without_tensorflow(tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys; sys.modules['tensorflow'] = None")
    text = "from configs import quickstart\ndef get_config():\n    return quickstart.get_config('smoke,parallel')\n"
    line = said(tmp_path, text, environment={"PYTHONPATH": f"{tmp_path / 'hidden'}:{ROOT}"}.items())
    assert line == "error: training needs TensorFlow, which is not installed here: pip install tensorflow-cpu"
