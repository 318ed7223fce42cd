"""What lies where: a table of all parameters, and the memory of a device."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parameter_table(params: Any, shardings: Any) -> str:
    """Path, shape, what splits it, and bytes (all, and on one device) of every parameter.

    Args:
      params: arrays, or what has their `shape` and `dtype`.
      shardings: a NamedSharding for each.
    """
    rows = [("parameter", "shape", "split", "bytes", "on a device")]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (keys, leaf), target in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        split = [f"axis {i} over {axis}" for i, axis in enumerate(target.spec) if axis is not None]
        shape = "×".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, ", ".join(split) or "-", size(_bytes(leaf)), size(_bytes(leaf, target))))
    total, count = size(tree_bytes(params)), f"{parameter_count(params):,}"
    rows.append((f"{len(leaves)} parameters", count, "", total, size(tree_bytes(params, shardings))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def state_memory(state: Any, shardings: Any) -> dict[str, int]:
    """Bytes on one device of each part of a TrainState, exact: parameters, optimizer, EMA, what is not trained."""
    parts = {"parameters": "params", "optimizer": "opt_state", "moving average": "ema_params", "frozen": "model_state"}
    return {name: tree_bytes(getattr(state, part), getattr(shardings, part)) for name, part in parts.items()}


def step_memory(compiled: Any) -> dict[str, int]:
    """Bytes on one device that a compiled step takes, as the compiler says; {} where it does not.

    'temporary' is what it needs besides its arguments and results: activations, gradients, buffers of collectives.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    taken = {"arguments": "argument", "results": "output", "of them in place": "alias", "temporary": "temp"}
    return {name: int(getattr(analysis, f"{part}_size_in_bytes")) for name, part in taken.items()}


def describe(memory: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in memory.items())


def tree_bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes of all arrays of a tree, or of their part on one device."""
    leaves = jax.tree.leaves(tree)
    targets = jax.tree.leaves(shardings) if shardings is not None else [None] * len(leaves)
    return sum(_bytes(leaf, target) for leaf, target in zip(leaves, targets, strict=True))


def _bytes(leaf: Any, target: Any = None) -> int:
    shape = leaf.shape if target is None else target.shard_shape(tuple(leaf.shape))
    return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize


def size(count: int) -> str:
    """'3.2 MiB'."""
    power = 0
    while count >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return f"{count / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"
