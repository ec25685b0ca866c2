"""Text files and names as the formats of datasets have them."""

import math
import os
import re
from pathlib import Path

from detr.errors import DataError
from detr.problems import cut

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with a byte order mark or without.

    Raises:
        DataError: it is something else, or cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise DataError(f"{path}: not read: expected a file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: expected text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise DataError(f"{path}: not read: {error.strerror}") from None


def lines(text: str) -> list[str]:
    """Its lines, as editors count them: `str.splitlines` has more kinds of ends."""
    return re.split("\r\n|\n|\r", text)


def class_names(path: Path) -> list[str]:
    """The names in a classes.txt, one a line.

    Raises:
        DataError: there is none, one is there twice, or a line between them is empty.
    """
    names = [line.strip() for line in lines(read_text(path).rstrip())]
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{path}: expected a name on each line, no two the same, got {cut(names)}")
    return names


def number_of(text: str) -> float:
    """A decimal number in ASCII; NaN for everything else, though Python reads 1_0 too."""
    return float(text) if _NUMBER.fullmatch(text) else math.nan


def is_visible_file(path: Path) -> bool:
    """Whether it is a file, and none that macOS leaves beside others (._a.jpg)."""
    return not path.name.startswith(".") and os.path.isfile(path)


def in_order(path: Path) -> tuple[str, str]:
    """The key by which images, and their files with boxes, are sorted: the same for both."""
    return str(path.with_suffix("")), path.suffix
