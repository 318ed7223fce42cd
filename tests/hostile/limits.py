"""Runs a snippet or a function in a process of its own, with limits on its time and on the memory that it has touched.

outcome = limits.run("print(1 + 1)")
outcome = limits.call(read_weights, path, seconds=10, memory=2**30)
assert outcome.kind == "ok", outcome
"""

import dataclasses
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = "import importlib, pickle, sys; sys.path[:0] = {path!r}\n"
CALL = "getattr(importlib.import_module({module!r}), {name!r})(*pickle.loads({given!r}))\n"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
      kind: 'ok'; 'traceback', of an exception that nobody caught; 'crash', by a signal or another exit code than 1;
        'hang' and 'memory', where it was killed at a limit.
      seconds: it ran so long.
      peak: bytes of memory that it had touched at once.
      output: what it wrote to stdout.
      error: what it wrote to stderr, the end of it.
    """

    kind: str
    seconds: float
    peak: int
    output: str
    error: str


def run(code: str, *arguments: object, seconds: float = 60, memory: int = 2**31) -> Outcome:
    """Runs Python code, whose sys.argv[1:] are the arguments; the repository and its tests can be imported."""
    path = [str(ROOT), str(ROOT / "tests")]
    command = [sys.executable, "-c", START.format(path=path) + code, *map(str, arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        process = subprocess.Popen(command, stdout=output, stderr=error, cwd=ROOT)
        kind, taken, peak = _watch(process, seconds, memory)
        for file in (output, error):
            file.seek(0)
        said = output.read().decode(errors="replace"), error.read().decode(errors="replace")[-5000:]
    return Outcome(kind, taken, peak, *said)


def call(function: Callable, *arguments: object, seconds: float = 60, memory: int = 2**31) -> Outcome:
    """Calls a function of a module with arguments that can be pickled; its result is dropped."""
    code = CALL.format(module=function.__module__, name=function.__name__, given=pickle.dumps(arguments))
    return run(code, seconds=seconds, memory=memory)


def _watch(process: subprocess.Popen, seconds: float, memory: int) -> tuple[str, float, int]:
    start, peak, kind = time.monotonic(), 0, None
    while process.poll() is None:
        peak = max(peak, touched(process.pid))
        if peak > memory:
            kind = "memory"
        elif time.monotonic() - start > seconds:
            kind = "hang"
        if kind:
            process.kill()
            process.wait()
            break
        time.sleep(0.01)
    kinds = {0: "ok", 1: "traceback"}
    return kind or kinds.get(process.returncode, "crash"), time.monotonic() - start, peak


def touched(pid: int | str = "self") -> int:
    """The most memory that a process has had at once since its start, or since `forget` (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * kilobytes[0] if kilobytes else 0


def forget() -> None:
    """Lets `touched` of this process begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
