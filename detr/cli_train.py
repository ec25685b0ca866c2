"""The subcommand `train`: its flags, and from them a trainer and a run directory."""

import argparse
import contextlib
import importlib.util
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch

from detr import checkpoint, distributed, resume, run_folder
from detr.check_data import check_pair
from detr.config import BACKENDS, PRESETS, RECIPE_FIELDS, RECIPES, Config, departures, preset
from detr.data import find_split, load_split, raise_or_warn, validation_loader
from detr.engine import train
from detr.images import MAX_PIXELS, DataError, Reading
from detr.split import Split
from detr.trainer import Trainer
from detr.weights import Report, load_weights

# flags that replace a field of the preset: type or choices, text
CONFIG_FLAGS = {
    "steps": (int, "optimiser steps"),
    "epochs": (int, "passes over the training images; used where steps is not set"),
    "batch_size": (int, "images per optimiser step, over all processes and accumulated batches"),
    "accumulate": (
        int,
        "batches that a process computes one after the other for a step, to save memory; 0, for all but the tiny "
        "presets: enough for 2 images at most in each",
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`, those of the data and the device apart."""
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"model: {', '.join(PRESETS)} (tiny)")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="how it is trained: official, as in the paper, from an ImageNet backbone; finetune, from --weights of a "
        "detector; tiny, small models from nothing (the preset's)",
    )
    parser.add_argument("--out", type=Path, help="new run directory (runs/train)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the run in this directory, as it was; --data says where its data is now, if it was moved",
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="with --resume: go on although images or boxes are not those that the run was trained on",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="start from the weights in this file or folder: ours, official, Hugging Face, torchvision",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="start the backbone from random weights")
    for name, (kind, text) in CONFIG_FLAGS.items():
        values = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
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


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how image files are read: see `reading_of`."""
    parser.add_argument(
        "--exif",
        choices=("turn", "ignore"),
        help="turn pixels as their EXIF orientation says, where width and height of the json do not say that the boxes "
        "are of the stored ones; or ignore it: pixels as they are stored (turn)",
    )
    parser.add_argument(
        "--large-images",
        action="store_true",
        help=f"also read images of more than {MAX_PIXELS / 1e6:.0f} million pixels (refused, as files that are made to "
        "fill the memory)",
    )


def reading_of(flags: dict[str, Any]) -> Reading:
    """How image files are read, from the values of `add_reading_flags`, which may be absent."""
    return Reading(flags.get("exif") or "turn", bool(flags.get("large_images")))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run_training(options: argparse.Namespace, device: torch.device) -> int:
    """Train as the flags say; the exit code."""
    device = distributed.join(device)
    with distributed.one_line_for_lost_processes(), warnings.catch_warnings():
        if not distributed.is_main():
            warnings.simplefilter("ignore")
        code = _run(options, device)
    distributed.leave()
    return code


def run_folder_of(options: argparse.Namespace) -> Path:
    """The folder that `detr train` with these flags writes to."""
    return options.resume or options.out or Path("runs/train")


def _run(options: argparse.Namespace, device: torch.device) -> int:
    out = run_folder_of(options)
    path = out / "checkpoint.pt"
    main = distributed.is_main()
    with contextlib.ExitStack() as held:
        if options.resume:
            if out.is_file():
                raise checkpoint.CheckpointError(f"{out}: expected the folder of a run, got a file")
            if not path.is_file():
                raise checkpoint.CheckpointError(f"{path}: the file is missing: no run to continue")
            if main:
                # first of all, so that what is read is what the last process left
                held.enter_context(run_folder.hold(out, resume=True))
            distributed.wait()
            state = checkpoint.load(path)
            config, data = _resumed_config(options, state, path), state.get("data")
            data = resume.located(data, _places(options), path)
            categories = checkpoint.classes_of(state)
        else:
            if main:
                run_folder.look(out)
            distributed.wait()
            if options.accept_changed_data:
                raise DataError("--accept-changed-data: expected --resume beside it")
            config, data, categories = _config(options), distributed.from_main(lambda: _data(options)), None

        # the main process looks at the files first: one message for a fault, and no storm of reads
        splits = _load(data, config, categories, read_headers=True) if main else {}
        content = {name: split.content() for name, split in splits.items()}
        if main and options.resume:
            resume.check_same_data(state, content, path, options.accept_changed_data)
        data["content"] = distributed.from_main(lambda: content)
        splits = splits or _load(data, config, categories, read_headers=False)
        fresh = not (options.resume or options.weights)
        trainer = Trainer(config, splits["train"], device, options.workers, fresh=fresh)
        val = validation_loader(splits["val"], config, device, options.workers)
        if options.resume:
            trainer.load_state(state, path, options.accept_changed_data)
        report = _initialise(options, trainer)
        if main and not options.resume:
            held.enter_context(run_folder.hold(out, resume=False))
        if main:
            if report:
                print(report)
            _introduce(trainer, val.dataset.split, out)
            if trainer.finished:
                more = f"to go on, start a run with --weights {out}/best.pt"
                print(f"finished already, at step {trainer.steps_done}; {more}")
        metrics = train(trainer, val, out, data)
    if main:
        if metrics is None:
            print(f"stopped after step {trainer.steps_done}; continue with: detr train --resume {out}")
        else:
            if trainer.out_of_patience:
                print(f"ended at step {trainer.steps_done}: no better AP in {trainer.stale} evaluations")
            print(
                f"{out}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}; see curves.png and predictions.png there"
            )
    return 130 if metrics is None else 0


def _initialise(options: argparse.Namespace, trainer: Trainer) -> Report | None:
    """Start from --weights, if there are any; what was taken from them."""
    if options.resume or not options.weights:
        if trainer.config.recipe == "finetune" and not options.resume:
            warnings.warn("recipe finetune is for the --weights of a detector, and none are given", stacklevel=1)
        return None
    try:
        return load_weights(trainer.model, options.weights, trainer.split.class_names)
    except ValueError as error:
        raise checkpoint.CheckpointError(str(error)) from None


def _places(options: argparse.Namespace) -> dict[str, str]:
    """The flags that say where the data is; the folder with its whole path, for a resume from elsewhere."""
    places = {name: str(value) for name in resume.PLACES if (value := getattr(options, name)) is not None}
    return places | ({"data": os.path.abspath(places["data"])} if "data" in places else {})


def _data(options: argparse.Namespace) -> dict[str, Any]:
    """What a run keeps about its data, and about Weights & Biases."""
    if options.data is None:
        raise DataError("--data: expected the folder of a dataset, got nothing")
    data: dict[str, Any] = _places(options)
    data |= {name: value for name in ("exif", "large_images") if (value := getattr(options, name))}
    if options.wandb:
        if not importlib.util.find_spec("wandb"):
            raise DataError("--wandb: the package wandb is not installed")
        data["wandb"] = {"project": options.wandb, "id": uuid.uuid4().hex[:12]}
    return data


def _load(
    data: dict[str, Any], config: Config, categories: dict[int, str] | None, read_headers: bool
) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for name in ("train", "val"):
        given = (Path(data[key]) if key in data else None for key in (f"{name}_json", f"{name}_images"))
        files = find_split(Path(data["data"]), name, *given)
        splits[name] = load_split(*files, categories, read_headers, config, reading_of(data))
        categories = splits[name].categories
    if read_headers:
        raise_or_warn(check_pair(splits["train"], splits["val"]))
    return splits


def _introduce(trainer: Trainer, val: Split, out: Path) -> None:
    """Say what will be trained, how, and where that is not what the recipe says."""
    config = trainer.config
    millions = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    images = f"{len(trainer.split.images)} training and {len(val.images)} validation images"
    print(f"{config.name}: {millions:.2f} M parameters; {images}; {len(trainer.split.categories)} classes")
    size = config.batch_size // trainer.accumulate // trainer.world
    batch = f"{trainer.world} processes x {trainer.accumulate} accumulated batches x {size} images"
    passes = trainer.total_steps * config.batch_size / len(trainer.split.images)
    steps = f"{trainer.total_steps} steps of {config.batch_size} images = {passes:.1f} epochs"
    print(f"recipe {config.recipe}: {steps}; a step: {batch}")
    rates = ", ".join(
        f"{group['name']} {peak:g}"
        for group, peak in zip(trainer.optimizer.param_groups, trainer.peak_rates, strict=True)
    )
    decay = "x0.1 after 80 %" if config.schedule == "step" else "cosine to 0"
    averaging = f"; EMA {config.ema:g}" if config.ema else ""
    print(f"AdamW rates: {rates}; warm-up {config.warmup_steps} steps, {decay}{averaging}; autocast {config.amp}")
    print(f"on {trainer.device}; results in {out}")
    changed = departures(config)
    if changed:
        text = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())
        if "batch_size" in changed and "lr" not in changed:
            theirs, ours = changed["batch_size"]
            root = config.lr * (ours / theirs) ** 0.5
            text += f"; the rates were not scaled with the batch (the square-root rule for Adam: --lr {root:.2g})"
        warnings.warn(f"not as in recipe {config.recipe}: {text}", stacklevel=1)


def _config(options: argparse.Namespace) -> Config:
    names = (*CONFIG_FLAGS, *SWITCHES)
    overrides = {name: getattr(options, name) for name in names if hasattr(options, name)}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--set: expected FIELD=VALUE, got {text!r}")
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    if options.no_pretrained:
        overrides["pretrained_backbone"] = False
    if "epochs" in overrides:
        overrides.setdefault("steps", None)
    return scaled_preset(options.preset or "tiny", options.recipe, **overrides)


def scaled_preset(name: str, recipe: str | None, **overrides: Any) -> Config:
    """`preset`, where the backbone's rate follows lr and max_size follows image_size.

    Raises:
        DataError: as `preset`.
    """
    base = preset(name, recipe)
    if "lr" in overrides:
        overrides.setdefault("lr_backbone", base.lr_backbone * overrides["lr"] / base.lr)
    if "image_size" in overrides:
        overrides.setdefault("max_size", round(base.max_size * overrides["image_size"] / base.image_size))
    try:
        return preset(name, recipe, **overrides)
    except ValueError as error:
        raise DataError(str(error)) from None


def _resumed_config(options: argparse.Namespace, state: dict[str, Any], path: Path) -> Config:
    changed = [name for name in (*CONFIG_FLAGS, *SWITCHES) if hasattr(options, name)] + options.set
    others = ("preset", "out", "recipe", "wandb", "weights", "no_pretrained", "exif", "large_images")
    changed += [name for name in others if getattr(options, name)]
    if changed:
        raise DataError(f"--resume continues the run as it was: {changed[0]} cannot be changed")
    config = checkpoint.config_of(state, path)
    checkpoint.check_sizes(config, state["model"], len(state["class_names"]), path)
    return config
