"""What the finder of a format is given, and what it gives: see `detr.formats.FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from detr.images import Reading
from detr.problems import Problem
from detr.split import Split

# what folders and files of a split are called
NAMES = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}

Reader = Callable[[Reading], tuple[Split | None, list[Problem]]]


@dataclass(frozen=True)
class Given:
    """What a user says of a dataset beside its folder."""

    classes: tuple[str, ...] = ()  # names in the order of labels, for a format that has no order
    json: dict[str, Path] = field(default_factory=dict)  # split -> json, for COCO; relative to the folder
    images: dict[str, Path] = field(default_factory=dict)  # split -> image folder, for COCO


@dataclass(frozen=True)
class Found:
    """What a finder found in a folder: without readers it is not of the format."""

    # split ("train", "val", "test") -> what reads it: the `Split`, or None if nothing can be made of it, and its faults
    readers: dict[str, Reader]
    looked_for: Callable[[str], str]  # the names by which a split of this format is found, for messages
