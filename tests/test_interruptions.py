"""Real signals to real processes, at random moments; full disks and damaged files. See `toy_run`."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from aitok_jax.training import checkpoint, preemption, run_dir

KILLS = 20
STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert toy_run.finish(toy_run.start(workdir, cache=cache, train_steps=STEPS, keep_checkpoints=STEPS)) == 0
    return workdir


@pytest.fixture
def run(tmp_path, cache):
    """Starts, in the test's own directory, what `whole` did."""

    def start(folder="run", **options):
        return toy_run.start(tmp_path / folder, cache=cache, **{"train_steps": STEPS, **options})

    return start


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_run(a, b):
    assert_same_bits(toy_run.state(a), toy_run.state(b))
    assert toy_run.lines(a) == toy_run.lines(b)
    assert_same_bits(checkpoint.load_inference(a / "best")[1], checkpoint.load_inference(b / "best")[1])


def logged(workdir):
    """The last step in metrics.jsonl; 0 without any."""
    return max((line["step"] for line in toy_run.lines(workdir)), default=0) if workdir.exists() else 0


def after_steps(workdir, rng, most):
    """Waits for 0 to `most` steps more than are saved, and a part of a step."""
    target = min(max(checkpoint.latest_step(workdir), 0) + rng.randint(0, most), STEPS)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 0.5))  # while it starts
        return
    toy_run.wait_for(lambda: (workdir / "metrics.jsonl").exists() and logged(workdir) >= target)
    time.sleep(rng.uniform(0, 0.05))


def test_killed_at_random_moments_it_ends_with_the_same_bits(run, whole, tmp_path, rng):
    workdir = tmp_path / "run"
    kills = 0
    while kills < KILLS:
        process = run()
        after_steps(workdir, rng, most=STEPS // KILLS)
        process.kill()
        code = toy_run.finish(process)
        assert code in (0, -signal.SIGKILL), toy_run.output(workdir)
        kills += code != 0
    assert toy_run.finish(run()) == 0, toy_run.output(workdir)
    assert_same_run(workdir, whole)


def test_stopped_by_signals_it_loses_no_step(run, whole, tmp_path, rng):
    workdir = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT) * 3:
        before = max(checkpoint.latest_step(workdir), 0)
        process = run(checkpoint_every=1000)
        toy_run.wait_for(lambda start=before: (workdir / "metrics.jsonl").exists() and logged(workdir) > start)
        time.sleep(rng.uniform(0, 2 * toy_run.PACE))
        os.kill(process.pid, number)
        assert toy_run.finish(process) == 128 + number
        stopped_at = checkpoint.latest_step(workdir)
        assert before < logged(workdir) == stopped_at
        assert "stopped by a signal; the same command goes on from" in toy_run.output(workdir)
    assert toy_run.finish(run(checkpoint_every=1000)) == 0
    assert_same_run(workdir, whole)


def interrupt(process, workdir, number=signal.SIGTERM):
    """Signals a process that has fallen asleep (in C, for a minute); the exit code."""
    toy_run.wait_for((workdir / "asleep").exists)
    started = time.monotonic()
    os.kill(process.pid, number)
    code = toy_run.finish(process)
    assert time.monotonic() - started < 5
    (workdir / "asleep").unlink()
    return code


def test_a_signal_during_compilation_stops_all_stages_at_once(run, tmp_path):
    assert interrupt(run(slow="compilation", stages=("first", "second")), tmp_path / "run") == 143
    assert checkpoint.latest_step(tmp_path / "run" / "first") == -1
    assert not (tmp_path / "run" / "second").exists()


def test_a_signal_during_an_evaluation_costs_only_that_evaluation(run, whole, tmp_path):
    workdir = tmp_path / "run"
    assert interrupt(run(slow="evaluation", checkpoint_every=0), workdir, signal.SIGINT) == 130
    assert checkpoint.latest_step(workdir) == 10
    assert "error" not in (workdir / "metrics.jsonl").read_text()
    assert toy_run.finish(run(train_steps=12)) == 0
    assert toy_run.lines(workdir)[:13] == toy_run.lines(whole)[:13]  # the evaluation of step 10 is between them


def test_a_signal_during_the_final_evaluation_leaves_a_finished_run(run, whole, tmp_path):
    workdir = tmp_path / "run"
    assert interrupt(run(slow="evaluation", eval_every=0, checkpoint_every=0), workdir) == 143
    assert checkpoint.latest_step(workdir) == STEPS
    assert not (workdir / "metrics.json").exists()
    assert toy_run.finish(run(slow="compilation")) == 0  # trains nothing
    assert (workdir / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert toy_run.lines(workdir)[-1] == toy_run.lines(whole)[-1]


def test_a_second_signal_stops_at_once(run, tmp_path):
    process = run(slow="save")
    toy_run.wait_for((tmp_path / "run" / "asleep").exists)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    assert interrupt(process, tmp_path / "run") == 143


def test_a_full_disk_stops_the_run_and_spares_what_is_saved(run, whole, tmp_path):
    workdir = tmp_path / "run"
    assert toy_run.finish(run(train_steps=4, keep_checkpoints=1)) == 0
    saved = toy_run.state(workdir)
    assert toy_run.finish(run(file_limit=100_000, keep_checkpoints=1)) == 1
    error = toy_run.output(workdir)
    assert f"could not be written to {workdir / 'checkpoints'}" in error
    assert "goes on from step 4" in error
    assert checkpoint.latest_step(workdir) == 4
    assert_same_bits(toy_run.state(workdir), saved)
    assert toy_run.finish(run(train_steps=6)) == 0
    assert_same_bits(toy_run.state(workdir)["params"], toy_run.state(whole, 6)["params"])


def test_it_goes_on_with_other_devices_or_says_what_is_wrong(run, whole, tmp_path):
    workdir = tmp_path / "run"
    assert toy_run.finish(run(devices=8, fsdp=4, train_steps=4)) == 0
    saved = toy_run.state(workdir)
    processes = {}
    for name, options in {
        "fsdp": {"devices": 2, "fsdp": 4},
        "batch": {"devices": 3, "accumulate": 2},
        "three": {"devices": 3},
        "one": {},
        "two": {"devices": 2, "fsdp": 2},
    }.items():
        shutil.copytree(workdir, tmp_path / name)
        processes[name] = run(folder=name, train_steps=6, **options)
    codes = {name: toy_run.finish(process) for name, process in processes.items()}
    assert codes == {"fsdp": 1, "batch": 1, "three": 0, "one": 0, "two": 0}
    assert "fsdp=4 must divide the 2 devices; use one of [1, 2]" in toy_run.output(tmp_path / "fsdp")
    wrong = "batch_size=8 must be divisible by 3 devices times 2 micro-batches (accumulate); use 6 or 12"
    assert wrong in toy_run.output(tmp_path / "batch")
    assert_same_bits(toy_run.state(tmp_path / "batch"), saved)
    for name in ("one", "two", "three"):
        assert_same_bits(toy_run.state(tmp_path / name, 4), saved)
        a, b = toy_run.state(tmp_path / name, 6), toy_run.state(whole, 6)
        assert a["step"] == 6
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a["params"], b["params"])


def test_the_best_weights_of_a_run_are_those_of_its_best_evaluation(whole):
    errors = {line["step"]: line["line/error"] for line in toy_run.lines(whole) if "line/error" in line}
    assert list(errors) == list(range(10, STEPS + 1, 10))
    best = min(errors, key=errors.get)
    assert [path.name for path in (whole / "best").iterdir()] == [str(best)]


def test_a_run_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/run"), Path("/proc/self")):
        with pytest.raises(OSError, match=rf"cannot write to the run directory {path} .*; give another --workdir"):
            run_dir.RunDir(path)
    run_dir.RunDir(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_two_hosts_stop_after_the_same_step_and_one_goes_on(run, tmp_path):
    workdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [run(host=(number, address), train_steps=100_000, checkpoint_every=0, eval_every=0) for number in range(2)]
    toy_run.wait_for(lambda: (workdir / "metrics.jsonl").exists() and logged(workdir) >= 3)
    os.kill(hosts[1].pid, signal.SIGTERM)
    assert [toy_run.finish(host) for host in hosts] == [143, 143], toy_run.output(workdir)
    step = checkpoint.latest_step(workdir)
    assert step == logged(workdir)
    assert toy_run.output(workdir).count(f"goes on from step {step}") == 2
    assert toy_run.finish(run(train_steps=step + 2, eval_every=0)) == 0
    assert logged(workdir) == step + 2


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_signal_to_a_forked_child_is_the_childs_own():
    with preemption.handled(), preemption.deferred():
        child = os.fork()
        if child == 0:
            time.sleep(10)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.1)
        assert not preemption.requested()
