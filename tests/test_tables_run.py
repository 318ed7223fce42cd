"""Running tables: processes that share a work directory and are killed repeat nothing that is finished."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# A process of `run.py` whose runs take a moment and write down that they ran.
PROCESS = """
import json, pathlib, sys, time
sys.path.insert(0, {experiments!r})
import run

def execute(job, workdir):
    with (workdir / "log").open("a") as file:
        file.write(f"{{job.folder}} {{sys.argv[1]}}\\n")
    time.sleep(0.1)
    environment = {{"versions": dict.fromkeys(("jax", "flax", "optax"), ""), "commit": "", "seconds": 1.0}}
    environment |= {{"devices": {{"count": 1, "kind": "cpu"}}, "finished": ""}}
    metrics = {{"depth/rmse": 0.5, "instances/mask_ap": 0.1}}
    (workdir / "runs" / job.folder / run.RESULT).write_text(json.dumps({{"metrics": metrics}} | environment))

run.execute, run._render, run.WAIT = execute, lambda *args: None, 0.05
sys.exit(run.main(["--table=7,9", "--workdir", {workdir!r}]))
"""


def start(workdir, name):
    program = PROCESS.format(experiments=str(EXPERIMENTS), workdir=str(workdir))
    return subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.DEVNULL)


def lines(workdir):
    log = workdir / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_processes_share_the_runs_and_a_killed_one_repeats_none(tmp_path):
    first, second = start(tmp_path, "first"), start(tmp_path, "second")
    while len({who for _, who in lines(tmp_path)}) < 2 or len(lines(tmp_path)) < 8:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=60) == 0
    options = run._arguments().parse_args(["--table=7,9", "--workdir", str(tmp_path)])
    jobs = run.planned(options)[0].jobs
    begun = [folder for folder, _ in lines(tmp_path)]
    assert set(begun) == set(jobs)
    twice = {folder for folder in jobs if begun.count(folder) > 1}  # what the first was at when it was killed
    assert len(begun) - len(jobs) == len(twice) <= 1
    assert all([who for folder, who in lines(tmp_path) if folder in twice] == ["first", "second"] for _ in twice)
    assert {who for _, who in lines(tmp_path)} == {"first", "second"}
    assert start(tmp_path, "third").wait(timeout=60) == 0
    assert len(lines(tmp_path)) == len(begun)
    assert "| all | 0.500 ± 0.000 |" in (tmp_path / "report" / "table_7.md").read_text()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def execute(job, workdir):
        if job.config.name == "depth" and job.config.seed == 1:
            raise FloatingPointError("step 3: loss=nan")
        (workdir / "runs" / job.folder / run.RESULT).write_text(json.dumps({"metrics": {}}))

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "_render", lambda *args: None)
    monkeypatch.setattr(run.report, "write", lambda *args: [])
    assert run.main(["--table=9", "--seeds=2", "--workdir", str(tmp_path)]) == 1
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 4
    assert "these runs failed, the same command tries again: depth-" in capsys.readouterr().err
