"""Trains and evaluates.

    python -m aitok_jax.main --config=configs/X.py[:name=value,...] --workdir=DIR [--mode=train|eval]
        [--config.key=value ...] [--dry_run] [--multihost | --coordinator=HOST:PORT --num_processes=N --process_id=I]

For example, a few steps of everything on scenes that it renders itself:

    python -m aitok_jax.main --config=configs/quickstart.py:smoke --workdir=runs/smoke

The same command goes on from the latest checkpoint in DIR, and so does `--workdir=DIR` alone, with the configuration
that the run has; `--mode=eval` evaluates that checkpoint and trains nothing.
`--dry_run` checks everything, says what would be done and for how long, and trains nothing.
`--config.all.key=value` sets a key of all stages; see `aitok_jax.command_line.overrides`.
SIGTERM and SIGINT save the step under way and exit with 143 or 130 (see `preemption`); errors exit with 1,
and with `--verbosity=1` show where they come from.
Several processes are one run with `--multihost` on each (TPU pods, Slurm), or with the flags that say who they are.
"""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import absl.logging
import jax
from absl import app, flags
from ml_collections import ConfigDict

from aitok_jax import paths
from aitok_jax.command_line import overrides, usage
from aitok_jax.config import changes, format_workdir, ordered, stage_order
from aitok_jax.parallel import processes
from aitok_jax.training import checkpoint, checks, finetune, keys, lock, loop, preemption, run_dir, setup

LOG = logging.getLogger("aitok_jax")
MODES = ("train", "eval")
PROCESSES = ("multihost", "coordinator", "num_processes", "process_id")


def run(
    config: ConfigDict | Mapping, workdir: str | Path, mode: str = "train", unchanged: ConfigDict | None = None
) -> dict[str, float]:
    """Trains or evaluates a config of one run, or its `stages` one after the other, each in WORKDIR/STAGE.

    Stages run in the order written, but one that mentions '{workdir}/OTHER' after the stage OTHER; one that is finished
    is not trained again. `unchanged` is the configuration as its file has it, to show what was changed.
    Returns the metrics of all stages, also written to WORKDIR/metrics.json.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {MODES}")
    config, workdir = ordered(config), checkpoint.place(workdir) if str(workdir).strip() else workdir
    if "finetune" in config:
        config, unchanged = finetune.plan(config, workdir), None
    checks.check_runs(config)
    if "stages" not in config:
        return _run(config, workdir, workdir, mode, unchanged)
    with lock.held(workdir):
        return _run_stages(config, workdir, mode, unchanged)


def _run_stages(config: ConfigDict, workdir: str | Path, mode: str, unchanged: ConfigDict | None) -> dict[str, float]:
    folder, metrics = run_dir.RunDir(workdir), {}
    stages = {name: config.stages[name] for name in stage_order(config.stages)}
    skipped = [name for name in stages if mode == "train" and _finished(folder.path / name, stages[name].train_steps)]
    if mode == "train":
        left = {
            folder.path / name: format_workdir(stages[name], str(workdir)) for name in stages if name not in skipped
        }
        setup.check_all(left)
        folder.write_json("config.json", config.to_dict())
    for name, stage in stages.items():
        where = folder.path / name
        LOG.info("stage %s in %s%s", name, where, " is finished" if name in skipped else "")
        own = None if unchanged is None else unchanged.stages[name]
        done = name in skipped
        metrics |= json.loads((where / "metrics.json").read_bytes()) if done else _run(stage, where, workdir, mode, own)
    folder.write_json("metrics.json", metrics)
    return metrics


def _finished(folder: Path, steps: int) -> bool:
    return (folder / "metrics.json").exists() and checkpoint.latest_step(folder) >= steps


def _run(
    config: ConfigDict, folder: str | Path, workdir: str | Path, mode: str, unchanged: ConfigDict | None
) -> dict[str, float]:
    config = format_workdir(config, str(workdir))
    if mode == "eval":
        return loop.evaluate(config, folder)
    changed = {} if unchanged is None else changes(format_workdir(unchanged, str(workdir)), config)
    return loop.train(config, folder, changed)


def dry_run(config: ConfigDict | Mapping, workdir: str | Path) -> None:
    """Checks a config, or all its stages, and logs what it would do, and for how long; trains nothing."""
    config, workdir = ordered(config), checkpoint.place(workdir)
    if "finetune" in config:
        config = finetune.plan(config, workdir)
    checks.check_runs(config)
    stages = {name: config.stages[name] for name in stage_order(config.stages)} if "stages" in config else {"": config}
    runs = {workdir / name: format_workdir(stage, str(workdir)) for name, stage in stages.items()}
    for folder, run in setup.check_all(runs).items():
        compilation, step = loop.trial(run)
        LOG.info(
            "%s: %d steps of %.2f s, %.0f s to compile: about %.0f minutes, and the evaluations",
            *(folder, run.config.train_steps, step, compilation, (compilation + step * run.config.train_steps) / 60),
        )


def parse_flags(argv: list[str]) -> overrides.Parsed:
    usage.show_if_asked(argv, __doc__)
    parsed = overrides.parse_flags(argv, keys.run_options, _config_of_run)
    if len(parsed.arguments) > 1:
        sys.exit(f"error: {parsed.arguments[1]!r} is no option; keys are given as --config.KEY=VALUE")
    if flags.FLAGS.workdir is None or (parsed.config is None and not flags.FLAGS.workdir.strip()):
        sys.exit("error: --config=configs/X.py and --workdir=DIR must be given; to go on, --workdir=DIR alone")
    if not flags.FLAGS.workdir.strip():
        sys.exit("error: --workdir is empty (is a variable unset?); give a folder for the run")
    if parsed.config is None:
        sys.exit(f"error: {flags.FLAGS.workdir} has no config.json of a run; give --config=configs/X.py")
    return parsed


def _config_of_run() -> str | None:
    """The configuration that the run in --workdir has, where there is one."""
    if not (flags.FLAGS.workdir or "").strip():
        return None
    file = paths.expand(flags.FLAGS.workdir) / "config.json"
    return str(file) if file.is_file() else None


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a run that goes on does not compile again.

    In $JAX_COMPILATION_CACHE_DIR, or by default, on accelerators, in ~/.cache/aitok_jax. Code for a CPU may not run on
    another one that shares the folder, so that on CPUs the variable has to be set.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "aitok_jax"))


def main(parsed: overrides.Parsed) -> None:
    LOG.setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO)
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax tells a lot
    try:
        processes.start(*(flags.FLAGS[name].value for name in PROCESSES))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    use_compilation_cache()
    try:
        with preemption.handled():
            if flags.FLAGS.dry_run:
                dry_run(parsed.config, flags.FLAGS.workdir)
                return
            metrics = run(parsed.config, flags.FLAGS.workdir, flags.FLAGS.mode, parsed.unchanged)
    except (ValueError, OSError, FloatingPointError) as error:
        LOG.debug("", exc_info=True)
        sys.exit(f"error: {error}")
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")
    if "finetune" in parsed.config and flags.FLAGS.mode == "train":
        kind = parsed.config.finetune.task
        LOG.info("the result:\n  %s", finetune.report(kind, checkpoint.place(flags.FLAGS.workdir) / kind))


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Configuration file, with :arguments; that of the run in --workdir if none.")
    flags.DEFINE_string("workdir", None, "Run directory, made where absent.")
    flags.DEFINE_enum("mode", "train", MODES, "What to do.")
    flags.DEFINE_bool("dry_run", False, "Only check everything, and say what would be done and for how long.")
    flags.DEFINE_bool("multihost", False, "One of several processes, as its surroundings say (TPU pods, Slurm).")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    app.run(main, flags_parser=parse_flags)
