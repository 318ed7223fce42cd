"""Whether a kernel says, on the device at hand, what its formula says: a kernel is compared on its first use."""

import concurrent.futures
import functools
import logging
from collections.abc import Callable

import jax

LOG = logging.getLogger(__name__)
TRUSTED = 1e-3  # relative difference from the formula, in float32, up to which kernels are taken


@functools.cache
def trusted(what: str, check: Callable[[], float], platform: str = "tpu", allowed: float = TRUSTED) -> bool:
    """Whether `check`, the largest relative difference from the formula, is at most `allowed`; asked once.

    Args:
        platform: 'tpu' or 'gpu', where the kernel runs; it is trusted elsewhere, in programs that are only compiled.
    """
    if jax.default_backend() != platform:
        return True
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:  # where no program is being traced
            worst = thread.submit(check).result()
        problem = "" if worst <= allowed else f"differ from the formula by {worst:.1e}, where {allowed:.0e} is allowed"
    except Exception as error:  # of the compiler, for a chip or a version that it was not tried on
        problem = f"cannot be compiled ({type(error).__name__}: {str(error)[:200]})"
    if problem:
        LOG.warning(
            "the kernels of %s %s, on this %s: the formula is used, which takes more memory and time; "
            "please report this, and the versions of jax and its plugin",
            *(what, problem, jax.devices()[0].device_kind),
        )
    return not problem


def difference(found: jax.Array, wanted: jax.Array) -> float:
    """The largest one, relative to the largest value."""
    return float(abs(found - wanted).max() / abs(wanted).max())
