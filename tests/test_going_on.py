"""A run is enough to go on with, to evaluate and to predict from; and it tells how it was made."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
import tiny_runs

from aitok_jax import Predictor, main
from aitok_jax.command_line import overrides
from aitok_jax.config import ordered, to_json
from aitok_jax.training.keys import run_options

ROOT = Path(__file__).parents[1]
CONFIG = """
from aitok_jax.config import parse_arg
from configs import common

def get_config(arg=None):
    arg = parse_arg(arg, steps=2)
    render = {"train": 12, "test": 2, "height": 16, "width": 16, "seed": 0, "format": "nyu"}
    tokenizer = {"hidden": 4, "downsample": 4, "num_res_blocks": 0, "num_codes": 8, "code_dim": 4}
    return common.run(
        name="rooms",
        task={"name": "depth_tokenizer", "image_size": 16, "mask_ratio": 0.0, "tokenizer": tokenizer},
        data=common.maps_data("depth", "{workdir}/scenes", 16, "tokenizer", render=render, test_subfolder=""),
        train_steps=arg.steps,
        optim=common.optimizer(weight_decay=0.01),
    )
"""


def command(*words):
    values = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "aitok_jax.main", *words], env=values, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps with its file, then two more without."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "tiny.py").write_text(CONFIG)
    file = f"--config={folder / 'tiny.py'}:steps=2"
    done = command(
        file, f"--workdir={folder / 'run'}", "--config.optim.learning_rate=2e-3", "--config.task.tokenizer.decay=.5"
    )
    (folder / "log.txt").write_text(done.stderr)
    command(f"--workdir={folder / 'run'}", "--config.train_steps=4", "--config.keep_checkpoints=1")
    return folder / "run"


def changed(run, *given):
    config = overrides.load(str(run / "config.json"))
    overrides.override(config, [tuple(each.split("=", 1)) for each in given], run_options)
    return ordered(config)


def test_going_on_without_a_configuration(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx([2e-3, 2e-3])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    config = json.loads((run / "config.json").read_text())
    assert config["task"]["parts"]["rooms"]["tokenizer"]["decay"] == 0.5


def test_the_command_lines_are_kept(run):
    environment = json.loads((run / "env.json").read_text())
    assert {"commit", "versions", "devices"} < set(environment)
    first, second = (shlex.split(line) for line in environment["commands"])
    assert first[-1] == "--config.task.tokenizer.decay=.5"
    assert second[1:] == [
        "-m",
        "aitok_jax.main",
        f"--workdir={run}",
        "--config.train_steps=4",
        "--config.keep_checkpoints=1",
    ]


def test_the_parameters_are_a_line_in_the_log_and_a_file(run):
    table = (run / "parameters.txt").read_text().splitlines()
    log = (run.parent / "log.txt").read_text()
    count = re.search(r"^\d+ parameters +([\d,]+) ", table[-1])[1]
    assert re.search(rf"{count} parameters; on each device: parameters .* B.*; each in {run / 'parameters.txt'}\n", log)
    assert len(table) == 16
    assert not any(row in log for row in table)


def test_tensorboard_shows_what_was_changed_first(run):
    texts, plugins = {}, set()
    for file in sorted(run.glob("events.out.tfevents.*")):
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                plugins.add(value.metadata.plugin_data.plugin_name)
                if value.tag == "config":
                    texts[event.step] = value.tensor.string_val[0].decode()
    assert {"text", "hparams", "scalars"} <= plugins
    first, second = texts[0].splitlines(), texts[2].splitlines()
    assert set(first[2:4]) == {
        "| optim.learning_rate | 0.002 | 0.0001 |",
        "| task.parts.rooms.tokenizer.decay | 0.5 | None |",
    }
    assert set(second[2:4]) == {"| train_steps | 4 | 2 |", "| keep_checkpoints | 1 | 2 |"}
    assert "| batch_size.rooms | 8 |  |" in first[4:]
    assert len(first) == len(set(first))


def test_evaluating_without_a_configuration(run):
    metrics = json.loads((run / "metrics.json").read_text())
    config = (run / "config.json").read_text()
    again = main.run(changed(run, "eval_batch_size=1"), run, "eval")
    assert again == pytest.approx(metrics, rel=1e-5)
    assert (run / "config.json").read_text() == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("optim.weight_decay=0", "config.optim.weight_decay: 0.01 there, 0.0 now; it stays on or off"),
        ("optim.clip_norm=1", "config.optim.clip_norm: 0.0 there, 1.0 now; it stays on or off"),
        ("task.tokenizer.hidden=8", "config.task.tokenizer.hidden: 4 there, 8 now"),
        ("batch_size=16", "config.batch_size: 8 there, 16 now"),
        ("ema_decay=0.9", "config.ema_decay: 0.0 there, 0.9 now"),
    ],
)
def test_what_a_run_refuses_is_named_by_its_key(run, given, message):
    with pytest.raises(ValueError, match="is a checkpoint of another configuration") as error:
        main.run(changed(run, "train_steps=6", given), run)
    assert str(error.value).splitlines()[1:] == [f"  {message}"]


def test_a_changed_weight_decay_may_go_on(run, caplog):
    config = changed(run, "optim.weight_decay=0.02")
    with caplog.at_level("INFO"):
        main.run(config, run)
    assert "resuming with a changed value: config.optim.weight_decay: 0.01 there, 0.02 now" in caplog.text


def stages(folder, *kinds):
    """A run of stages as `main.run` leaves it."""
    names = {f"{kind}_stage": {"task": tiny_runs.KINDS[kind]} for kind in kinds}
    names = {"tokens": {"task": {"name": "mask_tokenizer"}}, **names}
    (folder / "config.json").write_text(to_json({"stages": names}))
    for kind in kinds:
        tiny_runs.write(folder, kind).rename(folder / f"{kind}_stage")
    return folder


def test_of_several_stages_the_one_that_predicts(tmp_path):
    assert Predictor.load(stages(tmp_path, "detection")).tasks == ("detection",)


def test_several_stages_that_predict_are_named(tmp_path):
    message = r"several of its stages predict from images; give .*/detection_stage or .*/depth_stage"
    with pytest.raises(ValueError, match=message):
        Predictor.load(stages(tmp_path, "detection", "depth"))
    with pytest.raises(ValueError, match="none of its stages predicts from images"):
        Predictor.load(stages(tmp_path))
