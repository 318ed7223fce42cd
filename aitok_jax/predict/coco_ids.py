"""The ids that images and classes have in a COCO JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from aitok_jax import paths
from aitok_jax.predict.predictor import numbered

_OF_IMAGES = {"id": (int, str), "file_name": (str,)}
_OF_CATEGORIES = {"id": (int,), "name": (str, int)}
_CALLED = {int: "whole number", str: "text"}


class Annotations:
    """A COCO JSON, by the name that a user gave.

    Raises:
        ValueError: no COCO JSON, or one in which two images or two categories cannot be told apart.
        OSError: it cannot be read.
    """

    def __init__(self, name: str):
        self._name = f"--annotations={name}"
        text = paths.read(paths.expand(name))
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self._name} is no JSON ({error}); give a COCO instances JSON") from error
        content = content if isinstance(content, dict) else {}
        self._images = self._ids(content.get("images"), "images", _OF_IMAGES, PurePosixPath)
        self._categories = self._ids(content.get("categories", []), "categories", _OF_CATEGORIES, str)

    def of_files(self, files: Sequence[Path]) -> dict[Path, int | str]:
        """The id of each file: that of the image whose `file_name`, with its folders, is the end of the file's path.

        ValueError where it does not have all files.
        """
        ids = self._images
        found = {file: next((ids[end] for end in _ends(file) if end in ids), None) for file in files}
        if missing := [file for file, image_id in found.items() if image_id is None]:
            raise ValueError(
                f"{self._name}: no image has the file_name of {paths.listed(missing)} "
                f"({len(missing)} of {len(found)} files); give the JSON of these images, or leave it out"
            )
        return found

    def of_classes(self, categories: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """A model's categories with the ids that the file has for their names, and (id -> name) those it has none for.

        These get ids that nothing in the file has. Classes without names are those of the file, in the order of its
        ids, as in training. A file without categories changes nothing.

        Raises:
            ValueError: it has other categories only.
        """
        if not self._categories:
            return [dict(category) for category in categories], {}
        names = [category["name"] for category in categories]
        if list(categories) == numbered(len(self._categories)):
            names = sorted(self._categories, key=self._categories.get)
        missing = [name for name in names if name not in self._categories]
        if len(missing) == len(names):
            raise ValueError(
                f"{self._name} has the categories {paths.listed(self._categories)}, and the model knows "
                f"{paths.listed(names)}: give the JSON of these classes, or leave it out"
            )
        fresh = {name: number for number, name in enumerate(missing, max(self._categories.values()) + 1)}
        ids = self._categories | fresh
        return [{"id": ids[name], "name": name} for name in names], {ids[name]: name for name in missing}

    def _ids(self, entries: Any, many: str, kinds: Mapping[str, tuple], read: Callable) -> dict[Any, Any]:
        """The id of each of the images or categories, by its name as `read` takes it; the fields are of these kinds."""
        _, key = kinds
        if not isinstance(entries, list) or not all(_has(entry, kinds) for entry in entries):
            wanted = ", ".join(f"{name!r}: {' or '.join(_CALLED[k] for k in kinds[name])}" for name in kinds)
            raise ValueError(f"{self._name}: {many!r} must be a list of {{{wanted}}}; give a COCO instances JSON")
        ids = {read(entry[key]): entry["id"] for entry in entries}
        if len(set(ids.values())) < len(entries):
            raise ValueError(f"{self._name}: two {many} have one {key}, or one id; give each its own")
        return ids


def _ends(file: Path) -> list[PurePosixPath]:
    """The path, and what is left of it without its first folder, its first two, ..."""
    parts = paths.absolute(file).parts
    return [PurePosixPath(*parts[i:]) for i in range(len(parts))]


def _has(entry: Any, kinds: Mapping[str, tuple]) -> bool:
    return isinstance(entry, dict) and all(type(entry.get(key)) in kind for key, kind in kinds.items())
