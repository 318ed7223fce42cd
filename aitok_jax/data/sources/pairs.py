"""Pairs of an RGB image and a dense map."""

import abc
from typing import Any

import numpy as np

from aitok_jax.data.sources.files import DataError, File, Skipping, decode_image, digest, size_text
from aitok_jax.tasks.modalities import Modality


class PairSource(Skipping, abc.ABC):
    """Random access to pairs of an RGB image and a map of a modality; subclasses give `names` and `_file`."""

    names: list[str]

    def __init__(self, modality: Modality, on_error: str, *, cache: bool, images: bool):
        super().__init__(on_error)
        self.modality, self.images = modality, images
        self._cache = {} if cache else None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Decodes one example: `image` uint8[H,W,3] RGB, and under the modality's name the map.

        Raises FileNotFoundError or DataError (whatever `on_error` says) where the example is broken.
        """
        if self._cache is not None and index in self._cache:
            return dict(self._cache[index])
        example = self._decoded(index)
        if self._cache is not None:
            for array in example.values():
                array.setflags(write=False)
            self._cache[index] = example
        return dict(example)

    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a run to go on with this data."""
        return {"examples": len(self), "names": digest("\n".join(self.names).encode())}

    def _decoded(self, index: int) -> dict[str, np.ndarray]:
        image = self._file(index, "image") if self.images else None
        return decode_pair(self.modality, self._file(index, self.modality.name), image)

    @abc.abstractmethod
    def _file(self, index: int, kind: str) -> File:
        """The encoded 'image' of an example, or its map, by the modality's name."""


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
