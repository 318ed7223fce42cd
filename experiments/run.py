"""Runs tables of the paper and writes what comes out: Markdown, CSV and a plot with error bars.

    python experiments/run.py --table=7 --workdir=runs/tables [--scale=scenes|nyu|coco] [--seeds=3]
    python experiments/run.py --table=all --smoke --workdir=/tmp/tables

Tables: see experiments/tables.py. `--table=7,9` runs several; what they have in common, such as a tokenizer, is trained
once. The same command goes on where it was, and repeats nothing that is finished. Several processes, on one machine or
on several that share the work directory, share the runs: start the same command in each. WORKDIR/runs/NAME-DIGEST is a
run each, WORKDIR/report/table_7.md, .csv and .png are the results. `--report_only` writes them of what there is.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import report
from measures import measure, write_exact_list
from ml_collections import ConfigDict
from plan import Job, Plan, make_plan
from setups import SCALES
from tables import TABLES

from aitok_jax.config import format_workdir
from aitok_jax.data import scenes
from aitok_jax.training import checkpoint, loop, preemption, run_dir, setup

LOG = logging.getLogger("aitok_jax")
RESULT = "result.json"
WAIT = 2.0  # seconds between looks at what other processes do


def work(plan: Plan, workdir: Path) -> list[str]:
    """Does every job of the plan that is not finished, beside whichever other processes do the same.

    Returns:
      The folders of jobs that failed here, with the jobs that need them.
    """
    failed: set[str] = set()
    started, at_first = time.monotonic(), sum(not finished(job, workdir) for job in plan.jobs.values())
    while waiting := [job for job in plan.jobs.values() if not finished(job, workdir) and job.folder not in failed]:
        failed |= {job.folder for job in waiting if failed & set(job.needs)}
        ready = [job for job in waiting if all(finished(plan.jobs[name], workdir) for name in job.needs)]
        for job in ready:
            with claim(workdir / "runs" / job.folder) as mine:
                if not mine or finished(job, workdir):
                    continue
                LOG.info("%d of %d runs to do; now %s", len(waiting), len(plan.jobs), job.folder)
                try:
                    execute(job, workdir)
                except (ValueError, FloatingPointError) as error:
                    LOG.error("%s failed, the others go on: %s", job.folder, error)
                    failed.add(job.folder)
                done = at_first - len(waiting) + 1  # by all processes
                left = (time.monotonic() - started) / done * (len(waiting) - 1)
                LOG.info("about %.0f minutes left", left / 60)
            break
        else:
            time.sleep(WAIT)
    return sorted(failed)


def finished(job: Job, workdir: Path) -> bool:
    return (workdir / "runs" / job.folder / RESULT).exists()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether the folder, made where absent, is this process's until the end of the block (or of the process)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def execute(job: Job, workdir: Path) -> None:
    """Trains or evaluates one run, and writes its result.json once all is done."""
    folder, started = workdir / "runs" / job.folder, time.monotonic()
    config = format_workdir(job.config, str(workdir))
    if job.weights:
        source = workdir / "runs" / job.weights
        metrics = _evaluate(config, source, folder)
    else:
        source = folder
        metrics = loop.train(config, folder)
    metrics |= measure(config, source, workdir / "scenes")
    result = {
        "metrics": metrics,
        "seconds": time.monotonic() - started,
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
        **json.loads((source / "env.json").read_text()),
    }
    run_dir.RunDir(folder).write_json(RESULT, result)
    jax.clear_caches()


def _evaluate(config: ConfigDict, weights: Path, folder: Path) -> dict[str, float]:
    _, variables = checkpoint.load_inference(weights)
    run = setup.set_up(config, folder)
    run.folder.write_json("config.json", run.config.to_dict())
    return loop.evaluate_all(run, variables["params"], variables["model_state"])


def results(plan: Plan, workdir: Path) -> dict[str, dict[str, Any]]:
    """folder -> result.json of the jobs that are finished."""
    return {
        name: json.loads((workdir / "runs" / name / RESULT).read_text())
        for name, job in plan.jobs.items()
        if finished(job, workdir)
    }


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python experiments/run.py", description="Runs tables of the paper; the same command goes on."
    )
    parser.add_argument("--table", required=True, help=f"comma-separated, of {', '.join(TABLES)}; or all")
    parser.add_argument("--workdir", required=True, type=Path, help="folder, shared by all processes of the tables")
    parser.add_argument("--scale", choices=tuple(SCALES), default="scenes", help="data and size of the models")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--smoke", action="store_true", help="two steps of every run, one seed: does it work at all")
    parser.add_argument("--report_only", action="store_true", help="run nothing, report what is finished")
    parser.add_argument("--backbone", default="", help="weights that the solvers of nyu and coco start from")
    parser.add_argument("--nyu", default="", help="folder of NYUv2 for the scales nyu and coco; else data/nyu")
    parser.add_argument("--coco", default="", help="folder of COCO for the scale coco; else data/coco")
    return parser


def planned(options: argparse.Namespace) -> tuple[Plan, dict[str, ConfigDict]]:
    """The plan of the command line, and the set-ups of its scale."""
    if options.seeds < 1:
        raise ValueError(f"--seeds={options.seeds} must be at least 1")
    build, available = SCALES[options.scale]
    setups, seeds = build(options.smoke), 1 if options.smoke else options.seeds
    for config in setups.values():
        for data in [config.data] if "root" in config.data else config.data.values():
            data.root = {"nyu": options.nyu, "coco": options.coco}.get(data.name.partition("_")[0]) or data.root
    fitting = [name for name, table in TABLES.items() if set(table.runs) & set(available)]
    tables = fitting if options.table == "all" else options.table.split(",")
    return make_plan(tables, options.scale, seeds, setups, available, options.backbone), setups


def _render(setups: dict[str, ConfigDict], workdir: Path) -> None:
    """Renders the scenes once, while other processes wait."""
    render = dict(setups["depth_tokenizer"].data.render)
    with (workdir / "scenes.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        scenes.ensure(workdir / "scenes", workers=os.cpu_count() or 1, **render)
        write_exact_list(workdir / "scenes")


def main(argv: list[str] | None = None) -> int:
    options = _arguments().parse_args(argv)
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax tells a lot
    LOG.setLevel(logging.INFO)
    options.workdir.mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir is None:  # rows of other seeds run the same programs
        cache = options.workdir / "compiled" / platform.node()  # code for one CPU may not run on another
        jax.config.update("jax_compilation_cache_dir", str(cache.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if options.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is compilation
    try:
        plan, setups = planned(options)
        failed = []
        if not options.report_only:
            if options.scale == "scenes":
                _render(setups, options.workdir)
            with preemption.handled():
                failed = work(plan, options.workdir)
        for path in report.write(plan, results(plan, options.workdir), options.workdir / "report", options.scale):
            print(path.read_text())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if failed:
        print(f"error: these runs failed, the same command tries again: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
