"""What a run makes sure of before it goes on: where its data is, and whether it is the data that it began with."""

import os
import warnings
from pathlib import Path
from typing import Any

from detr.checkpoint import CheckpointError
from detr.images import DataError
from detr.split import Split, difference

# flags of `detr train` that say where the data is: the folder, and names within it
PLACES = ("data", "train_json", "train_images", "val_json", "val_images")


def located(data: Any, given: dict[str, str], path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` keeps about its data, with the folder where it is today.

    Args:
        data: the field "data" of the checkpoint. given: places that the user names now.

    Raises:
        CheckpointError: the field is wrong. DataError: the folder is not where it was; names it.
    """
    if not isinstance(data, dict) or not isinstance(data.get("data"), str):
        raise CheckpointError(f"{path}: data: expected a dict with the folder of the dataset")
    for name, kind in {**dict.fromkeys(PLACES, str), "wandb": dict, "content": dict}.items():
        if name in data and not isinstance(data[name], kind):
            raise CheckpointError(f"{path}: data.{name}: expected a {kind.__name__}, got {data[name]!r}")
    data = data | given
    root = Path(data["data"])
    # runs of the first version kept the folder as it was typed
    places = [Path.cwd() / root, *(parent / root for parent in path.resolve().parents)]
    found = next((place for place in places if place.is_dir()), None)
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
        before = {"train": content["train"] | {"images": state.get("train_images")}, "val": content["val"]}
    for name in content:
        if not isinstance(before.get(name), dict) or before[name].keys() != content[name].keys():
            raise CheckpointError(f"{path}: data.content.{name}: expected a record of its data")
    changes = {name: difference(before[name], content[name]) for name in content}
    text = "; ".join(f"{name}: {change}" for name, change in changes.items() if change)
    if text and not accept:
        raise DataError(
            f"{path}: the data is not what this run began with: {text}; --accept-changed-data goes on all the same"
        )
    if text:
        warnings.warn(f"{path}: the data is not what this run began with: {text}", stacklevel=2)


def content_of(splits: dict[str, Split]) -> dict[str, Any]:
    """`Split.content` of each."""
    return {name: split.content() for name, split in splits.items()}
