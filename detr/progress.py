"""Progress bars that suit a terminal and a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from detr.terminal import one_line


class _Bar(tqdm):
    monitor_interval = 0  # no thread that outlives it; with `miniters` of 1 none is missed


def progress(iterable: Iterable | None = None, *, desc: str, **options: Any) -> tqdm:
    """`tqdm` on standard error: a moving bar on a terminal, a line every 20 seconds in a file."""
    refresh = 0.2 if sys.stderr.isatty() else 20
    return _Bar(iterable, desc=one_line(desc), mininterval=refresh, miniters=1, dynamic_ncols=True, **options)
