"""What a library checks before it computes: kinds of arguments, and the process that it is called in."""

import operator
import os
from typing import Any

import numpy as np

_loaded = {"here": False, "before_fork": False}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _loaded.update(before_fork=_loaded["here"]))


def check_process() -> None:
    """RuntimeError in a process forked from one that had loaded a model: JAX's threads are not there, so it would hang.

    A process that is spawned, or that loads a model as the first after the fork, passes.
    """
    if _loaded["before_fork"]:
        raise RuntimeError(
            "a model was loaded before this process was forked, and JAX does not survive a fork (it would hang): load "
            "it only in the workers, or start them by 'spawn' (DataLoader: multiprocessing_context='spawn')"
        )
    _loaded["here"] = True


def check_path(name: str, path: Any) -> None:
    """ValueError for what is no path."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(f"{name}={path!r:.200} must be a path, a str or pathlib.Path")


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """A whole number of any library as Python's; ValueError for what is none, or below `least`."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) or np.ma.is_masked(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        at_least = "" if least is None else f", at least {least}"
        raise ValueError(f"{name}={value!r:.200} must be a whole number{at_least}")
    return number
