"""From a folder to its splits: read in whatever format it is, checked, and divided where it has no split `val`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.check_data import check_against, check_classes, check_images, check_objects, check_pair
from detr.config import Config
from detr.errors import DataError
from detr.flags import VAL_FRACTION
from detr.formats import Dataset, Given, open_dataset
from detr.images import DEFAULT_READING, Reading
from detr.problems import Problem, any_fatal, raise_or_warn
from detr.split import Split


@dataclass
class Part:
    """A split, or None if nothing can be made of it, and its faults."""

    split: Split | None
    problems: list[Problem]

    @property
    def fatal(self) -> bool:
        return any_fatal(self.problems)


def dataset_of(flags: dict[str, Any]) -> Dataset:
    """The dataset that the flags of a command name: "data", "format", "classes", "train_json" and so on, all but the
    first of which may be absent.

    Raises:
        DataError: as `open_dataset`.
    """
    named = {key: Path(value) for key, value in flags.items() if isinstance(value, str | Path)}
    kinds = {
        kind: {key.removesuffix(f"_{kind}"): path for key, path in named.items() if key.endswith(f"_{kind}")}
        for kind in ("json", "images")
    }
    given = Given(tuple(flags.get("classes") or ()), **kinds)
    return open_dataset(Path(flags["data"]), flags.get("format"), given, flags.get("format_before"))


def load_split(
    source: Dataset | Path,
    name: str = "train",
    categories: dict[int, str] | None = None,
    config: Config | None = None,
    reading: Reading = DEFAULT_READING,
) -> Split:
    """Read and check one split and the headers of its images. Warns once about each kind of problem, with its count.

    Args:
        source: a dataset, or its folder.
        categories: the classes that the labels shall mean, id -> name (those of the training set or of a checkpoint);
            None takes those of the dataset, in its order.
        config: of the model that is to be trained; warns of what does not go well with it.

    Raises:
        DataError: a fatal problem (`detr.check_data`); the message names file, entry and field, and how many more
            there are.
    """
    dataset = source if isinstance(source, Dataset) else open_dataset(source)
    part = read_part(dataset, name, categories, reading)
    if config and part.split and not part.fatal:
        part.problems += check_against(part.split, config)
    raise_or_warn(part.problems)
    return part.split


def read_part(
    dataset: Dataset,
    name: str,
    categories: dict[int, str] | None = None,
    reading: Reading = DEFAULT_READING,
    decode: bool = False,
) -> Part:
    """One split with all its faults; the image files are looked at if there is no fatal one before.

    Args:
        categories, reading: as of `load_split`. decode: read the pixels too.

    Raises:
        DataError: the split is not there, or a file of it does not parse.
    """
    split, problems = dataset.read(name, reading)
    part = Part(split, problems)
    for check in (
        check_objects,
        lambda split: check_classes(split, categories) if categories else (),
        lambda split: check_images(split, decode),
    ):
        if split and not part.fatal:
            problems += check(split)
    if split and categories and not part.fatal:
        part.split = split.in_classes(categories)
    return part


def read_parts(
    dataset: Dataset,
    categories: dict[int, str] | None = None,
    config: Config | None = None,
    reading: Reading = DEFAULT_READING,
    decode: bool = False,
    hold_out: tuple[float, int] | None = None,
    again: bool = False,
) -> tuple[dict[str, Part], str]:
    """The splits "train" and "val", and a line that says so if `val` had to be held out of `train`.

    Args:
        hold_out: (fraction, seed) for a dataset without a split `val`; None takes (0.2, 0).
        again: hold out even if there is a split `val` by now, as the run did that is resumed.

    Raises:
        DataError: as `read_part`; or `hold_out` is given and there is a split `val`.
    """
    parts, said = {"train": read_part(dataset, "train", categories, reading, decode)}, ""
    train = parts["train"].split
    if "val" in dataset.splits and not (again and hold_out):
        if hold_out:
            raise _not_needed(dataset)
        known = categories or (train.categories if train and not parts["train"].fatal else None)
        parts["val"] = read_part(dataset, "val", known, reading, decode)
    elif train and not parts["train"].fatal:
        fraction, seed = hold_out or (VAL_FRACTION, 0)
        parts["train"].split, held = divide(train, fraction, seed)
        parts["val"] = Part(held, [*check_objects(held)])
        parts["train"].problems += check_objects(parts["train"].split)
        said = (
            f"{dataset.root} has no split val: {len(held.images)} of its {len(train.images)} images are held out for "
            f"it (--val-fraction {fraction:g} --split-seed {seed})"
        )
    for part in parts.values():
        if config and part.split and not part.fatal:
            part.problems += check_against(part.split, config)
    if len(parts) == 2 and not any(part.fatal for part in parts.values()):
        parts["val"].problems += check_pair(parts["train"].split, parts["val"].split)
    return parts, said


def load_to_evaluate(
    dataset: Dataset,
    name: str,
    categories: dict[int, str],
    reading: Reading = DEFAULT_READING,
    hold_out: tuple[float, int] | None = None,
) -> tuple[Split, str]:
    """A split, and a line that says so if it had to be held out: arguments as of `read_parts`."""
    if "val" in dataset.splits and hold_out:
        raise _not_needed(dataset)
    if "val" in dataset.splits or name not in ("train", "val") or (name == "train" and not hold_out):
        return load_split(dataset, name, categories, None, reading), ""
    parts, said = read_parts(dataset, categories, None, reading, hold_out=hold_out)
    for part in parts.values():
        raise_or_warn(part.problems)
    return parts[name].split, said


def _not_needed(dataset: Dataset) -> DataError:
    return DataError(f"--val-fraction and --split-seed: {dataset.root} has a split val, which is taken")


def divide(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """A split as two, for training and validation: which image is in which depends on its name and the seed only.

    Args:
        fraction: of the images, for the validation; each of the two has at least one.

    Raises:
        DataError: there is one image only.
    """
    names, count = [Path(path).name for path in split.images.paths], len(split.images)
    if count < 2:
        raise DataError(f"{split.source}: expected a split val, or 2 images to hold one of them out, got {count} image")

    def rank(i: int) -> tuple[bytes, str]:  # names may be equal in several folders
        return hashlib.sha256(f"{seed}/{names[i]}".encode(errors="surrogateescape")).digest(), split.names[i]

    held = set(sorted(range(count), key=rank)[: min(max(1, round(fraction * count)), count - 1)])
    parts: Sequence[list[int]] = [i for i in range(count) if i not in held], sorted(held)
    return split.only(parts[0]), split.only(parts[1])
