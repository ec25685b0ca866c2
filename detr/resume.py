"""What a run makes sure of before it goes on: where its data is, and whether it is the data that it began with."""

import os
import warnings
from pathlib import Path
from typing import Any

from detr.config import DATA_FORMATS, short
from detr.errors import CheckpointError, DataError
from detr.split import difference

# flags of `detr train` that say where the data is: the folder, and names within it
PLACES = ("data", "train_json", "train_images", "val_json", "val_images")


_FIELDS = {
    **dict.fromkeys(PLACES, lambda value: isinstance(value, str)),
    "format": lambda value: isinstance(value, str) and value in DATA_FORMATS,
    "classes": lambda value: isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value),
    "val_fraction": lambda value: isinstance(value, float) and 0 < value < 1,
    "split_seed": lambda value: type(value) is int and value >= 0,
    "exif": lambda value: value in ("turn", "ignore"),
    "large_images": lambda value: isinstance(value, bool),
    "wandb": lambda value: _of_texts(value) and {"project", "id"} <= value.keys(),
    "content": lambda value: isinstance(value, dict) and all(map(_of_texts, value.values())),
}


def _of_texts(value: Any) -> bool:
    """Whether a value is a dict from texts to texts or numbers."""
    return isinstance(value, dict) and all(type(k) is str and type(v) in (str, int) for k, v in value.items())


def known(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps about its data, without what is not as `detr train` writes it."""
    data = state.get("data")
    data = data if isinstance(data, dict) else {}
    return {name: value for name, value in data.items() if name in _FIELDS and _FIELDS[name](value)}


def located(data: Any, given: dict[str, str], path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` keeps about its data, with the folder where it is today.

    Args:
        data: the field "data" of the checkpoint. given: places that the user names now.

    Raises:
        CheckpointError: the field is wrong. DataError: the folder is not where it was; names it.
    """
    if not isinstance(data, dict) or not isinstance(data.get("data"), str):
        raise CheckpointError(f"{path}: data: expected a dict with the folder of the dataset")
    for name, value in data.items():
        if name not in _FIELDS:
            raise CheckpointError(f"{path}: data: unknown field {short(name)}")
        if not _FIELDS[name](value):
            raise CheckpointError(f"{path}: data.{name}: not what `detr train` writes, got {short(value)}")
    data = data | given
    root = Path(data["data"])
    # runs of the first version kept the folder as it was typed
    places = [Path.cwd() / root, *(parent / root for parent in path.resolve().parents)]
    found = next((place for place in places if place.exists()), None)
    if found is None and "data" in given:
        raise DataError(f"{root}: expected the folder of the dataset of this run, found nothing there")
    if found is None:
        raise DataError(f"{root}: the dataset of this run is no longer there: say where it is now with --data")
    return data | {"data": os.path.abspath(found)}


def check_same_data(state: dict[str, Any], content: dict[str, Any], path: Path, accept: bool) -> None:
    """Make sure that the data is what the run began with, its classes apart, which `load_split` compares.

    Args:
        content: `Split.content` of "train" and "val". accept: go on with other data, and warn.

    Raises:
        DataError: it is not; names what changed.
    """
    before = state["data"].get("content")
    if before is None:
        warnings.warn(f"{path}: has no record of its data, as older runs: it may have changed since", stacklevel=2)
        count = {"images": state["train_images"]} if "train_images" in state else {}
        before = {"train": content["train"] | count, "val": content["val"]}
    for name in content:
        if not isinstance(before.get(name), dict) or before[name].keys() != content[name].keys():
            raise CheckpointError(f"{path}: data.content.{name}: expected a record of its data")
    changes = {name: difference(before[name], content[name]) for name in content}
    text = "; ".join(f"{name}: {change}" for name, change in changes.items() if change)
    if text and not accept:
        raise DataError(
            f"{path}: the data is not what this run was trained on: {text}; --accept-changed-data goes on all the same"
        )
    if text:
        warnings.warn(f"{path}: the data is not what this run was trained on: {text}", stacklevel=2)
