"""Checkpoints: files that are whole or absent, safe to load, and carry all that a model needs to be used."""

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr.config import Config
from detr.model import DeformableDETR, build_model

# of every checkpoint; `checkpoint.pt` of a run adds what continues the training (detr.engine)
KEYS = ("config", "class_names", "category_ids", "model")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the file and the field."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file beside `path`, then rename: whatever happens, `path` is the old file or the new one.

    Raises:
        CheckpointError: the disk is full or the folder not writable; an earlier file at `path` stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: not written: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or is no checkpoint of `detr train`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the checkpoint is missing")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a readable checkpoint: damaged, or of another program")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: refused: holds more than tensors and plain values") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {str(error).splitlines()[0]}") from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]}: not in the file: no checkpoint of `detr train`")
    return content


def load_model(path: Path, device: torch.device) -> tuple[DeformableDETR, Config, dict[int, str]]:
    """The model of a checkpoint in evaluation mode, its config, and its classes: raw id -> name, in label order.

    Where the run averaged its weights (`Config.ema`) these are the averaged ones, which its evaluations were of.

    Raises:
        CheckpointError: as `load`, or weights that do not fit the config that is stored with them.
    """
    content = load(path)
    # the attention takes what this machine has, not what the training had
    config = replace(config_of(content, path), backend="auto")
    model = build_model(replace(config, pretrained_backbone=False), len(content["class_names"]))
    load_weights(model, content.get("ema", content["model"]), path)
    return model.to(device).eval(), config, classes_of(content)


def describe(content: dict[str, Any], model: DeformableDETR) -> str:
    """What a loaded checkpoint is, in a few lines; `model` is the one in it."""
    config, names = content["config"], content["class_names"]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    weights = "averaged (EMA)" if content.get("averaged") else "as trained"
    metrics = content.get("metrics") or {"AP": content.get("best_ap", -1.0)}
    found = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75") if metrics.get(name, -1) >= 0)
    kind = "a run that can be resumed; the best so far" if "optimizer" in content else "its weights"
    shown = ", ".join(f"{name} ({i})" for i, name in list(zip(content["category_ids"], names, strict=True))[:12])
    more = f", and {len(names) - 12} more" if len(names) > 12 else ""
    return "\n".join(
        [
            f"preset {config['name']}, recipe {config.get('recipe', '-')}: {millions:.2f} M parameters, {weights}",
            f"step {content.get('steps_done', '-')}; {kind}: {found or 'not evaluated'}",
            f"images: shortest side {config['image_size']}, longest at most {config['max_size']} pixels; "
            f"{config['n_queries']} queries",
            f"{len(names)} classes (id): {shown}{more}",
        ]
    )


def config_of(content: dict[str, Any], path: Path) -> Config:
    """The config of a loaded checkpoint."""
    try:
        return Config.from_dict(content["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def classes_of(content: dict[str, Any]) -> dict[int, str]:
    """Raw category id -> name of a loaded checkpoint, in the order of labels."""
    return dict(zip(content["category_ids"], content["class_names"], strict=True))


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load all of `weights`, which must fit `model` exactly.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in expected | given:
        if expected.get(name) != given.get(name):
            shapes = (str(list(side[name])) if name in side else "no such tensor" for side in (expected, given))
            raise CheckpointError("{}: of another model: {}: expected {}, got {}".format(path, name, *shapes))
    model.load_state_dict(weights)
