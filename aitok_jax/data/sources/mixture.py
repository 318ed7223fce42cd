"""Two sources of one task as one, with a fixed number of examples of each in every batch."""

from typing import Any

import numpy as np

from aitok_jax.data.sources.files import DataError


class Mixture:
    """The examples of `first`, then those of `second`; random access as to each of them.

    Args:
      first, second: sources of one kind; where they have classes, the same ones.
      count: how many examples of a batch are of `second`.

    Raises:
      DataError: the classes differ.
    """

    def __init__(self, first: Any, second: Any, count: int):
        self._sources, self._count = (first, second), count
        self.names = [*first.names, *second.names]
        self.images, self.on_error = getattr(first, "images", True), first.on_error
        self.modality = getattr(first, "modality", None)
        if hasattr(first, "categories"):
            self.categories, self.category_ids = first.categories, first.category_ids
            if (second.categories, second.category_ids) != (self.categories, self.category_ids):
                raise DataError(f"{first.path} and {second.path} list other categories; give both the same list")

    def __len__(self) -> int:
        return len(self.names)

    def shares(self, batch_size: int) -> list[tuple[int, int]]:
        """(examples, examples of a batch) of each source, in their order. ValueError where a batch has none of one."""
        if not 0 < self._count < batch_size:
            raise ValueError(f"data.also_count={self._count} must be between 1 and batch_size - 1 = {batch_size - 1}")
        first, second = self._sources
        return [(len(first), batch_size - self._count), (len(second), self._count)]

    def read(self, index: int) -> dict[str, np.ndarray]:
        source, place, _ = self._at(index)
        return source.read(place)

    def read_readable(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """As in `files.Skipping`; the one that takes a broken example's place is of the same source."""
        source, place, offset = self._at(index)
        used, example = source.read_readable(place)
        return offset + used, example

    def fingerprint(self) -> dict[str, Any]:
        first, second = self._sources
        return {"first": first.fingerprint(), "second": second.fingerprint(), "count": self._count}

    def _at(self, index: int) -> tuple[Any, int, int]:
        first, second = self._sources
        return (first, index, 0) if index < len(first) else (second, index - len(first), len(first))
