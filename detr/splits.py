"""From a folder to its splits: read in whatever format it is, checked, and divided where it has no split `val`."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr.check_data import check_against, check_classes, check_images, check_objects, check_pair
from detr.config import VAL_FRACTION, Config
from detr.errors import ArgumentError, DataError
from detr.formats import Dataset, Given, open_dataset
from detr.images import DEFAULT_READING, Reading
from detr.problems import Problem, any_fatal, raise_or_warn
from detr.split import Split

_HINT = "; another --split-seed or --val-fraction holds other images out"


@dataclass
class Part:
    """A split, or None if nothing can be made of it, and its faults."""

    split: Split | None
    problems: list[Problem]

    @property
    def fatal(self) -> bool:
        return any_fatal(self.problems)


def dataset_of(flags: dict[str, Any], named: dict[str, tuple[Any, Any]] | None = None) -> Dataset:
    """The dataset that the flags of a command name: "data", and where they are given "format", "classes", "train_json",
    "train_images", "val_json" and "val_images".

    Args:
        named: split -> (json, image folder) or None for either, instead of the last four.

    Raises:
        DataError: as `open_dataset`.
    """
    named = named or {split: (flags.get(f"{split}_json"), flags.get(f"{split}_images")) for split in ("train", "val")}
    jsons = {split: Path(json) for split, (json, _) in named.items() if json}
    images = {split: Path(folder) for split, (_, folder) in named.items() if folder}
    given = Given(tuple(flags.get("classes") or ()), jsons, images)
    return open_dataset(Path(flags["data"]), flags.get("format"), given, flags.get("format_before"))


def hold_out_of(flags: dict[str, Any]) -> tuple[float, int] | None:
    """(fraction, seed) of images held out for validation, from "val_fraction" and "split_seed"; None if not given."""
    fraction, seed = flags.get("val_fraction"), flags.get("split_seed")
    return None if fraction is None and seed is None else (fraction or VAL_FRACTION, seed or 0)


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
    part = Part(*dataset.read(name, reading))
    if part.split and not part.fatal:
        part.problems += check_objects(part.split)
    if part.split and not part.fatal and categories:
        part.problems += check_classes(part.split, categories)
    if part.split and not part.fatal:
        part.problems += check_images(part.split, decode)
    if part.split and not part.fatal and categories:
        part.split = part.split.in_classes(categories)
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
        try:
            parts["val"] = read_part(dataset, "val", known, reading, decode)
        except DataError as error:  # what was found of train is still worth knowing
            parts["val"] = Part(None, [Problem("", "split", "", "", str(error))])
    elif train and not parts["train"].fatal:
        parts["train"].split, held, said = _hold_out(dataset, train, hold_out)
        parts["val"] = Part(held, [*check_objects(held, _HINT)])
        parts["train"].problems += check_objects(parts["train"].split, _HINT)
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
    before: tuple[float, int] | None = None,
) -> tuple[Split, str]:
    """A split, and a line that says so if it had to be held out: arguments as of `read_parts`.

    Args:
        before: what the training held out, which is taken where `hold_out` is not given.
    """
    if hold_out and "val" in dataset.splits:
        raise _not_needed(dataset)
    if hold_out and name not in ("train", "val"):
        raise ArgumentError(f"val_fraction and split_seed: expected with split train or val, got {name}")
    hold_out = hold_out or (None if "val" in dataset.splits else before)
    whole = name in dataset.splits and not (hold_out and name == "train")
    if whole or name not in ("train", "val") or "train" not in dataset.splits:
        return load_split(dataset, name, categories, None, reading), ""
    train, val, said = _hold_out(dataset, load_split(dataset, "train", categories, None, reading), hold_out)
    if name == "val" and (hold_out or (VAL_FRACTION, 0)) != before:
        text = "the run of this checkpoint did not hold out these images: it may have been trained on some of them"
        warnings.warn(text, stacklevel=2)
    split = train if name == "train" else val
    raise_or_warn([*check_objects(split, _HINT)])
    return split, said


def _hold_out(dataset: Dataset, split: Split, hold_out: tuple[float, int] | None) -> tuple[Split, Split, str]:
    """Of a dataset without a split `val`, the parts for training and validation, and a line that says so."""
    fraction, seed = hold_out or (VAL_FRACTION, 0)
    train, val = divide(split, fraction, seed)
    counts = f"{len(val.images)} of its {len(split.images)} images are held out for it"
    return train, val, f"{dataset.root} has no split val: {counts} (--val-fraction {fraction:g} --split-seed {seed})"


def _not_needed(dataset: Dataset) -> ArgumentError:
    return ArgumentError(f"val_fraction and split_seed: {dataset.root} has a split val, which is taken")


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
