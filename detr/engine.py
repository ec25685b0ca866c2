"""Training: one run from a dataset to a run directory, interruptible at every step and resumed exactly."""

import contextlib
import itertools
import math
import platform
import sys
import time
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
from torch.utils.data import DataLoader

from detr import checkpoint, distributed
from detr.config import Config
from detr.data import CocoDataset, Split, TrainingStream, make_loader, seed_of
from detr.evaluate import STATS, coco_metrics, detect, per_class_table
from detr.losses import Criterion, at_least_one
from detr.model import build_model, param_groups
from detr.progress import progress
from detr.record import Record, image_ids, keep_batches, stop_on_signal, write_json
from detr.transforms import training_transform
from detr.visualize import draw_predictions, plot_curves

LOG_EVERY = 20  # optimiser steps that a line of metrics.jsonl averages
CHECKPOINT_SECONDS = 600  # a killed run loses no more than this
AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[Tensor, Tensor, list[dict[str, Any]]]  # of detr.data.collate


class TrainingError(ValueError):
    """A training that cannot go on; the message says at which step and why."""


class Trainer:
    """Model, optimiser, schedule and position of a run: `step` advances it, `state` continues it exactly on a CPU.

    With several processes (`detr.distributed`) each has a Trainer, and they step together.

    Args:
        workers: see `detr.data.make_loader`.
        fresh: False where `load_state` will follow: the backbone's pre-trained weights are not fetched.

    Raises:
        TrainingError: the batch cannot be divided among the processes, or the backend is not for this device.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, workers: int | None = None, fresh: bool = True
    ) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        if config.batch_size % (config.accumulate * self.world):
            raise TrainingError(
                f"batch_size: expected a multiple of {self.world} processes x {config.accumulate} accumulated batches, "
                f"got {config.batch_size}"
            )
        if config.backend == "inductor" and device.type != "cpu":
            raise TrainingError(f"backend: inductor is for CPUs, and this run is on {device}")
        torch.manual_seed(config.seed)
        self.config, self.split, self.device = config, split, device
        # the recipe of one size keeps the resized images in memory
        resize = (config.image_size, config.max_size) if config.augment == "tiny" else None
        self.dataset = CocoDataset(split, training_transform(config), resize)
        self.workers = workers
        pretrained = config.pretrained_backbone and fresh
        self.model = build_model(replace(config, pretrained_backbone=pretrained), len(split.class_names)).to(device)
        self.ema = AveragedModel(self.model, multi_avg_fn=_average(config.ema)) if config.ema else None
        self.replica = torch.compile(self.model, fullgraph=True, dynamic=True) if config.compile else self.model
        if self.world > 1:
            # without auxiliary losses the heads of the first layers get no gradient
            self.replica = DistributedDataParallel(
                self.replica,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
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
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.total_steps = config.steps or math.ceil(config.epochs * len(self.dataset) / config.batch_size)
        self.steps_done = 0
        self.best_ap = -1.0
        self.stale = 0  # evaluations since the best one
        self.skipped = 0  # steps in a row whose loss or gradient was not finite
        self.culprit = False  # the last such was made so by a batch of this process, as far as one can tell
        self.unreadable: list[str] = []  # messages, one for each image file
        self.stopping = False  # a process was asked to stop, and all know
        self.sums: Counter[str] = Counter()  # of the losses since the last line of metrics.jsonl
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
        """What this process computes in each step that remains: `accumulate` batches."""
        accumulate = self.config.accumulate
        size = self.config.batch_size // (accumulate * self.world)
        first, end = (steps * accumulate for steps in (self.steps_done, self.total_steps))
        indices = (range(b * size, (b + 1) * size) for b in range(first, end))
        stream = TrainingStream(self.dataset, self.config.seed, size, self.rank, self.world)
        loader = iter(make_loader(stream, indices, self.device, self.workers))
        while batches := list(itertools.islice(loader, accumulate)):
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
            [{name: target[name].to(self.device) for name in ("labels", "boxes")} for target in targets]
            for _, _, targets in batches
        ]
        counts = sum(self.criterion.counts(targets, self.config.n_queries) for targets in wanted).to(self.device)
        # gradients are added up over batches and averaged over processes
        counts = at_least_one(distributed.add_up(counts)) / self.world
        self.optimizer.zero_grad()
        losses = []
        for i, ((images, mask, _), targets) in enumerate(zip(batches, wanted, strict=True)):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.replica.no_sync():
                with self._autocast():
                    outputs = self.replica(images.to(self.device, non_blocking=True), mask.to(self.device))
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
        if math.isfinite(values["loss"] + values["grad_norm"]):
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

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.config.amp != "none"
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp] if enabled else None, enabled=enabled)

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

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a `state` that was read from `path`.

        Raises:
            CheckpointError: it is not of this model or not of this training set, or holds weights only.
        """
        if "optimizer" not in state:
            raise checkpoint.CheckpointError(f"{path}: optimizer: not in the file: only checkpoint.pt can be resumed")
        if state["train_images"] != len(self.dataset):
            raise checkpoint.CheckpointError(
                f"{path}: train_images: of another dataset: expected {len(self.dataset)}, got {state['train_images']}"
            )
        checkpoint.load_weights(self.model, state["model"], path)
        if self.ema:
            checkpoint.load_weights(self.ema.module, state["ema"], path)
            self.ema.n_averaged.fill_(state["ema_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("steps_done", "best_ap", "stale", "skipped"):
            setattr(self, name, state[name])
        self.unreadable = list(state["unreadable"])
        self.sums = Counter(state["sums"])


def _average(decay: float) -> Any:
    """Exponential average for AveragedModel; the decay grows to `decay`, or a short run would keep its first weights."""

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


def train(trainer: Trainer, val: DataLoader, out: Path, data: dict[str, Any]) -> dict[str, Any] | None:
    """Run `trainer` to its end and fill the run directory `out`.

    It then holds config.json (everything that the run was made from), metrics.jsonl, TensorBoard events, checkpoint.pt
    (the last state, to resume), best.pt (the weights with the best AP), eval.json, curves.png and predictions.png; and
    the batches of steps that were skipped, see `detr.record.keep_batches`.
    The first Ctrl-C or SIGTERM ends the run after the current step with a checkpoint; a second one ends it at once.

    Args:
        val: `detr.data.validation_loader` of the validation split.
        data: json values that config.json and the checkpoints keep: where the data is, and "wandb" if it is wanted.

    Returns:
        The final metrics (`detr.evaluate.coco_metrics`), or None if the run was interrupted.

    Raises:
        TrainingError: too many losses are not finite, or too many images cannot be read. CheckpointError: a checkpoint
        cannot be written.
    """
    main = distributed.is_main()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        classes = {str(i): name for i, name in trainer.split.categories.items()}
        description = {"config": trainer.config.to_dict(), "data": data, "classes": classes, "versions": versions}
        write_json(out / "config.json", description)
    record = Record(out, trainer.steps_done, data.get("wandb"), trainer.config.to_dict()) if main else None
    evaluated = None
    bar = progress(
        total=trainer.total_steps, initial=trainer.steps_done, desc="training", unit="step", disable=not main
    )
    with bar, contextlib.closing(record) if main else contextlib.nullcontext(), stop_on_signal() as stop:
        saved = mark = time.perf_counter()
        for batches in trainer.batches() if not trainer.finished else ():
            skipped = trainer.skipped
            loss = trainer.step(batches, stop=bool(stop))
            if trainer.skipped > skipped:
                _report_skipped(trainer, batches, loss, out)
            trainer.sums["seconds_per_step"] += time.perf_counter() - mark
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if trainer.steps_done % LOG_EVERY == 0 or trainer.finished:
                averages = trainer.pop_averages() | {"lr": trainer.optimizer.param_groups[0]["lr"]}
                if main:
                    record.write(trainer.steps_done, trainer.epoch, averages)
            evaluated = None
            if evaluation_is_due(trainer):
                evaluated = _, metrics, _ = _validate(trainer, val)
                trainer.stale += 1
                better = metrics["AP"] > trainer.best_ap
                if better:
                    trainer.best_ap, trainer.stale = metrics["AP"], 0
                if main:
                    row = {name: metrics[name] for name in STATS if metrics[name] is not None}
                    record.write(trainer.steps_done, trainer.epoch, row)
                    aps = f"step {trainer.steps_done}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}"
                    bar.write(aps, sys.stderr)
                if main and better:
                    checkpoint.save(out / "best.pt", trainer.weights() | {"metrics": metrics, "data": data})
            due = trainer.stopping or evaluated or time.perf_counter() - saved > CHECKPOINT_SECONDS
            if main and due:
                checkpoint.save(out / "checkpoint.pt", trainer.state() | {"data": data})
                saved = time.perf_counter()
            mark = time.perf_counter()
            if trainer.stopping or trainer.finished:
                break

    if main:
        plot_curves(out / "metrics.jsonl", out / "curves.png")
    if not trainer.finished:
        return None
    # a run that was killed after its last step has only this left to do
    detections, metrics, table = evaluated or _validate(trainer, val)
    metrics |= {"step": trainer.steps_done, "best_AP": trainer.best_ap}
    if main:
        write_json(out / "eval.json", metrics)
        draw_predictions(val.dataset.split, detections, metrics, out / "predictions.png")
        print(table, per_class_table(metrics), sep="\n")
    return metrics


def _report_skipped(trainer: Trainer, batches: list[Batch], loss: float, out: Path) -> None:
    """Keep the batches of a step that was skipped, and end the run if there were too many one after the other."""
    if trainer.culprit:
        keep_batches(out, trainer.steps_done, trainer.rank, batches, loss)
    ids = [i for each in distributed.gather(image_ids(batches) if trainer.culprit else []) for i in each]
    what = "the gradient of the loss" if math.isfinite(loss) else "the loss"
    message = f"step {trainer.steps_done}: {what} is not finite, on the images {ids}, see {out / 'nonfinite.jsonl'}"
    if trainer.skipped >= trainer.config.max_nonfinite:
        raise TrainingError(
            f"{message}; {trainer.skipped} such steps in a row: a lower lr, or amp bf16 or none, may help"
        )
    if distributed.is_main():
        warnings.warn(f"{message}; the step is skipped", stacklevel=2)


def evaluation_is_due(trainer: Trainer) -> bool:
    """After every `eval_steps` steps or `eval_every` epochs, and after the last step."""
    config, step = trainer.config, trainer.steps_done
    if trainer.finished:
        return True
    if config.eval_steps:
        return step % config.eval_steps == 0
    samples = config.eval_every * len(trainer.dataset)
    return step * config.batch_size // samples > (step - 1) * config.batch_size // samples


def _validate(trainer: Trainer, val: DataLoader) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any], str]:
    """Detections, metrics and their table: each process detects on its share of the images, the main one counts."""
    detections, unreadable = detect(trainer.evaluated_model, val, trainer.device)
    trainer.note_unreadable(unreadable)
    shares = distributed.gather_on_main(detections)
    detections = {image_id: found for share in shares or () for image_id, found in share.items()}
    return detections, *distributed.from_main(lambda: coco_metrics(val.dataset.split, detections))
