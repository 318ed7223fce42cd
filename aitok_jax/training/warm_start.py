"""Starting a run from weights of others: whole, in part, with a longer vocabulary, and with a report."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
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
    new = flatten_dict(target, sep="/", keep_empty_nodes=True)
    own = {path for path, leaf in _arrays(new) if _inside(path, prefix)}
    if not own:
        raise ValueError(f"start_from: the state has no {prefix!r}; it has {_summary(new)}")
    given = theirs = dict(_arrays(flatten_dict(source, sep="/")))
    if not any(_inside(path, prefix) for path in theirs):
        theirs = {f"{prefix}/{path}": leaf for path, leaf in theirs.items()}
    used = sorted(own & theirs.keys())
    unused = sorted(path for path in theirs if _inside(path, prefix) and path not in own)
    missing = sorted(own - theirs.keys())
    for group, leaves, where in ((missing, unused, "the source"), (unused, missing, "the state")):
        if pair := next(((g, leaf) for leaf in leaves for g in group if g.startswith(f"{leaf}/")), None):
            raise ValueError(f"start_from: {pair[1]} is an array in {where}, where the other has a group ({pair[0]})")
    if not used:
        raise ValueError(
            f"start_from: nothing of the source fits {prefix!r}; the source has {_summary(given)}, the state "
            f"{_summary(own)}"
        )
    for path in used:
        new[path] = _taken(path, new[path], theirs[path])
    return unflatten_dict(new, sep="/"), MergeReport(tuple(used), tuple(unused), tuple(missing))


def _taken(path: str, old: Any, new: Any) -> Any:
    if path.rsplit("/", 1)[-1] in VOCABULARY_TABLES and len(old) > len(new) and old.shape[1:] == new.shape[1:]:
        return np.concatenate([np.asarray(new, old.dtype), _on_host(old)[len(new) :]])
    if tuple(old.shape) != tuple(new.shape):
        raise ValueError(f"start_from: {path} is of shape {new.shape} in the source but of shape {old.shape} here")
    return new.astype(old.dtype)


def _arrays(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((path, leaf) for path, leaf in flat.items() if leaf is not empty_node)


def _inside(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _summary(paths: Iterable[str]) -> str:
    return ", ".join(sorted({"/".join(path.split("/")[:2]) for path in paths})) or "nothing"


def start_from(variables: dict, config: ConfigDict, planned: Mapping[str, dict] | None = None) -> dict:
    """Takes over weights of other runs, one entry of `config.start_from` after the other, and logs what was used.

    With `planned`, folder -> variables of runs that are not trained yet, it is a check, and logs nothing.

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
            later = [run for run in planned or () if path == run or path.startswith(f"{run}/")]
            sources[path] = planned[later[0]] if later else checkpoint.load_inference(path)[1]
        variables, report = merge(variables, sources[path], prefix)
        if planned is None:
            LOG.info("start_from %s <- %s: %s", prefix, path, report)
        if prefix.startswith("model_state") and report.missing:
            raise ValueError(f"start_from: {prefix!r} is never trained, but {path} lacks {', '.join(report.missing)}")
    return variables


def _on_host(x: Any) -> np.ndarray:
    """The whole array, wherever its parts lie; with several hosts, all of them must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
