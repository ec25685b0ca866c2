"""Text for a terminal: names of classes and files, which may hold anything, do not move its cursor."""

import sys

# control characters, line separators, and what changes the direction of a line
_ESCAPED = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _ESCAPED}


def one_line(text: str) -> str:
    """A text of one line: its line breaks and other control characters are escapes."""
    return text.translate(_ESCAPES)


def say(*lines: str, error: bool = False) -> None:
    """Print lines, each with escapes for its control characters; to standard error if `error`."""
    print("\n".join(map(one_line, lines)), file=sys.stderr if error else sys.stdout, flush=True)
