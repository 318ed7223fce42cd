"""A run's folder: one process at a time, nobody else's files, the run's own configuration, and no step shown twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_run
from ml_collections import ConfigDict

from aitok_jax import main
from aitok_jax.training import checkpoint, lock, run_dir

ROOT = Path(__file__).parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def steps(workdir):
    return [line["step"] for line in toy_run.lines(workdir) if "loss" in line]


def test_a_second_process_is_told_who_is_there(tmp_path, cache):
    workdir = tmp_path / "run"
    first = toy_run.start(workdir, cache=cache, train_steps=100_000, checkpoint_every=1, eval_every=0)
    toy_run.wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(steps(workdir)) > 2)
    assert toy_run.finish(toy_run.start(workdir, cache=cache, train_steps=100_000)) == 1
    said = toy_run.output(workdir)
    assert f"{workdir} is in use by process {first.pid} on {socket.gethostname()}; wait until it is done" in said
    before = len(steps(workdir))
    toy_run.wait_for(lambda: len(steps(workdir)) > before + 3)  # the first goes on
    os.kill(first.pid, signal.SIGTERM)
    assert toy_run.finish(first) == 143
    assert steps(workdir) == list(range(1, len(steps(workdir)) + 1))


def test_of_two_started_together_one_trains(tmp_path, cache):
    workdir = tmp_path / "run"
    both = [toy_run.start(workdir, cache=cache, train_steps=STEPS, eval_every=0) for _ in range(2)]
    assert sorted(toy_run.finish(process) for process in both) == [0, 1]
    assert steps(workdir) == list(range(1, STEPS + 1))
    assert toy_run.output(workdir).count("is in use by process") == 1


def test_what_a_kill_has_left_is_taken_over_at_once(tmp_path, cache):
    workdir = tmp_path / "run"
    first = toy_run.start(workdir, cache=cache, train_steps=STEPS, eval_every=0, checkpoint_every=2)
    toy_run.wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(steps(workdir)) > 4)
    first.kill()
    first.join()
    assert json.loads((workdir / lock.FILE).read_text())["process"] == first.pid
    started = time.monotonic()
    with lock.held(workdir):
        assert time.monotonic() - started < 1
    assert (workdir / lock.FILE).read_text() == ""
    assert toy_run.finish(toy_run.start(workdir, cache=cache, train_steps=STEPS, eval_every=0)) == 0
    assert steps(workdir) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_elsewhere_is_known_by_its_heartbeat(lives, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 2.0)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.2)
    program = (
        "import sys, time; from aitok_jax.training import lock\n"
        "me = lock._me; lock._me = lambda: me() | {'host': 'elsewhere'}; lock.HEARTBEAT = 0.2\n"
        f"with lock.held({str(tmp_path)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"held\n"
        if not lives:
            process.kill()
            process.wait()
        started = time.monotonic()
        if lives:
            with pytest.raises(ValueError, match=f"in use by process {process.pid} on elsewhere"), lock.held(tmp_path):
                pass
        else:
            with lock.held(tmp_path):
                assert 2 < time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait()


def test_the_number_of_a_dead_process_may_be_used_again(tmp_path):
    mine = lock._me()
    (tmp_path / lock.FILE).write_text(json.dumps(mine | {"started": "0"}))  # another process had this number
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text()) == mine
        with pytest.raises(ValueError, match="in use by process"), lock.held(tmp_path):
            pass


def test_no_run_leaves_nothing(tmp_path):
    with lock.held(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with lock.held(tmp_path / "old"):
        (tmp_path / "old" / "something").touch()
    assert (tmp_path / "old" / lock.FILE).exists()


@pytest.mark.parametrize("workdir", ["", " "])
def test_an_empty_workdir(workdir, tmp_path):
    words = [sys.executable, "-m", "aitok_jax.main", f"--config={ROOT}/configs/nyu.py", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --workdir is empty (is a variable unset?)")
    assert not list(tmp_path.iterdir())


NAMES = ["config.json", "data.json", "metrics.json", "env.json", "parameters.txt", "metrics.jsonl", "panels"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [False, True])
def test_a_folder_that_is_no_runs(name, stages, tmp_path):
    (tmp_path / name).write_text('{"of": "the user"}')
    (tmp_path / "writable").write_text("mine")
    values = toy_run.config().to_dict()
    config = {"stages": {"a": values}} if stages else values
    with pytest.raises(ValueError, match=f"{tmp_path} is no run's folder, but holds {name}, which a run would write"):
        main.run(config, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: '{"of": "the user"}',
        "writable": "mine",
    }


def test_a_run_of_a_version_without_locks_goes_on(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "x", "task": {}}')
    (tmp_path / "metrics.json").write_text("{}")
    with lock.held(tmp_path):
        pass
    (tmp_path / "writable").write_text("mine")
    run_dir.RunDir(tmp_path)
    assert (tmp_path / "writable").read_text() == "mine"


def test_an_evaluation_is_of_the_runs_own_model():
    saved = {"name": "a", "task": {"name": "depth", "image_size": 48}}
    here = ConfigDict({"name": "m", "task": {"name": "instance_tokenizer", "hidden": 4}})
    with pytest.raises(
        ValueError, match=r"RUN is a run of a \(depth\), but the configuration is of m \(instance\); give"
    ):
        checkpoint.check_same_parts(saved, here, Path("RUN"))
    checkpoint.check_same_parts(saved, ConfigDict(saved), Path("RUN"))


LOG = """
import sys, time
from aitok_jax.training import run_dir
start, stop = map(int, sys.argv[2:])
folder = run_dir.RunDir(sys.argv[1])
with folder.logging(start, 1):
    for step in range(start + 1, stop + 1):
        folder.training(step, {"loss": 10.0 * start + step})
    folder._events.flush()
    print("logged", flush=True)
    time.sleep(0 if start else 60)
"""


def test_tensorboard_shows_no_step_twice(tmp_path):
    import tensorflow as tf

    def start(*steps):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", LOG, str(tmp_path), *map(str, steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"logged\n"
        return process

    first = start(0, 6)
    first.kill()
    first.wait()
    (file,) = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-7])  # in the middle of an event
    (tmp_path / "events.part").write_bytes(b"left by another kill")
    assert start(4, 9).wait() == 0
    seen = []
    for file in sorted(tmp_path.glob("events.*")):
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            event = tf.compat.v1.Event.FromString(record)
            seen += [
                (event.step, float(tf.make_ndarray(v.tensor))) for v in event.summary.value if v.tag == "train/loss"
            ]
    assert sorted(seen) == [(n, float(n)) for n in range(1, 5)] + [(n, 40.0 + n) for n in range(5, 10)]
