"""The subcommand `train`: from its flags a trainer and a run directory."""

import argparse
import contextlib
import importlib.util
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch

from detr import checkpoint, distributed, resume, run_folder
from detr.config import VAL_FRACTION, Config, departures
from detr.data import validation_loader
from detr.engine import train
from detr.errors import DataError
from detr.flags import (
    CONFIG_FLAGS,
    SWITCHES,
    checkpoint_of,
    hold_out_of,
    new_config,
    reading_of,
    run_folder_of,
)
from detr.load import dataset_of, read_parts
from detr.pace import set_pace
from detr.problems import raise_or_warn
from detr.split import Split
from detr.trainer import Trainer
from detr.weights import Report, load_weights


def run_training(options: argparse.Namespace, device: torch.device) -> int:
    """Train as the flags say; the exit code."""
    device = distributed.join(device)
    with distributed.one_line_for_lost_processes(), warnings.catch_warnings():
        if not distributed.is_main():
            warnings.simplefilter("ignore")
        code = _run(options, device)
    distributed.leave()
    return code


def _run(options: argparse.Namespace, device: torch.device) -> int:
    out = run_folder_of(options)
    path = out / "checkpoint.pt"
    main = distributed.is_main()
    with contextlib.ExitStack() as held:
        if options.resume:
            if out.is_file():
                raise checkpoint.CheckpointError(
                    f"{out}: expected the folder of a run or the checkpoint.pt in it, which alone can be resumed"
                )
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
            config, data, categories = new_config(options), distributed.from_main(lambda: _data(options)), None

        # the main process alone looks at the files: one message for a fault, and no storm of reads
        splits, known = distributed.from_main(lambda: _load(data, config, categories, bool(options.resume)))
        if main and options.resume:
            resume.check_same_data(state, known["content"], path, options.accept_changed_data)
        data |= known
        fresh = not (options.resume or options.weights)
        trainer = Trainer(config, splits["train"], device, options.workers, fresh=fresh)
        val = validation_loader(splits["val"], config, device, options.workers)
        if options.resume:
            trainer.load_state(state, path, options.accept_changed_data)
        report = _initialise(options, trainer)
        if main and not options.resume:
            held.enter_context(run_folder.hold(out, resume=False))
        if options.minutes:
            if main:
                print(f"{options.minutes:g} minutes: trying some steps", flush=True)
            pace = set_pace(trainer, val, options.minutes, options.began)
            if main:
                print(pace)
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
        return load_weights(trainer.model, checkpoint_of(options.weights), trainer.split.class_names)
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
    names = ("format", "classes", "val_fraction", "split_seed", "exif", "large_images")
    data |= {name: value for name in names if _is_given(value := getattr(options, name))}
    if options.wandb:
        if not importlib.util.find_spec("wandb"):
            raise DataError("--wandb: the package wandb is not installed")
        data["wandb"] = {"project": options.wandb, "id": uuid.uuid4().hex[:12]}
    return data


def _is_given(value: Any) -> bool:
    return value is not None and value is not False  # a seed may be 0


def _load(
    data: dict[str, Any], config: Config, categories: dict[int, str] | None, resumed: bool
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The splits "train" and "val", and what a run remembers of them."""
    before = {"format": None, "format_before": data.get("format")} if resumed else {}
    dataset, held = dataset_of(data | before), hold_out_of(data)
    parts, said = read_parts(dataset, categories, config, reading_of(data), hold_out=held, again=resumed)
    for part in parts.values():
        raise_or_warn(part.problems)
    if said:
        print(said)
    splits = {name: part.split for name, part in parts.items()}
    known: dict[str, Any] = {"format": dataset.format}
    known["content"] = {name: split.content() for name, split in splits.items()}
    if said:
        known["val_fraction"], known["split_seed"] = held or (VAL_FRACTION, 0)
    return splits, known


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
    if config.warmup_steps > trainer.total_steps:
        text = f"the warm-up of {config.warmup_steps} steps is longer than the run of {trainer.total_steps}"
        warnings.warn(f"warmup_steps: {text}: the rates stay below their full value", stacklevel=1)
    if config.batch_size > len(trainer.split.images):
        text = f"a step of {config.batch_size} images has some of the {len(trainer.split.images)} more than once"
        warnings.warn(f"batch_size: {text}", stacklevel=1)
    changed = departures(config)
    if changed:
        text = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())
        if "batch_size" in changed and "lr" not in changed:
            theirs, ours = changed["batch_size"]
            root = config.lr * (ours / theirs) ** 0.5
            text += f"; the rates were not scaled with the batch (the square-root rule for Adam: --lr {root:.2g})"
        warnings.warn(f"not as in recipe {config.recipe}: {text}", stacklevel=1)


def _resumed_config(options: argparse.Namespace, state: dict[str, Any], path: Path) -> Config:
    changed = [name for name in (*CONFIG_FLAGS, *SWITCHES) if hasattr(options, name)] + options.set
    others = ("preset", "out", "recipe", "minutes", "wandb", "weights", "no_pretrained", "exif", "large_images")
    others += ("format", "classes", "val_fraction", "split_seed")
    changed += [name for name in others if _is_given(getattr(options, name))]
    if changed:
        raise DataError(f"--resume continues the run as it was: {changed[0]} cannot be changed")
    config = checkpoint.config_of(state, path)
    checkpoint.check_sizes(config, state["model"], len(state["class_names"]), path)
    return config
