"""Training: one run from a dataset to a run directory, interruptible at every step and resumed exactly."""

import contextlib
import json
import math
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from detr import checkpoint
from detr.config import Config
from detr.data import CocoDataset, Split, TrainingStream, make_loader
from detr.evaluate import STATS, coco_metrics, detect, per_class_table
from detr.losses import Criterion
from detr.model import build_model, param_groups
from detr.progress import progress
from detr.transforms import training_transform
from detr.visualize import draw_predictions, plot_curves

LOG_EVERY = 20  # optimiser steps that a line of metrics.jsonl averages
CHECKPOINT_SECONDS = 600  # a killed run loses no more than this


class TrainingError(ValueError):
    """A training that cannot go on; the message says at which step and why."""


class Trainer:
    """Model, optimiser, schedule and position of a run: `step` advances it, `state` continues it exactly on a CPU.

    Args:
        workers: see `detr.data.make_loader`.
        fresh: False where `load_state` will follow: the backbone's pre-trained weights are not fetched.
    """

    def __init__(
        self, config: Config, split: Split, device: torch.device, workers: int | None = None, fresh: bool = True
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.split, self.device = config, split, device
        # the recipe of one size keeps the resized images in memory
        resize = (config.image_size, config.max_size) if config.augment == "tiny" else None
        self.dataset = CocoDataset(split, training_transform(config), resize)
        self.workers = workers
        pretrained = config.pretrained_backbone and fresh
        self.model = build_model(replace(config, pretrained_backbone=pretrained), len(split.class_names)).to(device)
        self.criterion = Criterion(config, len(split.class_names))
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, config),
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.total_steps = config.steps or math.ceil(config.epochs * len(self.dataset) / config.batch_size)
        self.scheduler = LambdaLR(self.optimizer, lambda step: lr_factor(step, self.total_steps, config))
        self.steps_done = 0
        self.best_ap = -1.0
        self.sums: Counter[str] = Counter()  # of the losses since the last line of metrics.jsonl

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.steps_done * self.config.batch_size / len(self.dataset)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Any]]]]:
        """The batches of all steps that remain."""
        batch_size = self.config.batch_size
        samples = range(self.steps_done * batch_size, self.total_steps * batch_size)
        stream = TrainingStream(self.dataset, self.config.seed)
        return iter(make_loader(stream, self.config.batch_size, self.device, self.workers, samples))

    def step(self, batch: tuple[Tensor, Tensor, list[dict[str, Any]]]) -> float:
        """One optimiser step; the loss before it.

        Raises:
            TrainingError: the loss or its gradient is not finite; the model is left as it was.
        """
        images, mask, targets = batch
        outputs = self.model(images.to(self.device), mask.to(self.device))
        wanted = [{name: target[name].to(self.device) for name in ("labels", "boxes")} for target in targets]
        total, terms = self.criterion(outputs, wanted)
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        terms = {"loss": total.detach(), "grad_norm": norm, **terms}
        # one transfer from the device for all numbers
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                ids = [target["image_id"] for target in targets]
                raise TrainingError(f"step {self.steps_done + 1}: {name} is {values[name]}, on the images {ids}")
        self.optimizer.step()
        self.scheduler.step()
        self.steps_done += 1
        self.sums.update(values | {"count": 1})
        return values["loss"]

    def pop_averages(self) -> dict[str, float]:
        """Mean losses and gradient norm of the steps since the last call."""
        count = self.sums.pop("count")
        averages = {name: value / count for name, value in self.sums.items()}
        self.sums.clear()
        return averages

    def weights(self) -> dict[str, Any]:
        """What a checkpoint needs to be used: `detr.checkpoint.KEYS`."""
        return {
            "config": self.config.to_dict(),
            "class_names": self.split.class_names,
            "category_ids": self.split.category_ids,
            "model": self.model.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """`weights` and everything else that the next steps depend on."""
        return self.weights() | {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps_done": self.steps_done,
            "best_ap": self.best_ap,
            "sums": dict(self.sums),
            "train_images": len(self.dataset),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps_done, self.best_ap = state["steps_done"], state["best_ap"]
        self.sums = Counter(state["sums"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])


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
    (the last state, to resume), best.pt (the weights with the best AP), eval.json, curves.png and predictions.png.
    The first Ctrl-C or SIGTERM ends the run after the current step with a checkpoint; a second one ends it at once.

    Args:
        val: `detr.data.validation_loader` of the validation split.
        data: json values that config.json and the checkpoints keep: where the data is.

    Returns:
        The final metrics (`detr.evaluate.coco_metrics`), or None if the run was interrupted.

    Raises:
        TrainingError: a loss is not finite. CheckpointError: a checkpoint cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics_path = out / "metrics.jsonl"
    _forget_after(metrics_path, trainer.steps_done)
    _write_json(
        out / "config.json",
        {
            "config": trainer.config.to_dict(),
            "data": data,
            "classes": {str(i): name for i, name in trainer.split.categories.items()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )
    evaluated = None
    bar = progress(total=trainer.total_steps, initial=trainer.steps_done, desc="training", unit="step")
    with bar, metrics_path.open("a") as log, stop_on_signal() as stop:
        board = SummaryWriter(out, purge_step=trainer.steps_done + 1)
        saved = mark = time.perf_counter()
        for batch in trainer.batches():
            loss = trainer.step(batch)
            trainer.sums["seconds_per_step"] += time.perf_counter() - mark
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if trainer.steps_done % LOG_EVERY == 0 or trainer.finished:
                _record(log, board, trainer, trainer.pop_averages() | {"lr": trainer.scheduler.get_last_lr()[0]})
            evaluated = None
            if evaluation_is_due(trainer):
                evaluated = _validate(trainer, val)
                _, metrics, _ = evaluated
                _record(log, board, trainer, {name: metrics[name] for name in STATS if metrics[name] is not None})
                bar.write(f"step {trainer.steps_done}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}", sys.stderr)
                if metrics["AP"] > trainer.best_ap:
                    trainer.best_ap = metrics["AP"]
                    checkpoint.save(out / "best.pt", trainer.weights() | {"data": data})
            if stop or evaluated or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                checkpoint.save(out / "checkpoint.pt", trainer.state() | {"data": data})
                saved = time.perf_counter()
            mark = time.perf_counter()
            if stop:
                break
        board.close()

    plot_curves(metrics_path, out / "curves.png")
    if not trainer.finished:
        return None
    # a run that was killed after its last step has only this left to do
    detections, metrics, table = evaluated or _validate(trainer, val)
    metrics |= {"step": trainer.steps_done, "best_AP": trainer.best_ap}
    _write_json(out / "eval.json", metrics)
    draw_predictions(val.dataset.split, detections, metrics, out / "predictions.png")
    print(table, per_class_table(metrics), sep="\n")
    return metrics


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
    detections = detect(trainer.model, val, trainer.device)
    return detections, *coco_metrics(val.dataset.split, detections)


def _record(log: TextIO, board: SummaryWriter, trainer: Trainer, row: dict[str, float]) -> None:
    log.write(json.dumps({"step": trainer.steps_done, "epoch": round(trainer.epoch, 4)} | row) + "\n")
    log.flush()
    for name, value in row.items():
        board.add_scalar(name, value, trainer.steps_done)


def _forget_after(metrics_path: Path, step: int) -> None:
    """Drop the lines of steps that a killed run made after its last checkpoint."""
    if metrics_path.exists():
        lines = metrics_path.read_text().splitlines(keepends=True)
        # a line that was cut short has no end
        whole = (line for line in lines if line.endswith("\n"))
        metrics_path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes, and then holds its number; a second one acts as ever."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
