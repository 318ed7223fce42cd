"""The ids that images have in a COCO JSON."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from aitok_jax import paths


def of_files(annotations: str, files: Sequence[Path]) -> dict[Path, int | str]:
    """The id of each file: that of the image whose `file_name`, with its folders, is the end of the file's path.

    Raises:
        ValueError: no COCO JSON, or one that does not have all files.
        OSError: it cannot be read.
    """
    ids = _read(annotations)
    found = {file: next((ids[end] for end in _ends(file) if end in ids), None) for file in files}
    if missing := [file for file, image_id in found.items() if image_id is None]:
        raise ValueError(
            f"--annotations={annotations}: no image has the file_name of {paths.listed(missing)} "
            f"({len(missing)} of {len(found)} files); give the JSON of these images, or leave it out"
        )
    return found


def _ends(file: Path) -> list[PurePosixPath]:
    """The path, and what is left of it without its first folder, its first two, ..."""
    parts = paths.absolute(file).parts
    return [PurePosixPath(*parts[i:]) for i in range(len(parts))]


def _read(annotations: str) -> dict[PurePosixPath, int | str]:
    text = paths.read(paths.expand(annotations))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--annotations={annotations} is no JSON ({error}); give a COCO instances JSON") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(map(_is_image, images)):
        raise ValueError(
            f"--annotations={annotations}: 'images' must be a list of {{'id': ..., 'file_name': ...}}; "
            "give a COCO instances JSON"
        )
    ids = {PurePosixPath(image["file_name"]): image["id"] for image in images}
    if min(len(ids), len(set(ids.values()))) < len(images):
        raise ValueError(f"--annotations={annotations}: two images have one file_name, or one id; give each its own")
    return ids


def _is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) in (int, str) and isinstance(entry.get("file_name"), str)
