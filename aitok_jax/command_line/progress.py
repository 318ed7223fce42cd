"""Progress on stderr: a bar on a terminal; in a log or a notebook a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm with these options, drawn as often as suits what stderr is."""
    often = {} if sys.stderr.isatty() else {"mininterval": SECONDS, "maxinterval": SECONDS}
    return tqdm(iterable, **often, **options)
