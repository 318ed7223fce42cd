"""Pairs of an RGB image and a dense map."""

import abc
from typing import Any

import numpy as np

from aitok_jax.data.sources.files import (
    READ_ERRORS,
    DataError,
    File,
    Skipping,
    decode_image,
    digest,
    image_shape,
    size_text,
)
from aitok_jax.image import model_size, nearest, resize
from aitok_jax.tasks.modalities import Modality


class PairSource(Skipping, abc.ABC):
    """Random access to pairs of an RGB image and a map of a modality; subclasses give `names` and `_file`.

    Args:
      scale: the short side that a model sees images at: examples of any size are brought to it as in prediction
        (`image.model_size`), images antialiased, of maps the nearest pixels. 0 leaves them as they are.
    """

    names: list[str]

    def __init__(self, modality: Modality, on_error: str, *, cache: bool, images: bool, scale: int = 0):
        super().__init__(on_error)
        self.modality, self.images, self.scale = modality, images, scale
        self._cache = {} if cache else None
        self._groups: dict[tuple[int, int], list[int]] | None = None
        self._sizes: dict[int, tuple[int, int]] = {}  # by `groups`

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One example: `image` uint8[H,W,3] RGB, and under the modality's name the map.

        Raises FileNotFoundError or DataError (whatever `on_error` says) where the example is broken.
        """
        if self._cache is not None and index in self._cache:
            return dict(self._cache[index])
        example = self._scaled(self._decoded(index), self.names[index])
        if self._cache is not None:
            for array in example.values():
                array.setflags(write=False)
            self._cache[index] = example
        return dict(example)

    def groups(self) -> list[list[int]]:
        """The examples by the size that they are read at; all in one group where they are read as they are.

        Heads of files are read once. Broken ones are an error, or are left out, as `on_error` says.
        """
        if not self.scale:
            return [list(range(len(self)))]
        if self._groups is None:
            self._groups = self._grouped()
        return list(self._groups.values())

    def _grouped(self) -> dict[tuple[int, int], list[int]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, name in enumerate(self.names):
            try:
                file = self._file(index, "image")
                self._sizes[index] = _model_size(file.name, *image_shape(file), self.scale)
            except READ_ERRORS as error:
                if self.on_error == "raise":
                    raise
                self._skip(name, error)
            else:
                groups.setdefault(self._sizes[index], []).append(index)
        return groups

    def read_readable(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """As of `Skipping`; what is read in the place of an example of `groups` has the size of its group."""
        used, example = super().read_readable(index)
        size = self._sizes.get(index)
        return used, example if used == index or size is None else _resized(example, *size)

    def _scaled(self, example: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        if not self.scale:
            return example
        height, width = example[self.modality.name].shape[:2]
        return _resized(example, *_model_size(name, height, width, self.scale))

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a run to go on with this data."""
        return {"examples": len(self), "names": digest("\n".join(self.names).encode())}

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        image = self._file(index, "image") if self.images else None
        return decode_pair(self.modality, self._file(index, self.modality.name), image)

    @abc.abstractmethod
    def _file(self, index: int, kind: str) -> File:
        """The encoded 'image' of an example, or its map, by the modality's name."""


def _model_size(name: str, height: int, width: int, scale: int) -> tuple[int, int]:
    try:
        return model_size(height, width, scale)
    except ValueError as error:
        raise DataError(f"{name}: {error}, or take it off the list, or set on_error='skip'") from error


def _resized(example: dict[str, np.ndarray], height: int, width: int) -> dict[str, np.ndarray]:
    return {k: (resize if k == "image" else nearest)(values, height, width) for k, values in example.items()}


def decode_map(modality: Modality, file: File) -> np.ndarray:
    """A map, f32[H,W,...]; DataError where the file is broken or holds something else."""
    try:
        return modality.read(file.content)
    except ValueError as error:
        raise DataError(f"{file.name}: {error}, or take it off the list, or set on_error='skip'") from error


def decode_pair(modality: Modality, map_file: File, image_file: File | None) -> dict[str, np.ndarray]:
    """The map under the modality's name and, where given, `image` uint8[H,W,3], of one size; DataError otherwise."""
    example = {modality.name: decode_map(modality, map_file)}
    if image_file is not None:
        example["image"] = decode_image(image_file)
        if example["image"].shape[:2] != example[modality.name].shape[:2]:
            raise DataError(
                f"{image_file.name} is {size_text(example['image'])} but {map_file.name} is "
                f"{size_text(example[modality.name])}; image and {modality.name} must have one size: restore the pair "
                "or take it off the list"
            )
    return example
