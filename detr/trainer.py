"""The trainer: model, optimiser and position of a run, one optimiser step at a time."""

import contextlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr import checkpoint, distributed
from detr.config import Config
from detr.data import DetectionDataset, TrainingStream, make_loader, seed_of
from detr.errors import DataError, UserError
from detr.export import find_compiler
from detr.losses import Criterion, at_least_one, noised_boxes
from detr.model import build_model, param_groups
from detr.split import Split
from detr.transforms import early, training_transform
from msda_triton import ms_deform_attn

_MOST_PASSES = 100  # over the training images in one step: more is a slip, and may take hours
_WANTED = ("labels", "boxes", "noised")  # of a target, for the loss
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[Tensor, Tensor, list[dict[str, Any]]]  # of detr.data.collate


class TrainingError(UserError, ValueError):
    """A training that cannot go on; the message says at which step and why."""


class Trainer:
    """Model, optimiser, schedule and position of a run: `step` advances it, `state` continues it exactly on a CPU.

    With several processes (`detr.distributed`) each has a Trainer, and they step together.

    Args:
        workers: see `detr.data.make_loader`.
        fresh: False where `load_state` or other weights will follow: the backbone's pre-trained ones are not fetched.

    Raises:
        TrainingError: the batch cannot be divided among the processes, or is far larger than the training set; or the
            backend is not for this device.
        ConnectionError: the backbone's weights cannot be downloaded.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, workers: int | None = None, fresh: bool = True
    ) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        if config.batch_size % (max(1, config.accumulate) * self.world):
            accumulated = f" x {config.accumulate} accumulated batches" if config.accumulate else ""
            raise TrainingError(
                f"batch_size: expected a multiple of {self.world} processes{accumulated}, got {config.batch_size}"
            )
        most = _MOST_PASSES * len(split.images)
        if config.batch_size > most:
            raise TrainingError(
                f"batch_size: expected at most {most}, {_MOST_PASSES} times the {len(split.images)} training images, "
                f"got {config.batch_size}"
            )
        self.accumulate = config.accumulated_batches(self.world)
        _check_backend(config, device)
        torch.manual_seed(config.seed)
        self.config, self.split, self.device = config, split, device
        # the recipe of one size keeps the resized images in memory
        resize = (config.image_size, config.max_size) if config.augment != "official" else None
        self.dataset = DetectionDataset(split, training_transform(config), resize)
        self.workers = workers
        pretrained = config.pretrained_backbone and fresh
        self.model = build_model(replace(config, pretrained_backbone=pretrained), len(split.class_names)).to(device)
        self.ema = None
        if config.ema:
            # the running statistics of BatchNorm are averaged like the weights that they belong to
            self.ema = AveragedModel(self.model, multi_avg_fn=_average(config.ema), use_buffers=True)
        self.replica = torch.compile(self.model, fullgraph=True, dynamic=True) if config.compile else self.model
        if self.world > 1:
            with warnings.catch_warnings():
                # torch 2.14 renames broadcast_buffers, and older ones do not know the new name
                warnings.simplefilter("ignore", FutureWarning)
                self.replica = DistributedDataParallel(
                    self.replica,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    # without auxiliary losses the heads of the first layers get no gradient
                    find_unused_parameters=not config.aux_loss,
                )
        self.criterion = Criterion(config, len(split.class_names))
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, config),
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        norms = [module for module in self.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        self.statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.total_steps = config.steps or math.ceil(config.epochs * len(self.dataset) / config.batch_size)
        self.steps_done = 0
        self.best_ap = -1.0
        self.stale = 0  # evaluations since the best one
        self.skipped = 0  # steps in a row whose loss or gradient was not finite
        self.culprit = False  # this process's batch caused the last skipped step (best guess)
        self.unreadable: list[str] = []  # messages, one for each image file
        self.stopping = False  # a process was asked to stop, and all know
        self.sums: Counter[str] = Counter()  # of the losses since the last line of metrics.jsonl
        self._set_rates()

    def set_steps(self, steps: int) -> None:
        """Make the run so many steps long, and its schedule with it."""
        self.config, self.total_steps = replace(self.config, steps=steps), steps
        self._set_rates()

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.total_steps or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.stale

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.steps_done * self.config.batch_size / len(self.dataset)

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The averaged model if there is one."""
        return self.ema.module if self.ema else self.model

    def batches(self) -> Iterator[list[Batch]]:
        """What this process computes in each step that remains: `accumulate` batches.

        Raises:
            DataError: too many images one after the other cannot be read. TrainingError: a loader process died.
        """
        size = self.config.batch_size // (self.accumulate * self.world)
        first, end = (steps * self.accumulate for steps in (self.steps_done, self.total_steps))
        indices = (range(b * size, (b + 1) * size) for b in range(first, end))
        group = self.config.batch_size if self.config.shape_groups else 1
        stream = TrainingStream(
            self.dataset,
            self.config.seed,
            size,
            self.rank,
            self.world,
            group=group,
            early=early(self.config),
            denoising=self.config.denoising if self.config.two_stage else 0,
        )
        loader = iter(make_loader(stream, indices, self.device, self.workers))
        while True:
            try:
                batches = list(itertools.islice(loader, self.accumulate))
            except DataError as error:  # in a loader process: its message is a whole traceback, which ends with ours
                line = str(error).strip().splitlines()[-1]
                raise DataError(line.removeprefix(f"{DataError.__module__}.DataError: ")) from None
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                lines = str(error).strip().splitlines()
                text = lines[-1] if lines[0].startswith("Caught") else lines[0]  # the last of a traceback
                raise TrainingError(f"step {self.steps_done}: {text}; fewer --workers need less memory") from error
            if not batches:
                return
            yield batches

    def step(self, batches: list[Batch], stop: bool = False) -> float:
        """One optimiser step; the loss before it, over the batches of all processes.

        If the loss or its gradient is not finite, the weights are left as they were and `skipped` is one more; the step
        counts as done. An overflow of scaled float16 gradients is no such fault: the scale is halved.

        Args:
            stop: this process was asked to stop; `stopping` then says so to all of them.

        Raises:
            TrainingError: more image files than `config.max_unreadable` could not be read.
        """
        # dropout too is a function of seed and step
        torch.manual_seed(seed_of(self.config.seed, 2, self.steps_done, self.rank))
        wanted = [
            [{name: target[name].to(self.device) for name in _WANTED if name in target} for target in targets]
            for _, _, targets in batches
        ]
        counts = sum(self.criterion.counts(targets, self.config.n_queries) for targets in wanted).to(self.device)
        # gradients are added up over batches and averaged over processes
        counts = at_least_one(distributed.add_up(counts)) / self.world
        self.optimizer.zero_grad()
        before = [tensor.clone() for tensor in self.statistics]
        losses = []
        for i, ((images, mask, _), targets) in enumerate(zip(batches, wanted, strict=True)):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.replica.no_sync():
                images, mask = images.to(self.device, non_blocking=True), mask.to(self.device)
                with self._autocast():
                    outputs = self.replica(images, mask, noised_boxes(targets))
                total, terms = self.criterion(outputs, targets, counts)
                self.scaler.scale(total).backward()
            losses.append(torch.stack([total.detach(), *terms.values()]))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)

        unreadable = self._new_unreadable(batches)
        flags = torch.tensor([float(len(unreadable)), float(stop)], device=self.device)
        summary = distributed.add_up(torch.cat([sum(losses) / self.world, norm[None] / self.world, flags]))
        # one transfer from the device for all numbers
        *numbers, n_unreadable, stopping = summary.tolist()
        values = dict(zip(["loss", *terms, "grad_norm"], numbers, strict=True))
        self.stopping = stopping > 0
        overflow = self.scaler.is_enabled() and math.isfinite(values["loss"]) and self.scaler.get_scale() >= 1
        taken = math.isfinite(values["loss"] + values["grad_norm"])
        self._settle_statistics(before, taken)
        if taken:
            self.scaler.step(self.optimizer)
            if self.ema:
                self.ema.update_parameters(self.model)
            self.skipped = 0
            self.sums.update(values | {"count": 1})
        elif not overflow:
            self.skipped += 1
            self.culprit = math.isfinite(values["loss"]) or not math.isfinite(sum(losses)[0].item())
        self.scaler.update()
        self.steps_done += 1
        self._set_rates()
        if n_unreadable:
            self.note_unreadable(unreadable)
        return values["loss"] if math.isfinite(values["loss"]) else math.nan

    def _settle_statistics(self, before: list[Tensor], taken: bool) -> None:
        """Make the running statistics the means over all processes, or after a skipped step those from `before`."""
        values = self.statistics if taken else before
        if taken and self.statistics and self.world > 1:
            sizes = [len(tensor) for tensor in self.statistics]
            values = (distributed.add_up(torch.cat(self.statistics)) / self.world).split(sizes)
        for tensor, value in zip(self.statistics, values, strict=True):
            tensor.copy_(value)

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = AMP_DTYPES[self.config.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _set_rates(self) -> None:
        factor = lr_factor(self.steps_done, self.total_steps, self.config)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def _new_unreadable(self, batches: list[Batch]) -> list[str]:
        messages = (m for _, _, targets in batches for target in targets for m in target.get("unreadable", ()))
        return [message for message in dict.fromkeys(messages) if message not in self.unreadable]

    def note_unreadable(self, messages: list[str]) -> None:
        """Count image files that cannot be read, and name the new ones; to be called by all processes together.

        Raises:
            TrainingError: they are more than `config.max_unreadable`.
        """
        together = dict.fromkeys(message for each in distributed.gather(messages) for message in each)
        new = [message for message in together if message not in self.unreadable]
        self.unreadable += new
        if distributed.is_main():
            for message in new:
                warnings.warn(f"{message}; the training goes on without it", stacklevel=3)
        if len(self.unreadable) > self.config.max_unreadable:
            raise TrainingError(
                f"step {self.steps_done}: {len(self.unreadable)} image files cannot be read, and max_unreadable is "
                f"{self.config.max_unreadable}; the last: {self.unreadable[-1]}"
            )

    def pop_averages(self) -> dict[str, float]:
        """Mean losses and gradient norm of the steps since the last call that were not skipped."""
        count = self.sums.pop("count", 0)
        averages = {name: value / count for name, value in self.sums.items() if count}
        self.sums.clear()
        return averages

    def weights(self) -> dict[str, Any]:
        """What a checkpoint needs to be used: `detr.checkpoint.KEYS`. The weights are those that are evaluated."""
        return {
            "config": self.config.to_dict(),
            "class_names": self.split.class_names,
            "category_ids": self.split.category_ids,
            "model": self.evaluated_model.state_dict(),
            "averaged": self.ema is not None,
            "steps_done": self.steps_done,
        }

    def state(self) -> dict[str, Any]:
        """`weights` and everything else that the next steps depend on."""
        averages = {"ema": self.ema.module.state_dict(), "ema_steps": int(self.ema.n_averaged)} if self.ema else {}
        return (
            self.weights()
            | {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best_ap": self.best_ap,
                "stale": self.stale,
                "skipped": self.skipped,
                "unreadable": self.unreadable,
                "sums": dict(self.sums),
                "train_images": len(self.dataset),
            }
            | averages
        )

    def load_state(self, state: dict[str, Any], path: Path, other_data: bool = False) -> None:
        """Continue from a `state` that `checkpoint.load` read from `path`.

        Args:
            other_data: the training set may have another number of images than before.

        Raises:
            CheckpointError: it is not of this model or not of this training set, holds weights only, or a field of it
            is absent or wrong.
        """
        averages = ("ema", "ema_steps") if self.ema else ()
        position = ("steps_done", "best_ap", "stale", "skipped")
        names = ("optimizer", "scaler", "train_images", *position, "unreadable", "sums", *averages)
        checkpoint.require(state, names, path)
        if not other_data and state["train_images"] != len(self.dataset):
            raise checkpoint.CheckpointError(
                f"{path}: train_images: of another dataset: expected {len(self.dataset)}, got {state['train_images']}"
            )
        problem = checkpoint.misfit(self.scaler.state_dict(), state["scaler"], "scaler")
        if problem:
            raise checkpoint.CheckpointError(f"{path}: {problem}")
        checkpoint.check_optimizer(self.optimizer, state["optimizer"], path)
        # all of it before any of it is loaded
        checkpoint.check_weights(self.model, state["model"], path)
        if self.ema:
            checkpoint.check_weights(self.ema.module, state["ema"], path)
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in position:
            setattr(self, name, state[name])
        self.unreadable = list(state["unreadable"])
        self.sums = Counter(state["sums"])


def _check_backend(config: Config, device: torch.device) -> None:
    """Make sure that the attention's backend and torch.compile can work here.

    Raises:
        TrainingError: the backend is not for this device, or there is no C++ compiler.
    """
    if config.backend == "inductor" and device.type != "cpu":
        raise TrainingError(f"backend: inductor is for CPUs, and this run is on {device}")
    try:
        if device.type == "cpu" and (config.compile or config.backend == "inductor"):
            find_compiler("compile" if config.compile else "backend: 'inductor'")
        if config.backend == "triton":  # asked by a call without queries
            value, nothing = (torch.zeros(shape, device=device) for shape in ((1, 1, 1, 1), (1, 0, 1, 1, 1, 2)))
            ms_deform_attn(value, [(1, 1)], nothing, nothing[..., 0], backend="triton")
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _average(decay: float) -> Any:
    """Exponential average for AveragedModel; its decay grows to `decay`, for short runs."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        n = int(n)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n)

    return average


def lr_factor(step: int, total_steps: int, config: Config) -> float:
    """Factor on all learning rates before optimiser step `step` (from 0): linear warm-up, then `config.schedule`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return 1.0 if step < 0.8 * total_steps else 0.1
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
