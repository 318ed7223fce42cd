"""Files as people have them: where they are, how their names are shown, and how they are written as a whole."""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
_NAMED = 5  # files of a message


def expand(name: str | Path) -> Path:
    """With `~` as the home folder; shells leave it alone in `--image=~/photos`."""
    return Path(name).expanduser()


def find(folder: Path, suffixes: Collection[str], below: bool = True) -> tuple[list[Path], list[Path]]:
    """The files of a folder, and of all folders `below`: those of the suffixes in any case, and all others; sorted.

    Symbolic links are followed, to each folder once. Hidden files (`.x`, macOS's `._x.jpg`) are among the others.
    """
    found, others, seen = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if below and not name.startswith("."))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            wanted = not name.startswith(".") and Path(name).suffix.lower() in suffixes
            (found if wanted else others).append(Path(parent, name))
    return sorted(found), sorted(others)


class Companions:
    """Of many files, those that belong to another by their name.

    Args:
        paths: all there are.
        suffixes: that a companion may have, in any case, in the order in which they are preferred.
    """

    def __init__(self, paths: Iterable[Path], suffixes: Sequence[str]):
        self._suffixes, self._paths = suffixes, {}
        for path in paths:
            self._paths.setdefault((path.parent, path.stem, path.suffix.lower()), path)

    def of(self, wanted: Path) -> Path | None:
        """The file of this name, or of its stem with one of the suffixes; None where there is none."""
        suffixes = [wanted.suffix.lower(), *self._suffixes]
        return next(filter(None, (self._paths.get((wanted.parent, wanted.stem, each)) for each in suffixes)), None)


def listed(names: Iterable[str | Path]) -> str:
    """The first few names, and how many more there are."""
    texts = [shown(name) for name in names]
    more = [f"and {len(texts) - _NAMED} more"] if len(texts) > _NAMED else []
    return ", ".join(texts[:_NAMED] + more)


def shown(name: str | Path) -> str:
    """A name as text of one line: bytes that are no UTF-8, and what steers a terminal, as \\x escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text, with or without byte-order mark, that are not blank. ValueError for other text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8; save the list as UTF-8 text") from error
    return [line for line in text.splitlines() if line.strip()]


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `target` when it is whole; a kill leaves the old one, or none.

    Folders are made. Raises OSError with the name of `target`.
    """
    target = expand(target)
    part = target.with_name(f".{target.name}.aitok_part")  # a name that no file of the user's has
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
        part.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}: it was not written", str(target)) from error
        raise


def write_text(target: str | Path, text: str) -> None:
    """Replaces a file as a whole by UTF-8 text."""
    with writing(target) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
