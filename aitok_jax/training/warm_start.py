"""Starting a run from weights of others: whole or in part, with other classes or sizes, and with a report."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.tasks.vocabulary import same_meaning
from aitok_jax.training import checkpoint

LOG = logging.getLogger(__name__)
VOCABULARY_TABLES = ("voc_embed", "outp_bias")
POSITION_TABLES = ("dec_embed",)
_LISTED = 8  # lines of a report of one kind


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What `merge` did, by '/'-joined paths.

    Attributes:
        used: taken over, whole or in part. partly: of these, those in part, and what was taken.
        unfit: left out, and why. unused: in the source alone. missing: in the target alone, which keeps its own.
    """

    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    partly: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unfit: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{len(self.used)} used, {len(self.unused)} unused, {len(self.missing)} missing"
        lines = [f"in part  {path}: {what}" for path, what in self.partly.items()]
        lines += [f"left out {path}: {why}" for path, why in self.unfit.items()]
        for kind, names in (("unused  ", self.unused), ("missing ", self.missing)):
            lines += [f"{kind} {name}" for name in names[:_LISTED]]
            if len(names) > _LISTED:
                lines.append(f"{kind} and {len(names) - _LISTED} more")
        return "\n  ".join([counts, *lines])


def merge(
    target: Mapping, source: Mapping, prefix: str = "", tokens: Mapping[int, int] | None = None
) -> tuple[dict, MergeReport]:
    """Replaces leaves of the subtree `prefix` of `target` by those of `source` with the same path.

    Args:
      target: nested dicts of arrays, e.g. {'params', 'model_state'} of a new run.
      source: the same of another run, from `checkpoint.load_inference`.
      prefix: '/'-joined path in `target`, '' for all of it. Where `source` has this path too, its subtree is taken
        ('params' from the parameters of another solver), otherwise all of `source` ('model_state/tokenizer' from the
        run of a tokenizer).
      tokens: of the vocabulary, the target's ids and the source's that mean the same; None: those of the same number.

    Returns:
      A new tree and the report. Values taken over have the target's dtype. Tables of the vocabulary take the rows of
      `tokens`, and tables of positions the first places; what else has another shape is left out.

    Raises:
      ValueError: `target` has no such subtree, nothing was used, or most of it does not fit.
    """
    new = flatten_dict(target, sep="/", keep_empty_nodes=True)
    own = {path for path, leaf in _arrays(new) if _inside(path, prefix)}
    if not own:
        raise ValueError(f"start_from: the state has no {prefix!r}; it has {_summary(new)}")
    given = theirs = dict(_arrays(flatten_dict(source, sep="/")))
    if not any(_inside(path, prefix) for path in theirs):
        theirs = {f"{prefix}/{path}": leaf for path, leaf in theirs.items()}
    common = sorted(own & theirs.keys())
    unused = sorted(path for path in theirs if _inside(path, prefix) and path not in own)
    missing = sorted(own - theirs.keys())
    for group, leaves, where in ((missing, unused, "the source"), (unused, missing, "the state")):
        if pair := next(((g, leaf) for leaf in leaves for g in group if g.startswith(f"{leaf}/")), None):
            raise ValueError(f"start_from: {pair[1]} is an array in {where}, where the other has a group ({pair[0]})")
    if not common:
        raise ValueError(
            f"start_from: nothing of the source fits {prefix!r}; the source has {_summary(given)}, the state "
            f"{_summary(own)}"
        )
    partly, unfit = {}, {}
    for path in common:
        taken, note = _taken(path, new[path], theirs[path], tokens)
        if taken is None:
            unfit[path] = note
            continue
        new[path] = taken
        if note:
            partly[path] = note
    _check_most_fits(common, unfit, new)
    used = tuple(path for path in common if path not in unfit)
    return unflatten_dict(new, sep="/"), MergeReport(used, tuple(unused), tuple(missing), partly, unfit)


def _taken(path: str, old: Any, new: Any, tokens: Mapping[int, int] | None) -> tuple[Any, str]:
    """What becomes of an array, None where it is left alone, and a note where that is not all of the source's."""
    name = path.rsplit("/", 1)[-1]
    if name in VOCABULARY_TABLES and old.shape[1:] == new.shape[1:]:
        pairs = {i: i for i in range(min(len(old), len(new)))} if tokens is None else tokens
        if pairs != {i: i for i in range(len(old))} or len(old) != len(new):
            rows = np.array(_on_host(old))
            rows[list(pairs)] = np.asarray(new)[list(pairs.values())]
            return rows, f"{len(pairs)} of {len(old)} tokens"
    if name in POSITION_TABLES and old.shape[0] == new.shape[0] and old.shape[2:] == new.shape[2:]:
        places = min(old.shape[1], new.shape[1])
        if old.shape[1] != new.shape[1]:
            table = np.array(_on_host(old))
            table[:, :places] = np.asarray(new)[:, :places]
            return table, f"the first {places} of {old.shape[1]} places"
    if tuple(old.shape) != tuple(new.shape):
        return None, f"of shape {tuple(new.shape)} in the source but of shape {tuple(old.shape)} here"
    return new.astype(old.dtype), ""


def _check_most_fits(common: Iterable[str], unfit: Mapping[str, str], new: Mapping[str, Any]) -> None:
    """ValueError where less than half of the numbers have the same shape: it is another model."""
    sizes = {path: math.prod(new[path].shape) for path in common}
    if 2 * sum(sizes[path] for path in unfit) > sum(sizes.values()):
        path, why = next(iter(unfit.items()))
        raise ValueError(
            f"start_from: most of the source does not fit, so it is of another model: {path} is {why}; give weights of "
            "this model's sizes, or the sizes of these weights"
        )


def _arrays(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((path, leaf) for path, leaf in flat.items() if leaf is not empty_node)


def _inside(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _summary(paths: Iterable[str]) -> str:
    return ", ".join(sorted({"/".join(path.split("/")[:2]) for path in paths})) or "nothing"


def start_from(
    variables: dict, config: ConfigDict, planned: Mapping[str, tuple[ConfigDict, dict]] | None = None
) -> dict:
    """Takes over weights of other runs, one entry of `config.start_from` after the other, and logs what was used.

    With `planned`, folder -> (configuration, variables) of runs that are not trained yet, it is a check, without a log.

    Raises:
      ValueError: weights that do not fit, or a tokenizer of a solver, which is never trained, that stays without.
    """
    sources: dict[str, tuple[ConfigDict, dict]] = {}
    whole = set()  # paths that have their weights
    for prefix, path in config.start_from.items():
        if not path:
            if prefix.startswith("model_state"):
                raise ValueError(f"start_from: {prefix!r} is never trained; give the run directory of its tokenizer")
            continue
        if path not in sources:
            later = [run for run in planned or () if path == run or path.startswith(f"{run}/")]
            sources[path] = planned[later[0]] if later else checkpoint.load_inference(path)
        theirs, source = sources[path]
        source = _tokenizer_of(config, theirs, source)
        has_vocabulary = "voc_embed" in variables["params"].get("transformer", {})
        tokens = _tokens(config, theirs) if has_vocabulary else None
        variables, report = merge(variables, source, prefix, tokens)
        whole |= set(report.used) - set(report.partly)
        if planned is None:
            LOG.info("start_from %s <- %s: %s", prefix or "(all)", path, report)
        if prefix.startswith("model_state") and (lacking := [*report.missing, *report.unfit]):
            raise ValueError(f"start_from: {prefix!r} is never trained, but {path} lacks {', '.join(lacking)}")
    if "" in config.start_from and config.task.name == "solver":
        _check_tokenizers(variables, whole)
    return variables


def _check_tokenizers(variables: Mapping, whole: set[str]) -> None:
    state = flatten_dict(variables["model_state"], sep="/", keep_empty_nodes=True)
    lacking = {path.split("/")[0] for path, _ in _arrays(state) if f"model_state/{path}" not in whole}
    if lacking:
        name = min(lacking)
        raise ValueError(
            f"start_from: {name} is never trained, and these weights have none that fits; give a run of it, as in "
            f"--config.start_from.model_state/{name}=RUN"
        )


def _tokenizer_of(config: ConfigDict, theirs: ConfigDict, source: dict) -> dict:
    """Of a solver, where a tokenizer is to be trained, the frozen one of the same kind."""
    if config.task.name != "tokenizer" or "parts" not in theirs.task or theirs.task.name != "solver":
        return source
    ((name, part),) = config.task.parts.items()
    kind = f"{part.name if 'name' in part else name}_tokenizer"
    if kind not in source["model_state"]:
        raise ValueError(f"start_from: these weights have no {kind}, only {', '.join(source['model_state'])}")
    return source["model_state"][kind]


def _tokens(config: ConfigDict, theirs: ConfigDict) -> dict[int, int] | None:
    """The tokens that mean the same in two solvers; None where one of them is none."""
    both = []
    for each in (theirs, config):
        if each.task.name != "solver":
            return None
        names = [category["name"] for category in each.categories]
        both.append((tasks.build(each.task).vocabulary, names))
    (old, old_names), (new, new_names) = both
    return same_meaning(old, new, old_names, new_names)


def _on_host(x: Any) -> np.ndarray:
    """The whole array, wherever its parts lie; with several hosts, all of them must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
