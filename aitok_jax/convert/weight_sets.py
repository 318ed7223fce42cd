"""Which dictionary of a weight file is meant, where it holds several, and what is said of the rest."""

import itertools
import re
from typing import Any

import numpy as np

from aitok_jax.convert.torch_file import Placeholder, Tensor, WeightFileError

WRAPPERS = ("weights", "state_dict", "model", "module")
MAX_LOOKED_AT = 50  # dictionaries and objects beside the weights, of which all may be one large dictionary
_AVERAGED = re.compile(r"(^|_)ema(_|$)")
_TENSOR = re.compile(r"\._rebuild\w*$")  # the functions that make tensors of kinds which are not read


def choose(tree: Any, key: str | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arrays by name that are meant, and notes on what is left in the file.

    Args:
      tree: what the file holds, with a `Tensor` or an array for each.
      key: of the dictionary to take, such as 'model_ema'; None takes the innermost of those under `WRAPPERS`. Names
        such as 'model_ema.norm.bias' count as a dictionary 'model_ema'.

    Raises:
      WeightFileError: no arrays by name there.
    """
    if isinstance(tree, Placeholder):
        raise WeightFileError(
            f"holds no arrays by name but an object, {tree.name!r}", "load it with PyTorch and save its state_dict()"
        )
    plain, found, taken = _innermost(tree)
    notes = _notes({name: value for name, value in found.items() if name not in (*taken, key)})
    more = f" ({'; '.join(notes[:5])})" if notes else ""
    if key is not None:
        if not isinstance(found.get(key), dict):
            raise WeightFileError(
                f"holds no dictionary under the key {key!r:.80}{more}", "leave it out or give another"
            )
        plain, objects, _ = _innermost(found[key])
        notes += _notes({name: value for name, value in objects.items() if isinstance(value, Placeholder)})
    if arrays := _arrays(plain):
        return arrays, notes
    where = f"under {key!r:.80}" if key else f"nor a dictionary of them under {', '.join(WRAPPERS)}"
    raise WeightFileError(f"holds no arrays by name, {where}{more}", "give one of weights, or the key of theirs")


def _innermost(tree: Any) -> tuple[dict, dict[str, Any], list[str]]:
    """The innermost wrapped dictionary, the dictionaries and objects on the way by name, and the wrappers taken."""
    found, taken = {}, []
    for _ in WRAPPERS:
        tree = _grouped(tree) if isinstance(tree, dict) else {}
        level = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, dict | Placeholder)}
        found = level | found
        inner = [name for name in WRAPPERS if isinstance(level.get(name), dict)]
        if not inner:
            break
        taken.append(inner[0])
        tree = level[inner[0]]
    return tree, found, taken


def _unwrapped(tree: dict) -> dict:
    for _ in WRAPPERS:
        tree = next((tree[name] for name in WRAPPERS if isinstance(tree.get(name), dict)), tree)
    return tree


def _grouped(tree: dict) -> dict:
    """Names such as 'model_ema.norm.bias' as a dictionary of their own."""
    plain, averaged = {}, {}
    for name, value in tree.items():
        first, dot, rest = name.partition(".") if isinstance(name, str) else ("", "", "")
        if dot and _AVERAGED.search(first):
            averaged.setdefault(first, {})[rest] = value
        else:
            plain[name] = value
    return averaged | plain


def _arrays(tree: dict) -> dict[str, Any]:
    for name, value in tree.items():
        if isinstance(value, Placeholder) and _TENSOR.search(value.name):
            kind = f"of a kind that is not read ({value.name!r})"
            raise WeightFileError(f"{name!r:.80} is a tensor {kind}", "save it as a plain one")
    return {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor | np.ndarray)}


def _notes(found: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    for name, value in itertools.islice(found.items(), MAX_LOOKED_AT):
        if isinstance(value, Placeholder):
            notes.append(f"passed over: {_printable(name)}: {_printable(value.name)}")
        elif count := sum(isinstance(array, Tensor | np.ndarray) for array in _unwrapped(value).values()):
            notes.append(f"beside: {_printable(name)}: {count} arrays; --key={_printable(name)} takes them")
    return tuple(notes)


def _printable(text: str) -> str:
    return text[:80] if text.isprintable() else ascii(text)[:80]
