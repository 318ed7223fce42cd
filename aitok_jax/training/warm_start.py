"""Starting a run from weights of others: whole, in part, with a longer vocabulary, and with a report."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aitok_jax.training import checkpoint

LOG = logging.getLogger(__name__)
VOCABULARY_TABLES = ("voc_embed", "outp_bias")


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
      source: the same of another run, from `checkpoint.load_inference`.
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
    """Takes over weights of other runs, one entry of `config.start_from` after the other, and logs what was used.

    Raises:
      ValueError: weights that do not fit, or a part of `model_state`, which is never trained, that stays without.
    """
    sources: dict[str, dict] = {}
    for prefix, path in config.start_from.items():
        if not path:
            if prefix.startswith("model_state"):
                raise ValueError(f"start_from: {prefix!r} is never trained; give the run directory of its tokenizer")
            continue
        if path not in sources:
            sources[path] = checkpoint.load_inference(path)[1]
        variables, report = merge(variables, sources[path], prefix)
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
