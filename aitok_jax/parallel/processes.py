"""Several processes, one on each host or one on each GPU, as one run: starting jax.distributed."""

import os
import socket
import time

import jax

_TIMEOUT = 300  # seconds that processes wait for each other at the start


def start(
    multihost: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = _TIMEOUT,
) -> None:
    """Joins this process to the others, where asked to; must come before anything else of JAX.

    Args:
      multihost: take all that is not given from the surroundings (TPU pods, Slurm, Open MPI, Kubernetes), or from the
        environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      coordinator: HOST:PORT of process 0, the same on all; with it, the other two must be known as well.
      num_processes, process_id: how many there are, and which this one is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: incomplete or impossible numbers.
      RuntimeError: no surroundings to read them from, or the others did not come.
    """
    explicit = coordinator is not None or num_processes is not None or process_id is not None
    if not (multihost or explicit):
        return
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("num_processes", num_processes, "JAX_NUM_PROCESSES")
    process_id = _number("process_id", process_id, "JAX_PROCESS_ID")
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if explicit and missing:
        raise ValueError(f"{', '.join(missing)} must be given too, as in --coordinator=HOST:PORT --num_processes=2")
    if not missing:
        _check(coordinator, num_processes, process_id)
        if process_id > 0:
            _wait_for(coordinator, timeout)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout)
    except (ValueError, RuntimeError) as error:
        hint = "; give --coordinator=HOST:PORT, --num_processes and --process_id on every host" if missing else ""
        raise RuntimeError(f"the processes could not be joined: {error}{hint}") from error


def _number(name: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"{variable}={text} must be a whole number (or give --{name})")
    return int(text)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, for example 10.0.0.1:1234")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must be in 0..{num_processes - 1}, --num_processes={num_processes}"
        )


def _wait_for(coordinator: str, timeout: int) -> None:
    """Returns once process 0 listens; JAX by itself aborts with a stack trace where it does not."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"nothing answers at {coordinator} after {timeout} s ({error}); start process 0 on that host, with "
                    "the same --coordinator, and let its port through"
                ) from error
        time.sleep(0.5)
