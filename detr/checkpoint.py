"""Checkpoints: files that are whole or absent, safe to load, and carry all that a model needs to be used."""

import argparse
import dataclasses
import lzma
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr.config import Config, short
from detr.errors import CheckpointError
from detr.model import DeformableDETR, build_model
from detr.output import WRITTEN_BY, Folder, whole
from detr.terminal import one_line

# of every checkpoint; `checkpoint.pt` of a run adds what continues the training (detr.run)
KEYS = ("config", "class_names", "category_ids", "model")
# fields of a config that are sizes of a model: none is larger than all its tensors, or there is no such model
_SIZES = ("d_model", "n_heads", "ffn_dim", "enc_points", "dec_points", "n_queries")
_COUNTS = ("enc_layers", "dec_layers", "n_levels")
_IS_FOLDER = 0x10  # among the attributes of a file in a zip
# what each group of an optimiser has had in every version of torch
_OF_A_GROUP = ("name", "params", "lr", "betas", "eps", "weight_decay")
# what PyTorch's and Python's readers raise on files that are damaged or made by hand
_DAMAGED = (
    *(EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(MemoryError, RuntimeError, ImportError, pickle.PickleError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is str and k.isascii() and _is_number(v) for k, v in value.items())


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and is_plain(v) for k, v in value.items())


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor on the CPU, with memory for each of its numbers, and nothing that stands for one."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout is not torch.strided:
        return False
    if value.is_nested or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


# name -> what a field of a checkpoint must be, and in words
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (lambda value: isinstance(value, dict), "a dict"),
    "class_names": (lambda value: _is_list(value, str) and len(value) > 0, "a list of names"),
    "category_ids": (
        lambda value: _is_list(value, int) and len(set(value)) == len(value),
        "a list of distinct integers",
    ),
    "model": (_is_weights, "a dict of tensors"),
    "ema": (_is_weights, "a dict of tensors"),
    "averaged": (lambda value: isinstance(value, bool), "True or False"),
    "metrics": (lambda value: isinstance(value, dict), "a dict"),
    "best_ap": (_is_number, "a number"),
    "unreadable": (lambda value: _is_list(value, str), "a list of messages"),
    "sums": (_is_sums, "a dict of numbers"),
    **dict.fromkeys(
        ("steps_done", "stale", "skipped", "ema_steps", "train_images"), (_is_count, "an integer of at least 0")
    ),
}


def save(path: Path, content: dict[str, Any], folder: Folder | None = None) -> None:
    """Write a checkpoint; whatever happens, `path` is the old file or the new one.

    Args:
        folder: the one that `path` lies in, which then knows the file for its own and overwrites no other.

    Raises:
        OutputError: the disk is full or the folder not writable; an earlier file at `path` stays.
    """
    with folder.whole(path.name, durable=True) if folder else whole(path, durable=True) as file:
        torch.save(content, file)


def read(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU: every byte is checked, and nothing in the file is executed.

    Files of torch 1.5 and before have no checksums; their bytes are not checked.

    Raises:
        CheckpointError: the file is missing, empty or damaged, or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, expected a file, or a run with best.pt or checkpoint.pt in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: not readable: the file is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                damaged = [name for name in [archive.testzip()] if name]
                # an entry that is marked as a folder is not read at all, and leaves memory as it was
                damaged += [e.filename for e in archive.infolist() if e.external_attr & _IS_FOLDER and e.file_size]
            if damaged:
                raise CheckpointError(f"{path}: not readable: damaged: {damaged[0]} is not what was written")
        # the official files hold the command line of their training
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        holds_code = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
        reason = "holds more than tensors and plain values" if holds_code else "damaged, or of another program"
        raise CheckpointError(f"{path}: refused: {reason}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror or 'damaged'}") from None
    except _DAMAGED:
        raise CheckpointError(f"{path}: not readable: damaged, or of another program") from None


def file_of(place: Path) -> Path:
    """The file of a checkpoint: of a run's folder best.pt, or until there is one checkpoint.pt."""
    return next((file for name in ("best.pt", "checkpoint.pt") if (file := place / name).is_file()), place)


def taken(place: Path, file: Path) -> str:
    """A line that says so if `file`, of `file_of`, is not what was asked for."""
    return f"{place}: a run, of which {file.name} is taken" if file != place else ""


def written_by(path: Path) -> str | None:
    """Who a file of weights says wrote it; None for one that says nothing, and for every other file."""
    try:
        content = read(path)
    except CheckpointError:
        return None
    return content.get(WRITTEN_BY) if isinstance(content, dict) else None


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; its fields in KEYS are what they should be.

    Raises:
        CheckpointError: as `read`, or it is no checkpoint of `detr train`; names the field.
    """
    return checked(read(path), path)


def checked(content: Any, path: Path) -> dict[str, Any]:
    """The content that was read from a file, after the checks of `load`."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no checkpoint of `detr train`: expected a dict, got {type(content).__name__}")
    for name in KEYS:
        if name not in content:
            raise CheckpointError(f"{path}: {name}: not in the file: no checkpoint of `detr train`")
    for name, (is_good, expected) in _FIELDS.items():
        if name in content and not is_good(content[name]):
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {short(content[name])}")
    expected, got = (len(content[name]) for name in ("class_names", "category_ids"))
    if expected != got:
        raise CheckpointError(f"{path}: category_ids: expected {expected}, one for each class, got {got}")
    return content


def require(content: dict[str, Any], names: Iterable[str], path: Path) -> None:
    """Make sure that a loaded checkpoint has these fields, too, which only one that can be resumed has.

    Raises:
        CheckpointError: names the first that is absent.
    """
    for name in names:
        if name not in content:
            raise CheckpointError(f"{path}: {name}: not in the file: only checkpoint.pt can be resumed")


def model_of(content: dict[str, Any], path: Path) -> tuple[DeformableDETR, Config]:
    """The model in a loaded checkpoint, and its config.

    Where the run averaged its weights (`Config.ema`) these are the averaged ones, which its evaluations were of.

    Raises:
        CheckpointError: weights that do not fit the config that is stored with them.
    """
    # the attention takes what this machine has, not what the training had
    config = dataclasses.replace(config_of(content, path), backend="auto")
    weights = content.get("ema", content["model"])
    check_sizes(config, weights, len(content["class_names"]), path)
    with torch.random.fork_rng(devices=[]):  # its first weights, which go, are nobody's random numbers
        model = build_model(config, len(content["class_names"]))
    model.load_state_dict(weights)
    return model, config


def check_sizes(config: Config, weights: dict[str, Tensor], num_classes: int, path: Path) -> None:
    """Make sure that `weights` are those of the model of `config`, before anything of its size is made.

    Raises:
        CheckpointError: names the field that is too large, or the first tensor that does not fit.
    """
    limits = dict.fromkeys(_SIZES, sum(tensor.numel() for tensor in weights.values()))
    limits |= dict.fromkeys(_COUNTS, len(weights))
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            raise CheckpointError(f"{path}: config: {name}: {getattr(config, name)} does not fit the weights beside it")
    try:
        with torch.device("meta"):
            model = build_model(config, num_classes)
    except RuntimeError:  # the bytes of a tensor cannot be counted
        raise CheckpointError(f"{path}: config: its sizes do not fit the weights beside it") from None
    check_weights(model, weights, path)


def describe(content: dict[str, Any], model: DeformableDETR, config: Config) -> str:
    """What a loaded checkpoint is, in a few lines; `model` and `config` are those in it."""
    names = content["class_names"]
    recipe = content["config"].get("recipe", "-")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    weights = "averaged (EMA)" if content.get("averaged") else "as trained"
    metrics = content.get("metrics") or {"AP": content.get("best_ap", -1.0)}
    numbers = {name: metrics.get(name) for name in ("AP", "AP50", "AP75")}
    found = ", ".join(f"{name} {v:.3f}" for name, v in numbers.items() if _is_number(v) and v >= 0)
    kind = "a run that can be resumed; the best so far" if "optimizer" in content else "its weights"
    classes = list(zip(content["category_ids"], map(one_line, names), strict=True))
    shown = ", ".join(f"{name} ({i})" for i, name in classes[:12])
    more = f", and {len(names) - 12} more" if len(names) > 12 else ""
    return "\n".join(
        [
            f"preset {config.name}, recipe {recipe}: {millions:.2f} M parameters, {weights}",
            f"step {content.get('steps_done', '-')}; {kind}: {found or 'not evaluated'}",
            f"images: shortest side {config.image_size}, longest at most {config.max_size} pixels; "
            f"{config.n_queries} queries",
            f"{len(names)} classes (id): {shown}{more}",
        ]
    )


# newer than the oldest files: where one is absent, its default is what the code did then
_ADDED = ("query_selection", "proposal_nms", "denoising", "shape_groups")


def config_of(content: dict[str, Any], path: Path) -> Config:
    """The config of a loaded checkpoint. A field that is absent is refused, unless it is newer than the file may be.

    Raises:
        CheckpointError: a field is absent, unknown, of the wrong type or out of range.
    """
    for field in dataclasses.fields(Config):
        if field.name not in content["config"] and field.name not in _ADDED:
            raise CheckpointError(f"{path}: config: {field.name}: not in the file")
    fault = Config.fault(content["config"])
    if fault:
        raise CheckpointError(f"{path}: config: {fault}")
    return Config(**content["config"])


def classes_of(content: dict[str, Any]) -> dict[int, str]:
    """Raw category id -> name of a loaded checkpoint, in the order of labels."""
    return dict(zip(content["category_ids"], content["class_names"], strict=True))


def check_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Make sure that `weights` are all of `model`, and no more.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape or kind of number.
    """
    expected, given = ({name: _kind(tensor) for name, tensor in side.items()} for side in (model.state_dict(), weights))
    for name in expected | given:
        if expected.get(name) != given.get(name):
            kinds = (side.get(name, "no such tensor") for side in (expected, given))
            raise CheckpointError("{}: of another model: {}: expected {}, got {}".format(path, name, *kinds))


def _kind(tensor: Tensor) -> str:
    """Shape, and the kind of numbers where it is not the usual one."""
    return f"{list(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def misfit(expected: Any, given: Any, where: str) -> str | None:
    """Where `given`, read from a file, is not built like `expected`: a sentence, or None if it is.

    Dicts have the same keys, lists the same length, tensors the same shape and dtype. A float may be an integer.
    """
    if isinstance(expected, Tensor):
        if not isinstance(given, Tensor):
            return f"{where}: expected a tensor, got {short(given)}"
        kinds = [f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (expected, given)]
        if kinds[0] != kinds[1]:
            return f"{where}: expected {kinds[0]}, got {kinds[1]}"
        # fused optimisers take it for granted
        steps = [[step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (expected, given)]
        return None if is_plain(given) and steps[0] == steps[1] else f"{where}: its numbers lie in another order"
    if isinstance(expected, dict):
        if not isinstance(given, dict):
            return f"{where}: expected a dict, got {short(given)}"
        for key in expected | given:
            if (key in expected) != (key in given):
                return f"{where}.{key}: {'not in the file' if key in expected else 'unknown'}"
        found = (misfit(expected[key], given[key], f"{where}.{key}") for key in expected)
        return next((sentence for sentence in found if sentence), None)
    if isinstance(expected, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(expected):
            return f"{where}: expected {len(expected)} values, got {short(given)}"
        found = (misfit(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(expected, given, strict=True)))
        return next((sentence for sentence in found if sentence), None)
    kinds = {float: (int, float)}.get(type(expected), (type(expected),))
    if type(given) not in kinds or (type(given) is int and abs(given) >= 2**63):
        return f"{where}: expected {type(expected).__name__}, got {short(given)}"
    return None


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any, path: Path) -> None:
    """Make sure that `state`, read from a file, is one of `optimizer`, an AdamW.

    Its `load_state_dict` would take tensors of any shape, and fail in the next step. What newer versions of torch add
    to the groups may be absent, and so may the averages of a parameter that never had a gradient.

    Raises:
        CheckpointError: names the entry that is absent or wrong.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: optimizer: expected a dict, got {short(state)}")
    expected, given = optimizer.state_dict(), dict(state)
    averages, groups = given.get("state"), given.get("param_groups")
    if isinstance(averages, dict):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        expected["state"] = {
            i: {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
            for i in averages
            if type(i) is int and 0 <= i < len(parameters)
        }
    if isinstance(groups, list) and len(groups) == len(expected["param_groups"]) and _is_list(groups, dict):
        pairs = list(zip(expected["param_groups"], groups, strict=True))
        kept = [[k for k, v in mine.items() if k in _OF_A_GROUP or (v is not None and k in g)] for mine, g in pairs]
        expected["param_groups"] = [{k: mine[k] for k in keys} for (mine, _), keys in zip(pairs, kept, strict=True)]
        given["param_groups"] = [{k: g[k] for k in keys if k in g} for (_, g), keys in zip(pairs, kept, strict=True)]
    problem = misfit(expected, given, "optimizer")
    for i, (mine, theirs) in enumerate(
        zip(expected["param_groups"], given["param_groups"], strict=True) if not problem else ()
    ):
        # no configuration changes the others
        for name in mine.keys() - {"lr", "initial_lr", "betas", "eps", "weight_decay"}:
            if mine[name] != theirs[name]:
                problem = f"optimizer.param_groups[{i}].{name}: expected {short(mine[name])}, got {short(theirs[name])}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")
