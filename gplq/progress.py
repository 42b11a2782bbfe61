"""Progress with an ETA: a live bar on a terminal, a line every ten seconds in a log."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, what: str, unit: str, initial: int = 0) -> "tqdm[Any]":
    """A progress bar on standard error, without an ETA if ``total`` is None; use it as a context manager."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        mininterval=0.2 if live else 10,
        maxinterval=10,
        dynamic_ncols=live,
        leave=not live,
        disable=os.environ.get("RANK", "0") != "0",  # of several processes only the first shows one
        delay=1.0,  # what takes less than a second needs no bar
    )
