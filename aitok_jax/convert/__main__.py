"""Published weights to a directory of ours, and weights of ours to a file under the published names.

    python -m aitok_jax.convert FILE DIR --config=configs/X.py[:name=value,...] [--config.key=value ...] [--key=KEY]
    python -m aitok_jax.convert DIR FILE

The first reads .pt, .pth, .safetensors or .npz and writes what `Predictor.load`, the tokenizers' `load` and
`config.start_from` read. It prints what became of every name in the file. Where the file lacks a name that the config's
model has, nothing is written and the exit code is 1. A backbone alone needs no more than that: its directory is what
`--config.backbone=` of configs/nyu.py and configs/coco.py takes. Of several sets of weights in FILE the plain one is
taken; --key=model_ema takes the averaged one that lies under 'model_ema'.

The second takes a run directory, or one that the first has written. FILE is .safetensors, or .pt or .pth where torch is
installed: {"weights": ...} of a tokenizer, {"state_dict": ...} of a solver. For example, the weights that come along:

    python -m aitok_jax.convert builtin builtin.safetensors
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict

from aitok_jax.command_line import overrides, usage
from aitok_jax.convert import published, weight_files
from aitok_jax.tasks.options import task_options
from aitok_jax.training import checkpoint


def to_directory(
    file: str | Path, directory: str | Path, config: ConfigDict, key: str | None = None
) -> published.Report:
    """Converts a weight file for `config.task` and writes it as DIRECTORY, unless something is missing.

    `key` chooses among several sets of weights, as in `weight_files.read_weights`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is refused, damaged or does not fit, a config of several stages, or a directory with
        checkpoints in it.
    """
    if "task" not in config:
        raise ValueError("the config has no task; give one of a single run, such as configs/nyu.py")
    if checkpoint.latest_step(directory) >= 0:
        raise ValueError(f"{directory} holds checkpoints already; give a new directory")
    state_dict, notes = weight_files.read_with_notes(file, key)
    variables, config, report = published.convert(state_dict, config)
    if not report.missing:
        checkpoint.save_inference(directory, variables, config)
    return dataclasses.replace(report, notes=notes)


def to_file(directory: str | Path, file: str | Path) -> dict[str, tuple[int, ...]]:
    """Writes the weights of a directory under the published names; returns these with their shapes.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a suffix that is not known, .pt or .pth without torch, or parts that were not published.
    """
    config, variables = checkpoint.load_inference(directory)
    state_dict = published.state_dict(variables, config)
    wrapper = "weights" if config.task.name == "tokenizer" else "state_dict"
    weight_files.write_weights(file, state_dict, wrapper)
    return {name: array.shape for name, array in state_dict.items()}


def main(parsed: overrides.Parsed) -> int:
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax tells a lot
    source, target = parsed.arguments[1:]
    try:
        if checkpoint.locate(source).is_dir():
            for name, shape in to_file(source, target).items():
                print(f"written: {name} {list(shape)}")
            return 0
        report = to_directory(source, target, parsed.config, flags.FLAGS.key)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report)
    print(f"{target} is not written: the file lacks names" if report.missing else f"written to {target}")
    return 1 if report.missing else 0


def parse_flags(argv: list[str]) -> overrides.Parsed:
    usage.show_if_asked(argv, __doc__)
    parsed = overrides.parse_flags(argv, _options)
    if len(parsed.arguments) != 3:
        sys.exit("error: give FILE DIR --config=configs/X.py, or DIR FILE")
    try:
        of_directory = checkpoint.locate(parsed.arguments[1]).is_dir()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if of_directory == (parsed.config is not None):
        sys.exit("error: --config=configs/X.py is needed to convert a file, and belongs to no directory")
    if flags.FLAGS.key is not None and parsed.config is None:
        sys.exit("error: --key chooses in a file, and belongs to no directory; leave it out")
    return parsed


def _options(run: Mapping) -> dict[str, Any]:
    return {"task": task_options(run["task"])} if "task" in run else {}


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow FILE and DIR
    flags.DEFINE_string("config", None, "Configuration of the model, with :arguments.")
    flags.DEFINE_string("key", None, "Key of the dictionary in FILE to take, such as model_ema.")
    app.run(main, flags_parser=parse_flags)
