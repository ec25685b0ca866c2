"""Faults of a dataset: where each is, what it is, and whether it stops a training."""

import reprlib
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from detr.errors import DataError

_LONGEST = 60  # characters of a value that a message shows
_BEGINNING = reprlib.Repr()
_BEGINNING.maxlevel = 2
_BEGINNING.maxstring = _BEGINNING.maxother = _LONGEST


@dataclass(frozen=True)
class Problem:
    """One fault: `kind` groups, `entry` and `field` say where; a fatal one stops a training before it starts."""

    file: str
    kind: str
    entry: str
    field: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.entry, self.field, self.message) if part)


def any_fatal(problems: list[Problem]) -> bool:
    return any(problem.fatal for problem in problems)


def by_kind(problems: list[Problem]) -> list[str]:
    """One line for each kind of problem: whether it is fatal, how many there are, and the first."""
    lines = []
    for (kind, fatal), count in Counter((problem.kind, problem.fatal) for problem in problems).items():
        first = next(problem for problem in problems if (problem.kind, problem.fatal) == (kind, fatal))
        lines.append(f"{'error' if fatal else 'warning'} {kind}: {count}, the first: {first}")
    return lines


def raise_or_warn(problems: list[Problem]) -> None:
    """Stop at the first fatal problem; else warn once for each kind, with its count and first case.

    Raises:
        DataError: there is a fatal one.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more; `detr check-data` lists them)" if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0]}{more}")
    for line in by_kind(problems):
        warnings.warn(line.removeprefix("warning "), stacklevel=3)


def cut(value: Any, longest: int = _LONGEST) -> str:
    """A text of a value, short enough for a message of one line."""
    # of a list within lists only the beginning: a yaml can name billions of entries in a few lines
    text = " ".join((value if isinstance(value, str) else _BEGINNING.repr(value)).split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
