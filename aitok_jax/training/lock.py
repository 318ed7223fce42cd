"""One process to a run's folder, and no folder that is somebody else's.

`run.lock` in the folder holds the process that has it and a heartbeat, in JSON. It stays, empty, when the process is
done. What a kill has left is taken over: at once on the machine where that process is no more, and elsewhere when the
heartbeat has stood still for STALE seconds. A bucket locks nothing: of two that take a folder there at the same moment,
the one that wrote last has it, and the other notices SETTLED seconds later.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from aitok_jax import paths

LOG = logging.getLogger(__name__)
FILE = "run.lock"
HEARTBEAT, STALE, SETTLED = 5.0, 60.0, 2.0  # seconds
# by a run, in its folder
WRITTEN = ("config.json", "data.json", "env.json", "parameters.txt", "metrics.json", "metrics.jsonl", "panels")


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Holds the folder of a run, which is made where absent; hosts other than the first rely on that one.

    Raises:
        ValueError: no folder is given, another process has it, or it holds files of a run's names that are no run's.
        OSError: it cannot be written to.
    """
    if not str(folder).strip():
        raise ValueError("--workdir is empty (is a variable unset?); give a folder for the run")
    folder = paths.expand(folder)
    if jax.process_index() != 0:
        yield
        return
    new = not folder.exists()
    check_ours(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / FILE, "")
    except OSError as error:
        raise OSError(f"cannot write to the run directory {folder} ({error}); give another --workdir") from error
    me = _me()
    _acquire(folder, me)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(folder, me, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        _release(folder, me, new)


def check_ours(folder: Path) -> None:
    """ValueError where the folder has files that a run would write over, and is no run's."""
    there = [name for name in WRITTEN if (folder / name).exists()]
    if there and not (folder / FILE).exists() and not _is_run(folder / "config.json"):
        raise ValueError(
            f"{folder} is no run's folder, but holds {paths.listed(there)}, which a run would write over; "
            "give another --workdir"
        )


def _is_run(config: Path) -> bool:
    """Whether this is the configuration of a run, of a version without locks too."""
    try:
        content = json.loads(paths.read(config))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and ("task" in content or "stages" in content)


def _me() -> dict[str, Any]:
    place = socket.gethostname()
    with contextlib.suppress(OSError):  # process numbers of two containers may be the same
        place += f" {os.readlink('/proc/self/ns/pid')}"
    return {"host": place, "process": os.getpid(), "started": _started(os.getpid()), "beat": 0}


def _started(process: int) -> str:
    """When a process started, so that a number that is used again is told apart; '' where nothing says it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[TextIO]:
    """The lock's file, to be read and changed; where it is local, by one process at a time."""
    if paths.is_url(folder):
        before = paths.read(folder / FILE).decode()
        with io.StringIO(before) as file:
            yield file
            if file.getvalue() != before and (folder / FILE).exists():
                paths.write_text(folder / FILE, file.getvalue())
        return
    with (folder / FILE).open("r+", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks: heartbeats remain
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _holder(file: TextIO) -> dict[str, Any] | None:
    try:
        return json.loads(file.read() or "null")
    except ValueError:  # a kill left half of it
        return None


def _put(file: TextIO, holder: dict[str, Any] | None) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder) if holder else "")


def _acquire(folder: Path, me: dict[str, Any]) -> None:
    first, since = None, time.monotonic()
    while True:
        with _opened(folder) as file:
            holder = _holder(file)
            first = first or holder
            stands_still = holder == first and time.monotonic() - since > STALE
            if holder is None or _is_gone(holder, me) or stands_still:
                _put(file, me)
                break
        if holder != first or holder["host"] == me["host"]:
            raise _in_use(folder, holder)
        if time.monotonic() - since < 1:
            LOG.warning("%s was left by a process on %s; taking it over in %d s", folder, holder["host"], STALE)
        time.sleep(1)
    if paths.is_url(folder):
        time.sleep(SETTLED)
        with _opened(folder) as file:
            if (holder := _holder(file)) and not _is_mine(holder, me):
                raise _in_use(folder, holder)


def _in_use(folder: Path, holder: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{folder} is in use by process {holder['process']} on {holder['host'].split()[0]}; "
        "wait until it is done, stop it, or give another --workdir"
    )


def _is_gone(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    if holder["host"] != me["host"]:
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(holder["process"]) != holder["started"]


def _beat(folder: Path, me: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        try:
            with _opened(folder) as file:
                if not _is_mine(_holder(file), me):
                    LOG.warning("%s was taken over by another process; two may write to it", folder)
                    return
                me["beat"] += 1
                _put(file, me)
        except OSError as error:
            LOG.warning("no heartbeat in %s: %s", folder, error)


def _is_mine(holder: dict[str, Any] | None, me: dict[str, Any]) -> bool:
    return holder is not None and holder | {"beat": 0} == me | {"beat": 0}


def _release(folder: Path, me: dict[str, Any], new: bool) -> None:
    """Empties the lock; of a new folder in which nothing was written nothing stays."""
    with contextlib.suppress(OSError), _opened(folder) as file:
        if _is_mine(_holder(file), me):
            _put(file, None)
            if new and [path.name for path in folder.iterdir()] == [FILE]:
                (folder / FILE).unlink()
                folder.rmdir()
