"""Checksums of a checkpoint's files: a bit that flips after they were written is noticed when they are read.

The numbers that Orbax writes carry none of their own. CRC-32C notices every single flip, and takes a hundredth of the
time that writing takes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import google_crc32c

FILE = "checksums.json"
_CHUNK = 2**20  # bytes


def write(folder: Path) -> None:
    """Writes FOLDER/checksums.json, {path: checksum} of all files in the items of a checkpoint."""
    items = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {file.relative_to(folder).as_posix(): _checksum(file) for item in items for file in _files(item)}
    (folder / FILE).write_text(json.dumps(found, indent=1) + "\n")


def problem(folder: Path, items: Iterable[str]) -> str:
    """What is wrong with the files of these items; '' = nothing, or an older checkpoint, without checksums."""
    try:
        written = json.loads((folder / FILE).read_text())
        parts = tuple(f"{item}/" for item in items)
        for name, checksum in written.items():
            if name.startswith(parts) and _checksum(folder / name) != checksum:
                return f"{folder / name} is not as it was written"
    except FileNotFoundError as error:
        return "" if Path(error.filename) == folder / FILE else f"{error.filename} is missing"
    except (AttributeError, ValueError) as error:
        return f"{folder / FILE} is damaged ({error})"
    return ""


def _files(item: Path) -> list[Path]:
    return sorted(path for path in item.rglob("*") if path.is_file() and path.name != "commit_success.txt")


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            checksum = google_crc32c.extend(checksum, chunk)
    return checksum
