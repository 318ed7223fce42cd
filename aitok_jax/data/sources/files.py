"""Encoded files of data sets: reading them with errors that name them, and going on past broken ones."""

import hashlib
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from aitok_jax import paths
from aitok_jax.image import ImageError, read_image, read_shape


class DataError(ValueError):
    """A file of a data set is broken or does not fit; the message names the file and says what to do."""


READ_ERRORS = (DataError, FileNotFoundError)  # what `read` of a source raises for a broken example


class File(NamedTuple):
    """An encoded file, on the disk or in a record; the name is the one that errors say."""

    name: str
    content: bytes


class Skipping:
    """Access past broken examples, for sources with `names`, `read` and `len`."""

    def __init__(self, on_error: str):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'")
        self.on_error, self.reasons = on_error, {}
        self._lock = threading.Lock()

    @property
    def skipped(self) -> set[str]:
        """Names left out so far because they are broken; `reasons` says why."""
        return set(self.reasons)

    def read_readable(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """Like `read`, with the index that was read: under on_error='skip' the first readable one of index, index+1, …

        Every broken example is logged once with the reason and added to `skipped`.
        """
        if self.on_error == "raise":
            return index, self.read(index)
        reason = None
        for candidate in (*range(index, len(self)), *range(index)):
            if self.names[candidate] in self.reasons:
                continue
            try:
                return candidate, self.read(candidate)
            except READ_ERRORS as error:
                reason = error
                self._skip(self.names[candidate], error)
        raise DataError(f"all {len(self)} examples are broken; see the log for each") from reason

    def _skip(self, name: str, reason: object) -> None:
        with self._lock:  # the pipeline reads in threads
            known = name in self.reasons
            self.reasons.setdefault(name, str(reason))
        if not known:
            logging.warning("skipped %s: %s", name, reason)


def read_file(path: str | Path) -> File:
    try:
        return File(str(path), paths.read(paths.expand(path)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing file; restore it, take it off the list, or set on_error='skip'"
        ) from None


def decode_image(file: File) -> np.ndarray:
    """uint8[H,W,3] RGB, as of `image.read_image`; DataError where it is broken."""
    try:
        return read_image(file.content)
    except ImageError as error:
        raise DataError(f"{file.name}: {error}, or take it off the list, or set on_error='skip'") from error


def image_shape(file: File) -> tuple[int, int]:
    """Height and width that `decode_image` gives, from the head of the file; DataError where it is broken."""
    try:
        return read_shape(file.content)
    except ImageError as error:
        raise DataError(f"{file.name}: {error}, or take it off the list, or set on_error='skip'") from error


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def size_text(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
