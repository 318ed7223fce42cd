"""Finds the parity cases: arrays made with the published system, read from $AITOK_PARITY_DIR or ../shared/parity.

Without either, the compact subset in tests/parity/cases is used, so that a plain `pytest` proves parity anywhere. It
has a slice of every kind: large arrays, the last two stages of Swin-V2, the depth part of the joint case and the depth
head's VQ-VAE are left out. What lies in its paligemma/ is vqvae_insseg_small in PaliGemma's form, not PaliGemma's own.
"""

import functools
import json
import os
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def directory() -> Path:
    if "AITOK_PARITY_DIR" in os.environ:
        return Path(os.environ["AITOK_PARITY_DIR"])
    shared = HERE.parents[2] / "shared" / "parity"
    return shared if shared.is_dir() else HERE / "cases"


def find(pattern: str, suffix: str = ".npz"):
    """A pytest parametrisation over the files that match; one skipped case with a message where there is none."""
    names = sorted(p.stem for p in directory().glob(f"*{suffix}") if fnmatch(p.stem, pattern))
    missing = pytest.param("", marks=pytest.mark.skip(reason=f"no {pattern}{suffix} in {directory()}"))
    return pytest.mark.parametrize("name", names or [missing])


def full_models(pattern: str = "*") -> list:
    """The kinds of full-size state dicts whose names are listed, as parameters of a test; a skipped one for none."""
    path = directory() / "names.json"
    if not path.is_file():
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no {path}"))]
    return sorted(kind for kind in json.loads(path.read_text())["state_dicts"] if fnmatch(kind, pattern))


@functools.cache
def notes() -> dict:
    return json.loads((directory() / "notes.json").read_text())


class Case:
    """One case: `case["in/img"]`, `"out/x" in case`, `case.hp`, `case.state_dict(prefix)`."""

    def __init__(self, name: str):
        self.name = name
        self._arrays = np.load(directory() / f"{name}.npz")
        self.hp = notes()[name]["hp"]
        self.notes = notes()[name]

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays.files

    def keys(self, prefix: str = "") -> list[str]:
        return [k for k in self._arrays.files if k.startswith(prefix)]

    def state_dict(self, prefix: str = "") -> dict[str, np.ndarray]:
        start = f"sd/{prefix}"
        return {k[len(start) :]: self[k] for k in self.keys(start)}


@functools.cache
def load(name: str) -> Case:
    return Case(name)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


def check(ours, theirs, tolerance: float = 1e-4) -> None:
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def leaf(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree
