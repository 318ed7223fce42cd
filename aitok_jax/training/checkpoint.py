"""Checkpoints with Orbax: written in the background, restored on any number of devices, usable as weights alone.

A run keeps them in WORKDIR/checkpoints/STEP with three items: `state` (everything, to go on training), `inference`
({'params', 'model_state'}; the moving average of the parameters where there is one) and `config` (JSON). WORKDIR/best
has the last two of the best evaluation, where the config names a `best_metric`.

A checkpoint appears under its name when all of it is written, with checksums of its files; in a bucket, where nothing
can be renamed, it counts from when its commit_success.txt is there. One that cannot be read all the same, or is not as
it was written, is passed over, with a warning, for the one before it.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aitok_jax import paths
from aitok_jax.config import changes, short_key, to_json, translated
from aitok_jax.training import checksums
from aitok_jax.training.state import TrainState

LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
BEST = "best"
BUILTIN = "builtin"  # names the weights that come with the package, in a folder of that name
# A run goes on only where these agree with its checkpoint; all else (lengths, intervals, paths) may change.
FIXED_KEYS = ("name", "seed", "batch_size", "task", "optim.name", "ema_decay")
FREE_KEYS = (".dtype", ".remat")  # how a task is computed, not what
SWITCHES = {"optim.weight_decay": 0.0, "optim.clip_norm": 0.0, "optim.layer_decay": 1.0}  # what is off then, stays so


class DamagedError(OSError):
    """A checkpoint that cannot be read, or all of them."""


def open_manager(workdir: str | Path, *, keep: int = 1) -> ocp.CheckpointManager:
    """The manager of WORKDIR/checkpoints, made where absent; keeps the latest `keep` checkpoints. Close it.

    What an interrupted save has left is removed.
    """
    folder = place(workdir) / FOLDER
    for left in _unfinished(folder):
        LOG.warning("%s is a save that was cut off; removed", left)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return _manager(folder, options)


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    def seal():
        """Everything is written, but not yet under its name."""
        for step in _unfinished(folder):
            checksums.write(step)

    sealing = ocp.AsyncOptions(post_finalization_callback=seal)
    options = dataclasses.replace(options, async_options=sealing)
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "inference": ocp.PyTreeCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(paths.absolute(folder), options=options, item_handlers=handlers)


def _unfinished(folder: Path) -> list[Path]:
    """What is being saved there, or was when it was cut off."""
    if not paths.is_url(folder):
        return sorted(paths.absolute(folder).glob("*.orbax-checkpoint-tmp*"))
    return [step for step in sorted(folder.glob("*")) if step.name.isdigit() and not _is_whole(step)]


def _is_whole(step: Path) -> bool:
    return not paths.is_url(step) or (step / checksums.COMMITTED).exists()


def place(path: str | Path) -> Path:
    """Where a run is that a user names. ValueError where its checkpoints cannot be there; see `paths.expand` too."""
    path = paths.expand(path)
    if paths.is_url(path) and not str(path).startswith("gs://"):
        raise ValueError(
            f"{path}: Orbax keeps checkpoints in local folders and under gs:// alone; give one of these, and copy the "
            "run from there or to there"
        )
    return path


def save(manager: ocp.CheckpointManager, state: TrainState, config: ConfigDict) -> None:
    """Starts writing the state under its step number; the state may be donated as soon as this returns.

    Raises:
      OSError: this checkpoint or the one before could not be written.
    """
    variables = {"params": state.inference_params, "model_state": state.model_state}
    items = _inference_items(variables, config) | {"state": ocp.args.StandardSave(state)}
    with _writing(manager):
        manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what `save` has started is on disk; errors as there."""
    with _writing(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of Orbax, TensorStore or the file system
        folder = paths.expand(manager.directory)
        raise OSError(
            f"a checkpoint could not be written to {folder} ({_brief(error)}); make room there and give the same "
            f"command again, which goes on from step {max(_find_checkpoints(folder)[1], default=0)}"
        ) from error


def save_best(
    workdir: str | Path, step: int, metrics: Mapping[str, float], state: TrainState, config: ConfigDict
) -> None:
    """Writes the weights to WORKDIR/best/STEP where `config.best_metric` is better than that of those there.

    Does nothing without a `best_metric`, or where the metric is not a number. Returns when all is written.

    Raises:
      ValueError: `metrics` has no such metric.
      DamagedError: what is there cannot be read.
    """
    name, sign = config.best_metric, {"min": -1.0, "max": 1.0}[config.best_mode]
    if not name:
        return
    if name not in metrics:
        raise ValueError(f"best_metric={name!r} is not measured; use one of {', '.join(sorted(metrics))}")

    def score(metrics):
        return sign * metrics.get(name, -sign * np.inf)

    folder = place(workdir) / BEST
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=score, create=True, cleanup_tmp_directories=True)
    with _reading(folder, "; delete it, and the same command goes on"):
        manager = _manager(folder, options)
        best = manager.best_step()
        to_beat = -np.inf if best is None else score(manager.metrics(best) or {})
    with manager:
        if best == step or not score(metrics) > to_beat:
            return
        items = _inference_items({"params": state.inference_params, "model_state": state.model_state}, config)
        with _writing(manager):
            manager.save(step, args=ocp.args.Composite(**items), metrics={name: float(metrics[name])}, force=True)
            manager.wait_until_finished()
    LOG.info("step %d is the best so far: %s %.6g", step, name, metrics[name])


def save_inference(directory: str | Path, variables: Mapping[str, Any], config: ConfigDict, *, step: int = 0) -> None:
    """Writes weights without training state ({'params', 'model_state'}) as DIRECTORY/checkpoints/STEP.

    `load_inference` and `start_from` read it like a run; training cannot be resumed from it.
    """
    with open_manager(directory) as manager:
        manager.save(step, args=ocp.args.Composite(**_inference_items(dict(variables), config)), force=True)
        manager.wait_until_finished()


def _inference_items(variables: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    plain = json.loads(to_json(config))
    return {"inference": ocp.args.PyTreeSave(variables), "config": ocp.args.JsonSave(plain)}


def restore_latest(
    manager: ocp.CheckpointManager, abstract_state: TrainState, config: ConfigDict | None = None
) -> TrainState | None:
    """The state of the latest checkpoint, or None where there is none.

    Where the latest cannot be read, the one before it is used, and so on; those passed over are renamed to
    STEP.damaged, so that training can save these steps again.

    Args:
      manager: of the run's checkpoints.
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings to restore to, whatever was saved on.
      config: the run's; compared with the checkpoint's where given.

    Raises:
      ValueError: the checkpoint is of another configuration, has other parameters or shapes, or only weights.
      DamagedError: there are checkpoints, but none can be read.
    """
    errors = {}
    for step in sorted(manager.all_steps(), reverse=True):
        where = paths.expand(manager.directory) / str(step)
        damage = checksums.problem(where, ("config", "state")) if jax.process_index() == 0 else ""
        if not _everywhere(not damage):
            errors[where] = DamagedError(f"{where} cannot be read: {damage or 'see the first host'}")
            continue
        try:
            state = _restore(manager, step, where, abstract_state, config)
        except DamagedError as error:
            errors[where], state = error, None
        if _everywhere(state is not None):
            _put_aside(manager, errors, where)
            return state
        errors.setdefault(where, DamagedError(f"{where} cannot be read on another host"))
    if errors:
        raise _none_readable(paths.expand(manager.directory), errors.values())
    return None


def _restore(manager, step: int, where: Path, abstract_state: TrainState, config: ConfigDict | None) -> TrainState:
    with _reading(where):
        saved = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        has_state = "state" in json.loads(paths.read(where / "_CHECKPOINT_METADATA"))["item_handlers"]
    if config is not None:
        _check_same_run(saved, config, where)
    if not has_state:
        raise ValueError(f"{where} holds weights but no training state; train elsewhere with config.start_from")
    with _reading(where):
        shapes = manager.item_metadata(step).state.tree
    check_shapes(shapes, abstract_state, where)
    with _reading(where):
        restore = ocp.args.StandardRestore(abstract_state)
        return manager.restore(step, args=ocp.args.Composite(state=restore)).state


@contextlib.contextmanager
def _reading(where: Path, advice: str = "") -> Iterator[None]:
    """What Orbax, TensorStore or JSON raise for missing, cut off or altered files is of any type."""
    try:
        yield
    except Exception as error:
        raise DamagedError(f"{where} cannot be read ({_brief(error)}){advice}") from error


def _brief(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"


def _everywhere(ok: bool) -> bool:
    """Whether it is true on all hosts."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())


def _none_readable(folder: Path, errors: Iterable[Exception]) -> DamagedError:
    lines = "\n  ".join(str(error) for error in errors)
    return DamagedError(
        f"no checkpoint in {folder} can be read; bring back a copy, or start anew in another --workdir\n  {lines}"
    )


def _put_aside(manager: ocp.CheckpointManager, errors: Mapping[Path, Exception], used: Path) -> None:
    for where, error in errors.items():
        aside = where.with_name(f"{where.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        LOG.warning("%s; going on from %s instead, and keeping the other as %s", error, used, aside.name)
        if jax.process_index() == 0:
            paths.move(where, aside)
    if errors:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        manager.reload()


def _check_same_run(saved: Mapping, config: ConfigDict, where: Path) -> None:
    changed, task = dict(sorted(changes(saved, config).items())), translated(config)["task"]
    lines = {key: f"config.{short_key(key, task)}: {a!r} there, {b!r} now" for key, (a, b) in changed.items()}
    fixed = [lines[key] for key in changed if _is_fixed(key)]
    fixed += [f"{lines[key]}; it stays on or off" for key, (a, b) in changed.items() if _is_switched(key, a, b)]
    if fixed:
        raise ValueError(
            f"{where} is a checkpoint of another configuration; use a new --workdir or restore the values.\n  "
            + "\n  ".join(fixed)
        )
    for line in lines.values():
        LOG.info("resuming with a changed value: %s", line)


def check_same_parts(saved: Mapping, config: ConfigDict, where: Path) -> None:
    """ValueError where a run's configuration is of other parts than this one."""
    kinds = [
        {name: part.get("name") for name, part in translated(values)["task"].get("parts", {}).items()}
        for values in (saved, config)
    ]
    if kinds[0] != kinds[1]:
        there, here = (", ".join(f"{name} ({kind})" for name, kind in each.items()) for each in kinds)
        raise ValueError(f"{where} is a run of {there}, but the configuration is of {here}; give the one of the run")


def _is_fixed(key: str) -> bool:
    return not key.endswith(FREE_KEYS) and any(key == k or key.startswith(f"{k}.") for k in FIXED_KEYS)


def _is_switched(key: str, old: Any, new: Any) -> bool:
    """Whether the optimizer's state has another structure."""
    return key in SWITCHES and (old == SWITCHES[key]) != (new == SWITCHES[key])


def check_shapes(saved: Any, wanted: Any, where: Path) -> None:
    old, new = _shapes(saved), _shapes(wanted)
    wrong = [f"{k}: {old[k]} in the checkpoint, {new[k]} here" for k in new if k in old and old[k] != new[k]]
    wrong += [f"{k}: not in the checkpoint" for k in new if k not in old]
    wrong += [f"{k}: only in the checkpoint" for k in old if k not in new]
    if wrong:
        raise ValueError(f"{where} does not fit this configuration:\n  " + "\n  ".join(sorted(wrong)[:20]))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape) for keys, leaf in leaves}


def locate(path: str | Path) -> Path:
    """`path`, or where the weights that come with the package are for 'builtin' (a folder of yours is './builtin')."""
    return Path(__file__).parents[1] / BUILTIN if str(path) == BUILTIN else paths.expand(path)


def load_inference(path: str | Path, step: int | None = None) -> tuple[ConfigDict, dict[str, Any]]:
    """Configuration and weights of a run, without its training state.

    Args:
      path: a run directory, its checkpoints/ directory, or one checkpoint in it; RUN/best for the best evaluation's
        weights; or 'builtin' (see `locate`).
      step: which checkpoint; the latest where None.

    Returns:
      The run's config, in the form of parts (`config.translated`; lists where it had tuples), and {'params',
      'model_state'}: nested dicts of NumPy arrays, float32 where they are stored as float16 to save space.

    Raises:
      FileNotFoundError: no checkpoint there, or not of that step.
      DamagedError: none of them (or not that step) can be read; otherwise the latest that can is taken, with a warning.
    """
    folder, steps = _find_checkpoints(place(locate(path)))
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {path}; give a run directory, its {FOLDER}/ or one checkpoint in it")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; there are {sorted(steps)}")
    errors = []
    for candidate in sorted(steps, reverse=True) if step is None else [step]:
        try:
            config, weights = _load(folder, candidate)
        except DamagedError as error:
            errors.append(error)
            continue
        for error in errors:
            LOG.warning("%s; using %s instead", error, folder / str(candidate))
        return config, weights
    raise _none_readable(folder, errors)


def _load(folder: Path, step: int) -> tuple[ConfigDict, dict[str, Any]]:
    where = folder / str(step)
    if damage := checksums.problem(where, ("config", "inference")):
        raise DamagedError(f"{where} cannot be read: {damage}; bring back a copy, or install the package again")
    options = ocp.CheckpointManagerOptions(create=False)
    with _reading(where), _manager(folder, options) as manager:
        tree = manager.item_metadata(step).inference.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
        items = manager.restore(step, args=ocp.args.Composite(inference=restore, config=ocp.args.JsonRestore()))
    weights = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, items.inference)
    return translated(items.config).lock(), weights


def latest_step(path: str | Path) -> int:
    """The step of the latest checkpoint of a run directory, -1 where there is none."""
    return max(_find_checkpoints(place(path))[1], default=-1)


def _find_checkpoints(path: Path) -> tuple[Path, list[int]]:
    if (path / "inference").is_dir() and path.name.isdigit():
        return path.parent, [int(path.name)]
    for folder in (path / FOLDER, path):
        found = [path.parent for path in folder.glob("*/inference")]
        steps = [int(step.name) for step in found if step.name.isdigit() and _is_whole(step)]
        if steps:
            return folder, steps
    return path, []
