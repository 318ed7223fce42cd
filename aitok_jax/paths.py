"""Files as people have them: where they are, how their names are shown, and how they are read and written as a whole.

Paths are local, or URLs of a bucket (gs://, s3://), which etils and fsspec read and write. A bucket has no folders,
only objects with long names: they appear as a whole, and can be neither renamed nor appended to.
"""

import contextlib
import errno
import functools
import glob
import io
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import fsspec
from etils import epath

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
_NAMED = 5  # files of a message
_SCHEMES = {  # of URLs: the library that fsspec reads them with, and what logs in
    "gs": ("gcsfs", "gcloud auth application-default login"),
    "s3": ("s3fs", "aws configure"),
}
# etils takes fsspec then: TensorFlow knows no s3://, and of gs:// only Google's own servers.
os.environ.setdefault("EPATH_USE_TF", "0")
for _scheme in _SCHEMES:  # others write there too, such as Orbax
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
_PATIENCE = 20.0  # seconds, for a bucket to answer; gcsfs alone would try for two minutes


def expand(name: str | Path) -> Path:
    """The path that a user means: with `~` as the home folder (shells leave it alone in `--image=~/photos`), or a URL.

    That of a URL is etils's, which has the methods of pathlib's.

    Raises:
        ValueError: a URL that cannot be used: of another scheme, without its library, login or bucket.
    """
    if not is_url(name):
        return Path(name).expanduser()
    scheme, _, rest = str(name).partition("://")
    _check_bucket(scheme, rest.partition("/")[0])
    return epath.Path(str(name))


def is_url(path: str | Path) -> bool:
    return "://" in str(path)  # never in a local path: pathlib makes it one slash


def _system(url: str | Path) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(str(url).partition(":")[0])


@functools.cache
def _check_bucket(scheme: str, bucket: str) -> None:
    url = f"{scheme}://{bucket}"
    if scheme not in _SCHEMES:
        known = " or ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(f"{url}: {scheme}:// is not known; give a local path, or one of {known}")
    library, log_in = _SCHEMES[scheme]
    try:
        _system(url).info(url, timeout=_PATIENCE)
    except ImportError as error:
        raise ValueError(
            f"{url}: {library}, which reads {scheme}://, is not installed: pip install {library}"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(
            f"{url}: no such bucket, or an empty one that you may not list; make it, or correct the name"
        ) from error
    except fsspec.exceptions.FSTimeoutError as error:
        raise ValueError(f"{url} gives no answer; check the network, or give a local path") from error
    except Exception as error:  # of the library, the login or the network: each has kinds of its own
        raise ValueError(
            f"{url} cannot be used ({_brief(error)}); log in with `{log_in}`, or give a local path"
        ) from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.200}".splitlines()[0]


def inside(root: Path, name: str) -> Path:
    """A path that may be relative to `root`."""
    return expand(name) if is_url(name) or name.startswith("~") else root / name


def absolute(path: Path) -> Path:
    return path if is_url(path) else path.absolute()


def files(folder: Path) -> list[Path]:
    """All files of a folder and of those below, sorted."""
    if not is_url(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return _in_bucket(folder)


def _in_bucket(folder: Path, levels: int | None = None) -> list[Path]:
    return _urls(folder, _system(folder).find(str(folder), maxdepth=levels))


def matches(pattern: Path) -> list[Path]:
    """All files that a pattern matches; brackets in the name of a local folder that exists are no pattern."""
    if is_url(pattern):
        found = _system(pattern).glob(str(pattern), detail=True)
        return _urls(pattern, [name for name, about in found.items() if about["type"] == "file"])
    there = next(path for path in pattern.parents if path.exists())
    found = glob.glob(os.path.join(glob.escape(str(there)), pattern.relative_to(there)), recursive=True)
    return [path for path in map(Path, sorted(found)) if path.is_file()]


def _urls(like: Path, names: Iterable[str]) -> list[Path]:
    scheme = str(like).partition(":")[0]
    return sorted(epath.Path(f"{scheme}://{name}") for name in names if not name.endswith("/"))


def find(folder: Path, suffixes: Collection[str], below: bool = True) -> tuple[list[Path], list[Path]]:
    """The files of a folder, and of all folders `below`: those of the suffixes in any case, and all others; sorted.

    Symbolic links are followed, to each folder once. Hidden files (`.x`, macOS's `._x.jpg`) are among the others.
    """
    if is_url(folder):
        return _find_in_bucket(folder, suffixes, below)
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


def _find_in_bucket(folder: Path, suffixes: Collection[str], below: bool) -> tuple[list[Path], list[Path]]:
    found, others = [], []
    for path in _in_bucket(folder, None if below else 1):
        if any(name.startswith(".") for name in path.parent.relative_to(folder).parts):
            continue
        wanted = not path.name.startswith(".") and path.suffix.lower() in suffixes
        (found if wanted else others).append(path)
    return found, others


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
        text = read(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8; save the list as UTF-8 text") from error
    return [line for line in text.splitlines() if line.strip()]


def read(file: Path) -> bytes:
    """The bytes of a file. OSError with its name, whatever the library of a bucket raises."""
    if not is_url(file):
        return file.read_bytes()
    with _as_os_error(file, "it cannot be read"):
        return file.read_bytes()


def read_range(file: Path, start: int, stop: int) -> bytes:
    """Some of the bytes of a file; fewer where it ends before."""
    if is_url(file):
        with _as_os_error(file, "it cannot be read"):
            return _system(file).cat_file(str(file), start=start, end=stop)
    with file.open("rb") as content:
        content.seek(start)
        return content.read(stop - start)


def opened(file: Path) -> BinaryIO:
    """A file to read from; one of a bucket is fetched as a whole."""
    return io.BytesIO(read(file)) if is_url(file) else file.open("rb")


@contextlib.contextmanager
def _as_os_error(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    except Exception as error:  # of the library, the login or the network: each has kinds of its own
        raise OSError(errno.EIO, f"{_brief(error)}: {what}", str(file)) from error


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `target` when it is whole; a kill leaves the old one, or none.

    Folders are made. Raises OSError with the name of `target`.
    """
    target = expand(target)
    if is_url(target):
        with io.BytesIO() as file:
            yield file
            with _as_os_error(target, "it was not written"):
                target.write_bytes(file.getvalue())
        return
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


def append(target: Path, text: str) -> None:
    """Adds to a UTF-8 text, which is made where absent; one in a bucket is read and written anew."""
    if is_url(target):
        write_text(target, (read(target).decode() if target.exists() else "") + text)
        return
    with target.open("a", encoding="utf-8") as file:
        file.write(text)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all in it, if it is there."""
    if is_url(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, target: Path) -> None:
    """Gives a folder a name that nothing has."""
    if is_url(folder):
        _system(folder).copy(str(folder), str(target), recursive=True)
        remove_tree(folder)
    else:
        folder.rename(target)
