"""SIGTERM and SIGINT: the step under way ends, is saved, and the process exits with a code that launchers restart on.

A run that was stopped exits with 128 + the signal's number (143 for SIGTERM, 130 for SIGINT), as a process does that a
signal has killed: launchers that tell stops from errors (which exit with 1) take such codes for worth a restart. A
thread waits for the signals, so that they are obeyed while the main thread is in a compiler or in an evaluation.
On several hosts SIGTERM belongs to the coordination service of JAX, by which all hosts agree on the step to stop at.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_lock = threading.Lock()
_received: list[int] = []  # numbers of the signals so far
_finish: list[Callable[[], None] | None] = []  # innermost last: what must end before the exit; None: until `Stopped`


class Stopped(SystemExit):
    """Raised where a run stops at a signal; `code` is the exit code."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = exit_code()


def exit_code() -> int:
    """128 + the number of the signal that came first; of SIGTERM where the coordination service had the notice."""
    return 128 + (_received[0] if _received else signal.SIGTERM)


def requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within, the two signals stop the process: at once, but where `deferred` says otherwise. For the main thread.

    A second signal always stops it at once.
    """
    several = jax.process_count() > 1
    handlers = {signal.SIGINT: _pass_on} if several else dict.fromkeys(SIGNALS, _wait)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(-1 if several else writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except Stopped as stopped:
        _say(str(stopped))
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        watcher.join()
        reader.close()
        _received.clear()


@contextlib.contextmanager
def deferred(finish: Callable[[], None] | None = None) -> Iterator[None]:
    """Within, a signal waits: until the block asks `requested` and ends, or else until `finish` has been called.

    Raises:
      Stopped: a signal came before or within, and the block has ended without an error. Where there is a `finish`, the
        process does not wait for the end of the block but for that of `finish`, which runs in another thread.
    """
    if finish is not None:
        _raise_if_requested()
    with _lock:
        _finish.append(finish)
    try:
        yield
    finally:
        with _lock:
            _finish.pop()
    _raise_if_requested()


def _raise_if_requested() -> None:
    if requested():
        raise Stopped("stopped by a signal; the same command goes on from the latest checkpoint")


def _forget() -> None:
    """In a forked process, whose signals are not the run's."""
    if signal.getsignal(signal.SIGINT) in (_wait, _pass_on):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _wait(*_) -> None:
    """The thread that waits for signals has this one."""


def _watch(reader: socket.socket) -> None:
    while numbers := reader.recv(1):
        if numbers[0] not in SIGNALS:
            continue
        with _lock:
            _received.append(numbers[0])
            finish = _finish[-1] if _finish else _nothing
        if len(_received) > 1:
            _exit(_nothing)
        if finish is None:
            _say("a signal to stop: this step ends and is saved; a second signal stops at once")
        else:
            threading.Thread(target=_exit, args=(finish,), daemon=True).start()


def _nothing() -> None:
    """There is nothing to finish."""


def _exit(finish: Callable[[], None]) -> None:
    try:
        finish()
        message, code = "the same command goes on from the latest checkpoint", exit_code()
    except BaseException as error:
        message, code = f"the last checkpoint could not be finished: {error}", 1
    _say(f"stopped by a signal; {message}")
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _pass_on(*_) -> None:
    """SIGINT on several hosts: this one becomes a SIGTERM, which the hosts agree on; the next one kills."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
