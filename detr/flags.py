"""Kinds of arguments of the commands, and the flags of `train`. Imports no PyTorch."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from detr.arguments import CHOICES, NUMBERS
from detr.config import BACKENDS, MAX_PIXELS, RECIPES, Config, short
from detr.errors import ArgumentError
from detr.presets import PRESETS, RECIPE_FIELDS
from detr.terminal import one_line

# flags that replace a field of the preset: type or choices, text
CONFIG_FLAGS = {
    "steps": (int, "optimiser steps"),
    "epochs": (int, "passes over the training images; used where steps is not set"),
    "batch_size": (int, "images per optimiser step, over all processes and accumulated batches"),
    "accumulate": (
        int,
        "batches that a process computes one after the other for a step, to save memory; 0, the default of "
        "all presets but tiny: so many that each has at most 2 images",
    ),
    "lr": (float, "AdamW learning rate; that of the backbone keeps its ratio to it"),
    "image_size": (int, "shortest side of an image in the model, pixels; the longest allowed follows it"),
    "ema": (float, "decay of averaged weights, e.g. 0.999; 0 averages none"),
    "amp": (("none", "bf16", "fp16"), "autocast of the model; boxes and losses stay float32"),
    "patience": (int, "evaluations without a better AP that end the run; 0 never does"),
    "backend": (BACKENDS, "of the deformable attention: inductor is faster on CPUs and needs a C++ compiler"),
    "seed": (int, "of initialisation, order, augmentation and dropout"),
}
SWITCHES = {
    "compile": "torch.compile the model: slow first steps, fast later ones",
    "grad_checkpointing": "recompute the transformer's layers in the backward: less memory, more time",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others of `detr`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (`{self.prog} --help` says more)\n")


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], Any]:
    """The type of an argument that is an int or a float, finite and from `low` to `high`, where they are given."""
    words = "an integer" if kind is int else "a number"
    if low is not None:
        words += f" from {low} to {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            if low is None or low <= value <= high:  # NaN is not
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {words}, got {short(text)}")

    return parse


def place(text: str) -> str:
    """The type of an argument that names a file, a folder or a pattern: ~ is expanded, as by a shell."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file or folder, got ''")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """The type of an argument that names a file or a folder, see `place`."""
    return Path(place(text))


def names(text: str) -> list[str]:
    """The type of an argument that is a list of names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, no two the same, got {short(text)}")
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`, those of the data and the device apart."""
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"model: {', '.join(PRESETS)} (tiny)")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="how it is trained: official, as in the paper, from an ImageNet backbone; finetune, from --weights of a "
        "detector; tiny, small models from nothing (the preset's)",
    )
    parser.add_argument("--out", type=path, help="new run directory (runs/train)")
    parser.add_argument(
        "--resume",
        type=path,
        metavar="RUN",
        help="continue the run in this directory, or of this checkpoint.pt, as it was; --data says where its data is "
        "now, if it was moved",
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="with --resume: go on although images or boxes are not those that the run was trained on",
    )
    parser.add_argument(
        "--weights",
        type=path,
        help="start from the weights in this file or folder: ours, official, Hugging Face, torchvision",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="start the backbone from random weights")
    parser.add_argument(
        "--minutes",
        type=number(*NUMBERS["minutes"]),
        metavar="M",
        help="train for so long, evaluations included: the number of steps is chosen after a short trial",
    )
    for name, (kind, text) in CONFIG_FLAGS.items():
        values = {"choices": kind} if isinstance(kind, tuple) else {"type": number(kind), "metavar": "N"}
        parser.add_argument(
            _flag(name),
            default=argparse.SUPPRESS,
            help=f"{text} (the {'recipe' if name in RECIPE_FIELDS else 'preset'}'s)",
            **values,
        )
    for name, text in SWITCHES.items():
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, action="store_true", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the config (detr/config.py lists them), value as json; may be repeated",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also send the metrics to Weights & Biases, if installed")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that the flags of `train` name, and "recipe" if --set does.

    Raises:
        ArgumentError: --set names no field.
    """
    fields = {name: getattr(options, name) for name in (*CONFIG_FLAGS, *SWITCHES) if hasattr(options, name)}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ArgumentError(f"--set: expected FIELD=VALUE, got {short(text)}")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
        if name not in Config.__dataclass_fields__:
            raise ArgumentError(f"config: {Config.fault({name: None})}")
    if options.no_pretrained:
        fields["pretrained_backbone"] = False
    return fields


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how image files are read: see `detr.images.reading_of`."""
    parser.add_argument(
        "--exif",
        choices=CHOICES["exif"],
        help="turn pixels as their EXIF orientation says, where width and height of the json do not say that the boxes "
        "are of the stored ones; or ignore it: pixels as they are stored (turn)",
    )
    parser.add_argument(
        "--large-images",
        action="store_true",
        help=f"also read images of more than {MAX_PIXELS / 1e6:.0f} million pixels (refused, as files that are made to "
        "fill the memory)",
    )


def add_data_flags(parser: argparse.ArgumentParser, divided: bool = True) -> None:
    """The flags that say how a dataset is read.

    Args:
        divided: also those that hold images out for a dataset without a split `val`.
    """
    parser.add_argument(
        "--format", choices=CHOICES["format"], help="of the dataset, where its folder could be of several (found out)"
    )
    parser.add_argument(
        "--classes",
        type=names,
        metavar="A,B,...",
        help="names of the classes of Pascal VOC, in their order (classes.txt in the folder, else the alphabet's)",
    )
    if divided:
        parser.add_argument(
            "--val-fraction",
            type=number(*NUMBERS["val_fraction"]),
            metavar="F",
            help="of the training images, held out where the dataset has no split val (0.2)",
        )
        parser.add_argument(
            "--split-seed", type=number(*NUMBERS["split_seed"]), metavar="N", help="which images these are (0)"
        )
    add_reading_flags(parser)
