"""`detr.train`: from a dataset, or a run that was interrupted, to a trained detector and the folder of its run."""

import contextlib
import importlib.util
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr import checkpoint, distributed, run_folder
from detr import resume as resuming
from detr.arguments import checked, names_of, path_of, run_folder_of
from detr.backbone import load_imagenet
from detr.config import VAL_FRACTION, Config, short
from detr.data import validation_loader
from detr.detector import Detector, detector_of, used
from detr.devices import device_of
from detr.errors import ArgumentError, CheckpointError, MissingPackageError, TrainingError
from detr.evaluate import per_class_table
from detr.images import reading_of
from detr.pace import set_pace
from detr.presets import departures, scaled_preset
from detr.problems import raise_or_warn
from detr.run import Run
from detr.split import Split
from detr.splits import dataset_of, hold_out_of, read_parts
from detr.terminal import say
from detr.weights import load_weights


def train(
    data: str | Path | None = None,
    *,
    preset: str | None = None,
    recipe: str | None = None,
    out: str | Path | None = None,
    minutes: float | None = None,
    weights: str | Path | None = None,
    resume: str | Path | None = None,
    accept_changed_data: bool = False,
    format: str | None = None,
    classes: list[str] | None = None,
    train_json: str | Path | None = None,
    train_images: str | Path | None = None,
    val_json: str | Path | None = None,
    val_images: str | Path | None = None,
    val_fraction: float | None = None,
    split_seed: int | None = None,
    exif: str | None = None,
    large_images: bool = False,
    device: str | torch.device | None = None,
    workers: int | None = None,
    wandb: str | None = None,
    stop: Callable[[], bool] | None = None,
    began: float | None = None,
    **fields: Any,
) -> Detector:
    """Train a detector, as the command `detr train` does: with the same defaults, folder and, bit for bit, weights.

    It says what it does on standard output, and shows its progress on standard error. The state of random generators is
    afterwards what it was before. It may be called from any thread, one at a time; what other threads draw meanwhile
    from PyTorch's generators is not random. A flag of the command in a message, such as --split-seed, means the
    argument of that name.

    Args:
        data: folder of a dataset (COCO, YOLO or Pascal VOC, exported by Roboflow too), or a data.yaml.
        preset: the model, one of `list(detr.PRESETS)`; None is "tiny", which a CPU trains from random weights.
        recipe: how it is trained: "official", "finetune" (from `weights` of a detector) or "tiny"; None: the preset's.
        out: folder of the run, which must not hold a run yet; None is runs/train.
        minutes: train for so long, evaluations included: the number of steps is chosen after a short trial.
        weights: a file or folder to start from: ours, official, Hugging Face, torchvision.
        resume: folder of a run that was interrupted, or the checkpoint.pt in it: the run is continued with what it was
            begun with. `data` and the json and image places say where its data is now, if it was moved; `device`,
            `workers`, `stop` and `accept_changed_data` may be given too, and nothing else.
        accept_changed_data: with `resume`: continue although images or boxes are not those of before.
        format: "coco", "roboflow", "yolo" or "voc"; None finds it out.
        classes: names of the classes of Pascal VOC, in their order.
        train_json, train_images, val_json, val_images: files and folders in `data`, if their names are not the usual.
        val_fraction, split_seed: of the training images, the part (0 to 1; None is 0.2) that is held out where there is
            no split val, and which images these are.
        exif: "turn" (None) or "ignore" the EXIF orientation of images.
        large_images: read those above 89 million pixels too.
        device: "cpu", "cuda:1" or a torch.device; None is a CUDA GPU if there is one, else the CPU.
        workers: processes that load images; None is 0 if all images fit into memory, else one for each CPU, at most 8.
        wandb: project at Weights & Biases that the metrics are sent to.
        stop: a function that is asked before each step, such as `threading.Event().is_set`. Once it says True, that
            step is made and the run ends with a checkpoint, to be resumed.
        began: `time.perf_counter()` from which `minutes` are counted; None is now.
        **fields: any field of `detr.Config`, such as steps=200, epochs=20, lr=1e-4, batch_size=8, ema=0.999, seed=1, or
            image_size=320: the shorter side of an image in the model, pixels; the longest allowed follows it.

    Returns:
        What `detr.load` gives for the folder of the run: the detector of the step with the best average precision, or
        of the last step if none was evaluated.

    Raises:
        ArgumentError: names the argument or field. DataError: names file and entry. CheckpointError: of `weights` or
        `resume`. OutputError: a run is in the folder already, or something else is in the way. TrainingError: too many
        losses are not finite, or too many images cannot be read. All are kinds of `detr.DetrError`.
    """
    began = time.perf_counter() if began is None else began
    names = {"train_json": train_json, "train_images": train_images, "val_json": val_json, "val_images": val_images}
    places = {name: str(path_of(name, value)) for name, value in names.items() if value is not None}
    if data is not None:
        places["data"] = os.path.abspath(path_of("data", data))  # the whole path, for a resume from elsewhere
    minutes, workers = checked("minutes", minutes), checked("workers", workers)
    given = {"format": format, "val_fraction": val_fraction, "split_seed": split_seed, "exif": exif}
    about = {name: checked(name, value) for name, value in given.items()} | {"classes": names_of("classes", classes)}
    about = {name: value for name, value in about.items() if value is not None}
    about |= {"large_images": True} if large_images else {}
    weights = None if weights is None else path_of("weights", weights)
    if stop is not None and not callable(stop):
        raise ArgumentError(f"stop: expected a function, such as is_set of a threading.Event, got {short(stop)}")
    if wandb is not None and (not isinstance(wandb, str) or not wandb):
        raise ArgumentError(f"wandb: expected the name of a project, got {short(wandb)}")
    choices = {"preset": preset, "out": out, "recipe": recipe, "minutes": minutes, "wandb": wandb, "weights": weights}
    folder = run_folder_of(out, resume)
    with contextlib.ExitStack() as held:
        held.enter_context(_one_at_a_time())
        device = device_of(device)
        held.enter_context(_random_state_kept(device))
        device = held.enter_context(distributed.joined(device))
        held.enter_context(warnings.catch_warnings())
        if not distributed.is_main():
            warnings.simplefilter("ignore")
        state = None
        if resume is not None:
            changed = [name for name, value in (choices | about | fields).items() if value is not None]
            if changed:
                raise ArgumentError(f"resume: the run goes on as it was: {changed[0]} cannot be changed")
            state = _read_run(folder, held)
            config, about = _config_of(state, folder), resuming.located(state.get("data"), places, _file(folder))
        else:
            distributed.from_main(lambda: run_folder.look(folder))
            if accept_changed_data:
                raise ArgumentError("accept_changed_data: expected resume beside it")
            config = _new_config(preset, recipe, minutes, fields)
            about = distributed.from_main(lambda: _new_data(places, about, wandb))

        # the main process alone looks at the files: one message for a fault, and no storm of reads
        splits, known, said = distributed.from_main(lambda: _read_data(about, config, state))
        _say(said)
        if state and distributed.is_main():
            resuming.check_same_data(state, known["content"], _file(folder), accept_changed_data)
        about |= known
        run = Run(config, splits["train"], device, workers, _first_weights(config, splits["train"], weights, state))
        val = validation_loader(splits["val"], config, device, workers, share=(run.rank, run.world))
        if state:
            run.load_state(state, _file(folder), accept_changed_data)
        elif distributed.is_main():
            held.enter_context(run_folder.hold(folder, resume=False))
        if minutes is not None:
            _say(f"{minutes:g} minutes: trying some steps")
            _say(set_pace(run, val, minutes, began))
        _introduce(run, val.dataset.split, folder)
        found = run.train(val, folder, about, stop or (lambda: False))
        if found is None:
            _say(f"stopped after step {run.steps_done}; continue with: detr train --resume {folder}")
        else:
            _say(f"{found.table}\n{per_class_table(found.metrics)}")
            if run.out_of_patience:
                _say(f"ended at step {run.steps_done}: no better AP in {run.stale} evaluations")
            aps = f"AP {found.metrics['AP']:.3f}, AP50 {found.metrics['AP50']:.3f}"
            _say(f"{folder}: {aps}; see curves.png and predictions.png there")
        # from the main process, which alone may have the file
        file, content = distributed.from_main(lambda: _last_file(folder))
    return detector_of(content, file, device, stopped=found is None)


def _last_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    file = checkpoint.file_of(folder)
    return file, used(checkpoint.load(file))


def _say(text: str) -> None:
    if text and distributed.is_main():
        say(*text.split("\n"))


_TRAINING = threading.Lock()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """A second training in another thread would draw from the same random generators, and neither could be repeated."""
    if not _TRAINING.acquire(blocking=False):
        raise TrainingError("another thread of this process is training: expected one training at a time")
    try:
        yield
    finally:
        _TRAINING.release()


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """PyTorch's generators are afterwards as they were: `torch.manual_seed` sets those of all devices in use."""
    with contextlib.ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=[]))
        for kind in ("cuda", "xpu"):
            module = torch.get_device_module(kind)
            if device.type == kind or module.is_initialized():
                kept.enter_context(torch.random.fork_rng(range(module.device_count()), device_type=kind))
        if torch.backends.mps.is_available():
            kept.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


def _file(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def _new_config(preset: str | None, recipe: str | None, minutes: float | None, fields: dict[str, Any]) -> Config:
    given = next((name for name in ("steps", "epochs") if name in fields), None)
    if minutes is not None and given:
        raise ArgumentError(f"minutes: expected without {given}, which also says how long the run is")
    return scaled_preset(preset or "tiny", recipe, **fields)


def _new_data(places: dict[str, str], about: dict[str, Any], wandb: str | None) -> dict[str, Any]:
    """What a new run keeps about its data, and about Weights & Biases."""
    if "data" not in places:
        raise ArgumentError("data: expected the folder of a dataset, got nothing")
    if not wandb:
        return places | about
    if not importlib.util.find_spec("wandb"):
        raise MissingPackageError("wandb: the package wandb is not installed: pip install wandb")
    return places | about | {"wandb": {"project": wandb, "id": uuid.uuid4().hex[:12]}}


def _read_run(folder: Path, held: contextlib.ExitStack) -> dict[str, Any]:
    """The state of the run that goes on, whose folder is locked first, so that it is what the last process left."""
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: expected the folder of a run or the checkpoint.pt in it, which alone can be resumed"
        )
    if not _file(folder).is_file():
        raise CheckpointError(f"{_file(folder)}: the file is missing: no run to continue")
    if distributed.is_main():
        held.enter_context(run_folder.hold(folder, resume=True))
    distributed.wait()
    return checkpoint.load(_file(folder))


def _config_of(state: dict[str, Any], folder: Path) -> Config:
    config = checkpoint.config_of(state, _file(folder))
    checkpoint.check_sizes(config, state["model"], len(state["class_names"]), _file(folder))
    return config


def _read_data(
    about: dict[str, Any], config: Config, state: dict[str, Any] | None
) -> tuple[dict[str, Split], dict[str, Any], str]:
    """The splits "train" and "val", what a run remembers of them, and a line if val had to be held out."""
    before = {"format": None, "format_before": about.get("format")} if state else {}
    dataset, held = dataset_of(about | before), hold_out_of(about)
    categories = checkpoint.classes_of(state) if state else None
    parts, said = read_parts(dataset, categories, config, reading_of(about), hold_out=held, again=bool(state))
    for part in parts.values():
        raise_or_warn(part.problems)
    splits = {name: part.split for name, part in parts.items()}
    known: dict[str, Any] = {"format": dataset.format}
    known["content"] = {name: split.content() for name, split in splits.items()}
    if said:
        known["val_fraction"], known["split_seed"] = held or (VAL_FRACTION, 0)
    return splits, known, said


def _first_weights(
    config: Config, split: Split, weights: Path | None, state: dict[str, Any] | None
) -> Callable[[nn.Module], None] | None:
    """What gives a new model its first weights; None for those that will be overwritten."""
    if state:
        return None
    if config.recipe == "finetune" and not weights:
        warnings.warn("recipe finetune is for the --weights of a detector, and none are given", stacklevel=3)

    def initialise(model: nn.Module) -> None:
        if weights:
            file = checkpoint.file_of(weights)
            _say(checkpoint.taken(weights, file))
            _say(str(load_weights(model, file, split.class_names)))
        elif config.pretrained_backbone:
            load_imagenet(model.backbone, config.backbone)

    return initialise


def _introduce(run: Run, val: Split, out: Path) -> None:
    """Say what will be trained, how, and where that is not what the recipe says."""
    if not distributed.is_main():
        return
    config, learner = run.config, run.learner
    millions = sum(parameter.numel() for parameter in learner.model.parameters()) / 1e6
    images = f"{len(run.split.images)} training and {len(val.images)} validation images"
    say(f"{config.name}: {millions:.2f} M parameters; {images}; {len(run.split.categories)} classes")
    size = config.batch_size // run.accumulate // run.world
    batch = f"{run.world} processes x {run.accumulate} accumulated batches x {size} images"
    passes = run.total_steps * config.batch_size / len(run.split.images)
    steps = f"{run.total_steps} steps of {config.batch_size} images = {passes:.1f} epochs"
    say(f"recipe {config.recipe}: {steps}; a step: {batch}")
    groups = zip(learner.optimizer.param_groups, learner.peak_rates, strict=True)
    rates = ", ".join(f"{group['name']} {peak:g}" for group, peak in groups)
    decay = "x0.1 after 80 %" if config.schedule == "step" else "cosine to 0"
    averaging = f"; EMA {config.ema:g}" if config.ema else ""
    say(f"AdamW rates: {rates}; warm-up {config.warmup_steps} steps, {decay}{averaging}; autocast {config.amp}")
    say(f"on {run.device}; results in {out}")
    if config.warmup_steps > run.total_steps:
        text = f"the warm-up of {config.warmup_steps} steps is longer than the run of {run.total_steps}"
        warnings.warn(f"warmup_steps: {text}: the rates stay below their full value", stacklevel=3)
    if config.batch_size > len(run.split.images):
        text = f"a step of {config.batch_size} images has some of the {len(run.split.images)} more than once"
        warnings.warn(f"batch_size: {text}", stacklevel=3)
    changed = departures(config)
    if changed:
        text = ", ".join(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())
        if "batch_size" in changed and "lr" not in changed:
            theirs, ours = changed["batch_size"]
            root = config.lr * (ours / theirs) ** 0.5
            text += f"; the rates were not scaled with the batch (the square-root rule for Adam: --lr {root:.2g})"
        warnings.warn(f"not as in recipe {config.recipe}: {text}", stacklevel=3)
    if run.finished:
        say(f"finished already, at step {run.steps_done}; to go on, start a run with --weights {out}/best.pt")
