"""Two real processes, joined by jax.distributed, train and evaluate as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import config_files
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from aitok_jax import main
from aitok_jax.config import format_workdir, to_json
from aitok_jax.parallel import processes
from aitok_jax.training import checkpoint, loop

ROOT = Path(__file__).parents[1]
CONFIG_FILE = """
import json
from pathlib import Path
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(Path(__file__).with_suffix(".json").read_text()))
"""


def small_config():
    """The parallel quickstart's smoke run with small networks, and test images that do not fill a batch."""
    config = config_files.load("quickstart", "smoke,parallel")
    for stage in config.stages.values():
        stage.update({"batch_size": 8, "eval_batch_size": 8, "train_steps": 4, "log_every": 1})
        stage.data.render.update({"train": 16, "test": 6})
        stage.task.tokenizer.update({"hidden": 4, "num_res_blocks": 1})
        stage.optim.name, stage.eval_variants = "adamw", {}
        stage.optim.eps = 1e-6  # where a gradient vanishes, Adam's step would be rounding brought to a length
    config.stages.depth.batch_size = 2  # of 4 devices: the second process has no example of its own
    task = config.stages.depth.task
    task.flip, task.memory_weight = False, 0.0
    task.backbone.update({"stem": (), "stem_blocks": 0, "embed_dim": 16})
    task.transformer.update({"dim": 32, "hidden": 64, "decoder_layers": 1})
    return config


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG_FILE)
    file.with_suffix(".json").write_text(to_json(small_config()))
    return file


def _command(*arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "aitok_jax.main", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def two(config_file, tmp_path_factory):
    """The run directory of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    processes = [
        _command(f"--config={config_file}", f"--workdir={workdir}", address, "--num_processes=2", f"--process_id={i}")
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(outputs)
    return workdir, outputs


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run directory and metrics of this process with its eight devices."""
    workdir = tmp_path_factory.mktemp("one")
    return workdir, main.run(ConfigDict(json.loads(to_json(small_config()))), workdir)


@pytest.mark.parametrize("stage", ["tokenizer", "depth"])
def test_two_processes_train_as_one_does(one, two, stage):
    lines = [(folder / stage / "metrics.jsonl").read_text().splitlines() for folder, _ in (one, two)]
    assert [len(part) for part in lines] == [5, 5]
    for ours, theirs in zip(*([json.loads(line) for line in part] for part in lines), strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in ours if not name.endswith("_per_sec")):
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4 if "grad" in name else 1e-5, err_msg=name)
    states = [checkpoint.load_inference(folder / stage)[1] for folder, _ in (one, two)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *states)


def test_two_processes_write_and_say_everything_once(two):
    workdir, (first, second) = two
    environment = json.loads((workdir / "depth" / "env.json").read_text())["devices"]
    assert (environment["hosts"], environment["count"]) == (2, 4)
    for stage in ("tokenizer", "depth"):
        assert [p.name for p in (workdir / stage / "checkpoints").iterdir()] == ["4"]
        assert len(list((workdir / stage).glob("events.out.tfevents*"))) == 1
        assert len(list((workdir / stage / "panels").iterdir())) == 6
    metrics = json.loads((workdir / "metrics.json").read_text())
    for output in (first, second):  # both know the result
        assert f"depth/rmse {metrics['depth/rmse']:.6g}" in output


def test_evaluation_is_the_same_in_one_process(one, two):
    """Of the checkpoint that two processes wrote."""
    _, expected = one
    workdir, _ = two
    written = json.loads((workdir / "metrics.json").read_text())
    assert written.keys() == expected.keys()
    config = format_workdir(ConfigDict(json.loads(to_json(small_config()))), str(workdir))
    metrics = loop.evaluate(config.stages.depth, workdir / "depth")
    for name, value in metrics.items():
        np.testing.assert_allclose(written[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id must be given too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator=a must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"--process_id=2 must be in 0..1"),
    ],
)
def test_processes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start(False, **arguments)


def test_numbers_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: called.append(args))
    processes.start(False)
    assert not called
    processes.start(True)
    assert called == [("127.0.0.1:1234", 3, 0)]
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=one must be a whole number"):
        processes.start(True)


def test_a_coordinator_that_does_not_answer_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"nothing answers at {address} after 0 s"):
            processes.start(False, address, 2, 1, timeout=0)
