"""Tries many hostile files in few processes, and counts what became of them.

A module of files has `make(index) -> (kind, content)`, the same for the same index, and `read(path) -> bool`, whether
the file was read; it is refused otherwise, and any exception is wrong. What is imported only in `read` counts as
executed, so the module imports it. See mutate_weights.py.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from hostile import limits

WRONG = ("crash", "hang", "traceback", "memory", "executed")
STARTING = 60.0  # seconds for a process to begin
WORKER = "from hostile import tries; tries.work(*sys.argv[1:3], *map(int, sys.argv[3:]))"
EVENTS = ("os.", "subprocess.", "exec", "socket.", "ctypes.", "shutil.", "import", "pickle.find_class", "code.__new__")


@dataclasses.dataclass(frozen=True)
class Try:
    """One file: its kind, 'read', 'refused' or one of WRONG, milliseconds, bytes of memory and what was said of it."""

    index: int
    kind: str
    verdict: str
    ms: float = 0.0
    peak: int = 0
    said: str = ""


class _Slow(BaseException):
    """Raised by the alarm; no reader catches it with the exceptions."""


def run(module: str, count: int, first: int = 0, seconds: int = 10, memory: int = 2**31) -> list[Try]:
    """Tries the files first..first+count-1 of a module, each with a limit on its time and its bytes of memory."""
    done, stop = [], first + count
    while len(done) < count:
        done += _one_process(module, first + len(done), stop, seconds, memory)
    return done


def table(tries: Iterable[Try]) -> str:
    """A line for each kind and one for all: how many were read, refused and wrong, the slowest and the largest."""
    tries, groups = list(tries), collections.defaultdict(list)
    for one in tries:
        groups[one.kind].append(one)
    rows = [("kind", "files", "read", "refused", *WRONG, "slowest ms", "peak MB")]
    for kind, group in (*sorted(groups.items()), ("all", tries)):
        counts = collections.Counter(one.verdict for one in group)
        limits_met = f"{max(one.ms for one in group):.0f}", f"{max(one.peak for one in group) / 2**20:.0f}"
        rows.append((kind, len(group), *(counts[v] for v in ("read", "refused", *WRONG)), *limits_met))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(" ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(module: str, count: int) -> int:
    """The command line of a module of files: tries many, or shows one. The exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="Tries hostile files.")
    parser.add_argument("--count", type=int, default=count, help="how many files (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="index of the first")
    parser.add_argument("--show", type=int, default=None, help="write the file of this index to stdout")
    options = parser.parse_args()
    if options.show is not None:
        sys.stdout.buffer.write(importlib.import_module(module).make(options.show)[1])
        return 0
    tried = run(module, options.count, options.first)
    print(table(tried))
    wrong = [one for one in tried if one.verdict in WRONG]
    for one in wrong[:20]:
        print(one)
    return 1 if wrong else 0


def _one_process(module: str, first: int, stop: int, seconds: int, memory: int) -> list[Try]:
    """Tries files until one of them ends the process, which that one is to blame for."""
    done = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as error:
        code = limits.START.format(path=[str(limits.ROOT), str(limits.ROOT / "tests")]) + WORKER
        command = [sys.executable, "-c", code, module, folder, *map(str, (first, stop, seconds, memory))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, bufsize=0)
        patience = STARTING
        while answers := select.select([process.stdout], [], [], patience)[0]:
            if not (line := process.stdout.readline()):
                break
            done.append(Try(**json.loads(line)))
            patience = 2 * seconds
        process.kill()
        process.wait()
        if len(done) < stop - first:
            error.seek(0)
            said, index = error.read().decode(errors="replace")[-2000:], first + len(done)
            kind = importlib.import_module(module).make(index)[0]
            done.append(Try(index, kind, "crash" if answers else "hang", said=said))
    return done


def work(module: str, folder: str, first: int, stop: int, seconds: int, memory: int) -> None:
    """Tries the files one after the other, and prints a line of JSON for each."""
    files, path, events, watched = importlib.import_module(module), Path(folder) / "file", [], []

    def hear(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[1], str) and not {*given[1]}.isdisjoint("wax+")
        if watched and (writes or event.startswith(EVENTS)):
            events.append(f"{event} {given!s:.80}")

    def ring(*_: object) -> None:
        raise _Slow

    sys.addaudithook(hear)
    signal.signal(signal.SIGALRM, ring)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * memory,) * 2)
    for index in range(first, stop):
        kind, content = files.make(index)
        path.write_bytes(content)
        events.clear()
        limits.forget()
        before, start = limits.touched(), time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        watched.append(True)
        try:
            verdict, said = ("read" if files.read(path) else "refused"), ""
        except _Slow:
            verdict, said = "hang", ""
        except Exception as error:
            verdict, said = "memory" if isinstance(error, MemoryError) else "traceback", repr(error)[:500]
        finally:
            watched.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)
        ms, peak = 1000 * (time.perf_counter() - start), limits.touched() - before
        if peak > memory:
            verdict = "memory"
        if events:
            verdict, said = "executed", "; ".join(events[:5])
        print(json.dumps(dataclasses.asdict(Try(index, kind, verdict, ms, peak, said))), flush=True)
