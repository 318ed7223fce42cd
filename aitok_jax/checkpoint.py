"""Checkpoints with Orbax: written in the background, restored on any number of devices, usable as weights alone.

A run keeps them in WORKDIR/checkpoints/STEP with three items: `state` (everything, to go on training), `inference`
({'params', 'model_state'}; the moving average of the parameters where there is one) and `config` (JSON).
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aitok_jax import config_utils
from aitok_jax.train_state import TrainState

LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
BUILTIN = "builtin"  # names the weights that come with the package, in a folder of that name
VOCABULARY_TABLES = ("voc_embed", "outp_bias")
# A run goes on only where these agree with its checkpoint; all else (lengths, intervals, paths) may change.
FIXED_KEYS = ("name", "seed", "batch_size", "task", "optim.name", "ema_decay")


def open_manager(workdir: str | Path, *, keep: int = 1) -> ocp.CheckpointManager:
    """The manager of WORKDIR/checkpoints, made where absent; keeps the latest `keep` checkpoints. Close it."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return _manager(Path(workdir) / FOLDER, options)


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "inference": ocp.PyTreeCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: TrainState, config: ConfigDict) -> None:
    """Starts writing the state under its step number; the state may be donated as soon as this returns."""
    variables = {"params": state.inference_params, "model_state": state.model_state}
    items = _inference_items(variables, config) | {"state": ocp.args.StandardSave(state)}
    manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)


def save_inference(directory: str | Path, variables: Mapping[str, Any], config: ConfigDict, *, step: int = 0) -> None:
    """Writes weights without training state ({'params', 'model_state'}) as DIRECTORY/checkpoints/STEP.

    `load_inference` and `start_from` read it like a run; training cannot be resumed from it.
    """
    with open_manager(directory) as manager:
        manager.save(step, args=ocp.args.Composite(**_inference_items(dict(variables), config)), force=True)
        manager.wait_until_finished()


def _inference_items(variables: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    plain = json.loads(config_utils.to_json(config))
    return {"inference": ocp.args.PyTreeSave(variables), "config": ocp.args.JsonSave(plain)}


def restore_latest(
    manager: ocp.CheckpointManager, abstract_state: TrainState, config: ConfigDict | None = None
) -> TrainState | None:
    """The state of the latest checkpoint, or None where there is none.

    Args:
      manager: of the run's checkpoints.
      abstract_state: jax.ShapeDtypeStruct leaves with the shardings to restore to, whatever was saved on.
      config: the run's; compared with the checkpoint's where given.

    Raises:
      ValueError: the checkpoint is of another configuration, has other parameters or shapes, or only weights.
    """
    step = manager.latest_step()
    if step is None:
        return None
    where = Path(manager.directory) / str(step)
    if config is not None:
        saved = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        _check_same_run(saved, config, where)
    if not (where / "state").is_dir():
        raise ValueError(f"{where} holds weights but no training state; train elsewhere with config.start_from")
    _check_shapes(manager.item_metadata(step).state.tree, abstract_state, where)
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
    return restored.state


def _check_same_run(saved: Mapping, config: ConfigDict, where: Path) -> None:
    old, new = config_utils.flatten(saved), config_utils.flatten(json.loads(config_utils.to_json(config)))
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}
    lines = {key: f"config.{key}: {a!r} there, {b!r} now" for key, (a, b) in changed.items()}
    fixed = [line for key, line in lines.items() if any(key == k or key.startswith(f"{k}.") for k in FIXED_KEYS)]
    if fixed:
        raise ValueError(
            f"{where} is a checkpoint of another configuration; use a new --workdir or restore the values.\n  "
            + "\n  ".join(fixed)
        )
    for line in lines.values():
        LOG.info("resuming with a changed value: %s", line)


def _check_shapes(saved: Any, wanted: Any, where: Path) -> None:
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
    return Path(__file__).parent / BUILTIN if str(path) == BUILTIN else Path(path)


def load_inference(path: str | Path, step: int | None = None) -> tuple[ConfigDict, dict[str, Any]]:
    """Configuration and weights of a run, without its training state.

    Args:
      path: a run directory, its checkpoints/ directory, or one checkpoint in it; or 'builtin' (see `locate`).
      step: which checkpoint; the latest where None.

    Returns:
      The run's config (lists where it had tuples) and {'params', 'model_state'}: nested dicts of NumPy arrays, float32
      where they are stored as float16 to save space.

    Raises:
      FileNotFoundError: no checkpoint there, or not of that step.
    """
    folder, steps = _find_checkpoints(locate(path))
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {path}; give a run directory, its {FOLDER}/ or one checkpoint in it")
    step = max(steps) if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}; there are {sorted(steps)}")
    with _manager(folder, ocp.CheckpointManagerOptions(create=False)) as manager:
        tree = manager.item_metadata(step).inference.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
        items = manager.restore(step, args=ocp.args.Composite(inference=restore, config=ocp.args.JsonRestore()))
    weights = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, items.inference)
    return ConfigDict(items.config).lock(), weights


def latest_step(path: str | Path) -> int:
    """The step of the latest checkpoint of a run directory, -1 where there is none."""
    return max(_find_checkpoints(Path(path))[1], default=-1)


def _find_checkpoints(path: Path) -> tuple[Path, list[int]]:
    if (path / "inference").is_dir() and path.name.isdigit():
        return path.parent, [int(path.name)]
    for folder in (path / FOLDER, path):
        steps = [int(p.parent.name) for p in folder.glob("*/inference") if p.parent.name.isdigit()]
        if steps:
            return folder, steps
    return path, []


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What `merge` did, as '/'-joined paths: taken over, in the source alone, in the target alone (kept)."""

    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.used)} used, {len(self.unused)} unused, {len(self.missing)} missing"]
        parts += [f"  unused: {name}" for name in self.unused] + [f"  missing: {name}" for name in self.missing]
        return "\n".join(parts)


def merge(target: Mapping, source: Mapping, prefix: str = "") -> tuple[dict, MergeReport]:
    """Replaces leaves of the subtree `prefix` of `target` by those of `source` with the same path.

    Args:
      target: nested dicts of arrays, e.g. {'params', 'model_state'} of a new run.
      source: the same of another run, from `load_inference`.
      prefix: '/'-joined path in `target`, '' for all of it. Where `source` has this path too, its subtree is taken
        ('params' from the parameters of another solver), otherwise all of `source` ('model_state/tokenizer' from the
        run of a tokenizer).

    Returns:
      A new tree and the report. Values taken over have the target's dtype. A vocabulary that has grown at its end (a
      detection model has no spare codes) keeps its own last rows.

    Raises:
      ValueError: `target` has no such subtree, nothing was used, or shapes differ.
    """
    names = prefix.split("/") if prefix else []
    if _lookup(target, names) is None:
        raise ValueError(f"start_from: the state has no {prefix!r}; it has {', '.join(sorted(_top_paths(target)))}")
    found = _lookup(source, names)
    source = source if found is None else found
    used, unused, missing = [], [], []

    def take(old: Any, new: Any, path: str) -> Any:
        if isinstance(old, Mapping) and (new is None or isinstance(new, Mapping)):
            new = {} if new is None else new
            unused.extend(f"{path}/{p}" for k in new if k not in old for p in _leaf_paths(new[k], k))
            return {k: take(v, new.get(k), f"{path}/{k}") for k, v in old.items()}
        if new is None:
            missing.append(path)
            return old
        if path.rsplit("/", 1)[-1] in VOCABULARY_TABLES and _is_longer(old, new):
            used.append(path)
            return np.concatenate([np.asarray(new, old.dtype), _on_host(old)[len(new) :]])
        if isinstance(old, Mapping) or isinstance(new, Mapping) or tuple(old.shape) != tuple(new.shape):
            raise ValueError(f"start_from: {path.strip('/')} is {_kind(new)} in the source but {_kind(old)} here")
        used.append(path)
        return new.astype(old.dtype)

    def descend(tree: Any, rest: list[str]) -> Any:
        if not rest:
            return take(tree, source, prefix)
        return {k: descend(v, rest[1:]) if k == rest[0] else v for k, v in tree.items()}

    merged = descend(target, names)
    if not used:
        raise ValueError(
            f"start_from: nothing of the source fits {prefix!r}; the source has {sorted(_top_paths(source))}, "
            f"the state {sorted(_top_paths(_lookup(target, names)))}"
        )
    return merged, MergeReport(*(tuple(sorted(p.strip("/") for p in paths)) for paths in (used, unused, missing)))


def start_from(variables: dict, config: ConfigDict) -> dict:
    """Takes over weights of other runs, as `config.start_from` says, and logs what was used.

    Raises:
      ValueError: weights that do not fit, or a part of `model_state`, which is never trained, that stays without.
    """
    for prefix, path in (config.get("start_from") or {}).items():
        if not path:
            if prefix.startswith("model_state"):
                raise ValueError(f"start_from: {prefix!r} is never trained; give the run directory of its tokenizer")
            continue
        _, source = load_inference(path)
        variables, report = merge(variables, source, prefix)
        LOG.info("start_from %s <- %s: %s", prefix, path, report)
        if prefix.startswith("model_state") and report.missing:
            raise ValueError(f"start_from: {prefix!r} is never trained, but {path} lacks {', '.join(report.missing)}")
    return variables


def _on_host(x: Any) -> np.ndarray:
    """The whole array, wherever its parts lie; with several hosts, all of them must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _is_longer(old: Any, new: Any) -> bool:
    return len(old) > len(new) and old.shape[1:] == new.shape[1:]


def _lookup(tree: Any, names: list[str]) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _leaf_paths(tree: Any, path: str) -> list[str]:
    if not isinstance(tree, Mapping):
        return [path]
    return [p for key, value in tree.items() for p in _leaf_paths(value, f"{path}/{key}")]


def _top_paths(tree: Any) -> set[str]:
    return {"/".join(path.split("/")[1:3]) for path in _leaf_paths(tree, "")}


def _kind(value: Any) -> str:
    return "a group of parameters" if isinstance(value, Mapping) else f"of shape {tuple(value.shape)}"
