"""The formats in which boxes come. Each has one function that looks into a folder: nothing else knows the format.

A finder takes the folder and what the user says beside it, and gives `Found`: for each split that is there a function
that reads it. To add a format, write a finder and enter it in FORMATS; CONTRIBUTING.md has the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from detr.errors import ArgumentError, DataError
from detr.formats.coco import find_coco, find_roboflow
from detr.formats.found import Found, Given
from detr.formats.voc import find_voc
from detr.formats.yolo import find_yolo
from detr.images import Reading
from detr.problems import Problem
from detr.split import Split

# name for --format -> (title, finder)
FORMATS: dict[str, tuple[str, Callable[[Path, Given], Found]]] = {
    "coco": ("COCO", find_coco),
    "roboflow": ("COCO by Roboflow", find_roboflow),
    "yolo": ("YOLO", find_yolo),
    "voc": ("Pascal VOC", find_voc),
}


_SHOWN = 6  # names of files that a message lists


@dataclass(frozen=True)
class Dataset:
    """A dataset in one of FORMATS."""

    root: Path
    format: str
    found: Found

    @property
    def title(self) -> str:
        return FORMATS[self.format][0]

    @property
    def splits(self) -> list[str]:
        return list(self.found.readers)

    def read(self, split: str, reading: Reading) -> tuple[Split | None, list[Problem]]:
        """A split and its faults, its image files apart; None if nothing can be made of it.

        Raises:
            DataError: there is no such split, or a file of it cannot be read at all.
        """
        if split not in self.found.readers:
            looked_for = self.found.looked_for(split)
            there = f"this {self.title} dataset has {', '.join(self.splits)}"
            raise DataError(f"{self.root}: no split {split!r}: {there}; looked for {looked_for}")
        return self.found.readers[split](reading)


def open_dataset(
    root: Path, format: str | None = None, given: Given | None = None, before: str | None = None
) -> Dataset:
    """The dataset in a folder, or of a data.yaml.

    Args:
        format: a key of FORMATS; None finds it out.
        before: the format that it had before, which is taken where it could be of several.

    Raises:
        DataError: there is none, or it could be of several formats.
    """
    given = given or Given()
    if not root.is_dir() and not (root.is_file() and root.suffix.lower() in (".yaml", ".yml")):
        raise DataError(f"{root}: expected a folder with a dataset, or a data.yaml, found none")
    if format is None and (given.json or given.images):
        format = "coco"
    names = [format] if format else list(FORMATS)
    found: dict[str, Found | DataError] = {}
    for name in names:
        try:
            found[name] = FORMATS[name][1](root, given)
        except DataError as error:  # it is of this format, and broken
            found[name] = error
    there = [name for name in names if isinstance(found[name], DataError) or found[name].readers]
    if len(there) > 1 and before in there:
        there = [before]
    if len(there) > 1:
        titles = " and ".join(FORMATS[name][0] for name in there)
        raise DataError(f"{root}: files of {titles}: say which with --format {' or '.join(there)}")
    if not there:
        raise _no_dataset(root, {FORMATS[name][0]: found[name].looked_for("train") for name in names})
    [name] = there
    if isinstance(found[name], DataError):
        raise found[name]
    if given.classes and name != "voc":
        raise ArgumentError(f"classes: expected with Pascal VOC, which has no order of classes, got {FORMATS[name][0]}")
    if (given.json or given.images) and name != "coco":
        raise ArgumentError(f"names of json files and image folders: expected with --format coco, got {name}")
    return Dataset(root, name, found[name])


def _no_dataset(root: Path, looked_for: dict[str, str]) -> DataError:
    """What was looked for, by the titles of formats, and what there is instead."""
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    got = ", ".join(names[:_SHOWN] + ["..."] * (len(names) > _SHOWN)) or "nothing"
    wanted = "; ".join(f"{text} ({title})" for title, text in looked_for.items())
    return DataError(f"{root}: no dataset: looked for {wanted}; found {got}")
