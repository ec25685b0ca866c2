"""What the arguments of the commands and of the Python functions may be, said once. Imports no PyTorch."""

import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from detr.config import BATCH, COUNT, DATA_FORMATS, PIXELS, SEED, short
from detr.errors import ArgumentError

# name -> (type, least, most)
NUMBERS = {
    "minutes": (float, 0.01, 1_000_000),
    "workers": (int, 0, 256),  # processes that load images
    "val_fraction": (float, 0.001, 0.999),
    "split_seed": (int, 0, SEED),
    "threshold": (float, 0, 1),
    "batch_size": (int, 1, BATCH),
    "max_dets": (int, 1, COUNT),
    "size": (int, 32, PIXELS),  # of a side of an exported model's images
}
CHOICES = {"format": DATA_FORMATS, "exif": ("turn", "ignore")}


def checked(name: str, value: Any) -> Any:
    """An argument of a name in NUMBERS or CHOICES, as a plain number or text; None, which is not given, stays None.

    Raises:
        ArgumentError: it is not what it may be.
    """
    if value is None:
        return None
    if name in CHOICES:
        if isinstance(value, str) and value in CHOICES[name]:
            return str(value)
        raise ArgumentError(f"{name}: expected one of {', '.join(CHOICES[name])}, got {short(value)}")
    kind, low, high = NUMBERS[name]
    if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool) and low <= value <= high:
        return kind(value)
    expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
    raise ArgumentError(f"{name}: expected {expected}, got {short(value)}")


def path_of(name: str, value: Any) -> Path:
    """The path that an argument names; ~ is expanded, as by a shell.

    Raises:
        ArgumentError: it is no path, or empty.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ArgumentError(f"{name}: expected the name of a file or folder, got {short(value)}")
    return Path(os.path.expanduser(text))


def run_folder_of(out: Any, resume: Any) -> Path:
    """The folder that a training writes to: a new one, or that of the run, or the checkpoint.pt in it, that goes on."""
    if resume is None:
        return path_of("out", "runs/train" if out is None else out)
    path = path_of("resume", resume)
    return path.parent if path.name == "checkpoint.pt" and not path.is_dir() else path


def names_of(name: str, value: Any) -> list[str] | None:
    """A list of texts that are all different, from an argument that may be a tuple, or None.

    Raises:
        ArgumentError: it is something else.
    """
    if value is None:
        return None
    texts = list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
        raise ArgumentError(f"{name}: expected a list of names, no two the same, got {short(value)}")
    return list(map(str, texts))
