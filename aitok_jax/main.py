"""Trains and evaluates.

    python -m aitok_jax.main --config=configs/X.py[:name=value,...] --workdir=DIR [--mode=train|eval]
        [--config.key=value ...] [--multihost | --coordinator=HOST:PORT --num_processes=N --process_id=I]

The same command goes on from the latest checkpoint in DIR; `--mode=eval` evaluates that checkpoint and trains nothing.
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
from ml_collections import ConfigDict, config_flags

from aitok_jax import config as configuration
from aitok_jax.config import format_workdir, ordered, stage_order
from aitok_jax.parallel import processes
from aitok_jax.training import checkpoint, finetune, lock, loop, preemption, run_dir, setup

LOG = logging.getLogger("aitok_jax")
MODES = {"train": loop.train, "eval": loop.evaluate}
PROCESSES = ("multihost", "coordinator", "num_processes", "process_id")


def run(config: ConfigDict | Mapping, workdir: str | Path, mode: str = "train") -> dict[str, float]:
    """Trains or evaluates a config of one run, or its `stages` one after the other, each in WORKDIR/STAGE.

    A stage that mentions '{workdir}/OTHER' runs after the stage OTHER; one that is finished is not trained again.
    Returns the metrics of all stages, also written to WORKDIR/metrics.json.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {tuple(MODES)}")
    config, workdir = ordered(config), checkpoint.place(workdir) if str(workdir).strip() else workdir
    if "finetune" in config:
        config, lines = finetune.plan(config, workdir)
        LOG.info("the plan:\n  %s", "\n  ".join(lines))
    if "stages" not in config:
        return MODES[mode](format_workdir(config, str(workdir)), workdir)
    for stage in config.stages.values():
        setup.check_keys(stage)
    with lock.held(workdir):
        return _run_stages(config, workdir, mode)


def _run_stages(config: ConfigDict, workdir: str | Path, mode: str) -> dict[str, float]:
    folder, metrics = run_dir.RunDir(workdir), {}
    folder.write_json("config.json", config.to_dict())
    for name in stage_order(config.stages):
        stage = format_workdir(config.stages[name], str(workdir))
        done = folder.path / name / "metrics.json"
        skip = mode == "train" and done.exists() and checkpoint.latest_step(done.parent) >= stage.train_steps
        LOG.info("stage %s in %s%s", name, done.parent, " is finished" if skip else "")
        metrics |= json.loads(done.read_bytes()) if skip else MODES[mode](stage, done.parent)
    folder.write_json("metrics.json", metrics)
    return metrics


def parse_flags(argv: list[str]) -> list[str]:
    args = configuration.parse_flags(argv)
    if None in (flags.FLAGS["config"].value, flags.FLAGS.workdir):
        sys.exit("error: --config=configs/X.py and --workdir=DIR must be given")
    if not flags.FLAGS.workdir.strip():
        sys.exit("error: --workdir is empty (is a variable unset?); give a folder for the run")
    return args


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a run that goes on does not compile again.

    In $JAX_COMPILATION_CACHE_DIR, or by default, on accelerators, in ~/.cache/aitok_jax. Code for a CPU may not run on
    another one that shares the folder, so that on CPUs the variable has to be set.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "aitok_jax"))


def main(_: list[str]) -> None:
    LOG.setLevel(logging.DEBUG if flags.FLAGS.verbosity > 0 else logging.INFO)
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax tells a lot
    try:
        processes.start(*(flags.FLAGS[name].value for name in PROCESSES))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    use_compilation_cache()
    try:
        with preemption.handled():
            metrics = run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.mode)
    except (ValueError, OSError, FloatingPointError) as error:
        LOG.debug("", exc_info=True)
        sys.exit(f"error: {error}")
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration file, with :arguments.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Run directory, made where absent.")
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
    flags.DEFINE_bool("multihost", False, "One of several processes, as its surroundings say (TPU pods, Slurm).")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    app.run(main, flags_parser=parse_flags)
