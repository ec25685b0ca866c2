"""A training run: one object that owns all state of it, takes it step by step to its end, and writes what it finds."""

import contextlib
import itertools
import math
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr import checkpoint, distributed
from detr.config import Config
from detr.data import DetectionDataset, TrainingStream, make_loader, seed_of
from detr.devices import check_backend
from detr.errors import ArgumentError, CheckpointError, DataError, TrainingError
from detr.evaluate import coco_metrics, detect
from detr.learner import Batch, Learner, Step
from detr.model import build_model
from detr.progress import progress
from detr.record import image_ids, keep_batches, open_record
from detr.split import Split
from detr.transforms import early, training_transform

LOG_EVERY = 20  # optimiser steps that a line of metrics.jsonl averages
CHECKPOINT_SECONDS = 600  # a killed run loses no more than this
_MOST_PASSES = 100  # over the training images in one step: more is a slip, and may take hours
_POSITION = ("steps_done", "best_ap", "stale", "skipped")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the same on all processes, but for the detections, which the main one has."""

    detections: dict[int, dict[str, Tensor]]  # by image id, see `detr.evaluate.detect`
    metrics: dict[str, Any]  # see `detr.evaluate.coco_metrics`
    table: str


class Run:
    """A run: `step` takes it one optimiser step on, `train` to its end, and `state` continues it exactly on a CPU.

    With several processes (`detr.distributed`) each has a Run, and they step together.

    Args:
        split: of the training. workers: see `detr.data.make_loader`.
        initialise: gives the new model other weights than random ones; None leaves it as it is.

    Raises:
        ArgumentError: the batch cannot be divided among the processes, or is far larger than the training set; or the
            backend is not for this device. And what `initialise` raises.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        device: torch.device,
        workers: int | None = None,
        initialise: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        _check_batch(config, len(split.images), self.world)
        check_backend(config, device)
        self.accumulate = config.accumulated_batches(self.world)
        self.config, self.split, self.device, self.workers = config, split, device, workers
        # the recipe of one size keeps the resized images in memory
        resize = (config.image_size, config.max_size) if config.augment != "official" else None
        self.dataset = DetectionDataset(split, training_transform(config), resize)
        torch.manual_seed(config.seed)
        model = build_model(config, len(split.class_names))
        if initialise:
            initialise(model)
        self.learner = Learner(model.to(device), config)
        self.total_steps = config.steps or math.ceil(config.epochs * len(self.dataset) / config.batch_size)
        self.steps_done = 0
        self.best_ap = -1.0
        self.stale = 0  # evaluations since the best one
        self.skipped = 0  # steps in a row whose loss or gradient was not finite
        self.unreadable: list[str] = []  # messages, one for each image file
        self.sums: Counter[str] = Counter()  # of the losses since the last line of metrics.jsonl
        self._set_rates()

    def set_steps(self, steps: int, done: int = 0) -> None:
        """Make the run, which has not begun, so many steps long, and its schedule with it.

        Args:
            done: steps that it goes on as if it had made.
        """
        self.config, self.total_steps, self.steps_done = replace(self.config, steps=steps), steps, done
        self._set_rates()

    def _set_rates(self) -> None:
        self.learner.set_rates(lr_factor(self.steps_done, self.total_steps, self.config))

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
    def evaluation_is_due(self) -> bool:
        """After every `eval_steps` steps or `eval_every` epochs, and after the last step."""
        if self.finished:
            return True
        if self.config.eval_steps:
            return self.steps_done % self.config.eval_steps == 0
        before, now = (steps * self.config.batch_size for steps in (self.steps_done - 1, self.steps_done))
        samples = self.config.eval_every * len(self.dataset)
        return now // samples > before // samples

    def train(
        self, val: DataLoader, out: Path, data: dict[str, Any], stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Take the run to its end and fill the run directory `out`: see `detr.record.Record`.

        Args:
            val: `detr.data.validation_loader` of the validation split.
            data: json values that config.json and the checkpoints keep: where the data is, and "wandb" if it is wanted.
            stop: asked at the start and before each step; there True ends the run after the step, with a checkpoint.

        Returns:
            The last evaluation, or None if the run was stopped.

        Raises:
            TrainingError: too many losses are not finite, or too many images cannot be read. OutputError: a file cannot
            be written, or another than the run's is in its place (`detr.run_folder` sees to it that none is at first).
        """
        evaluation = None
        place = {"total": self.total_steps, "initial": self.steps_done, "disable": not distributed.is_main()}
        record = open_record(out, self.steps_done, self.config, data, self.split.categories)
        with progress(desc="training", unit="step", **place) as bar, contextlib.closing(record):
            stop()  # the first call may set signal handlers, which has to come before loader processes start
            saved = mark = time.perf_counter()
            for batches in self.batches():
                step = self.step(batches, stop())
                if step.skipped:
                    self._report_skipped(step, batches, out)
                self.sums["seconds_per_step"] += time.perf_counter() - mark
                bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
                bar.update()
                if self.steps_done % LOG_EVERY == 0 or self.finished:
                    rate = {"lr": self.learner.optimizer.param_groups[0]["lr"]}
                    record.write(self.steps_done, self.epoch, self.pop_averages() | rate)
                evaluation = self.evaluate(val) if self.evaluation_is_due else None
                if evaluation:
                    record.write_metrics(self.steps_done, self.epoch, evaluation.metrics)
                    if self._note_if_best(evaluation.metrics):
                        record.save("best.pt", self.weights() | {"metrics": evaluation.metrics, "data": data})
                if step.stop or evaluation or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    record.save("checkpoint.pt", self.state() | {"data": data})
                    saved = time.perf_counter()
                mark = time.perf_counter()
                if step.stop or self.finished:
                    break

        if self.finished:
            evaluation = evaluation or self.evaluate(
                val
            )  # a run that was killed after its last step has only this left
            evaluation.metrics.update({"step": self.steps_done, "best_AP": self.best_ap})
            record.finish(val.dataset.split, evaluation.detections, evaluation.metrics)
        else:
            evaluation = None
        record.draw_curves()
        distributed.wait()  # for the files
        return evaluation

    def batches(self) -> Iterator[list[Batch]]:
        """What this process computes in each step that remains: `accumulate` batches.

        Raises:
            DataError: too many images one after the other cannot be read. TrainingError: a loader process died.
        """
        if self.finished:
            return
        size = self.config.batch_size // (self.accumulate * self.world)
        first, end = (steps * self.accumulate for steps in (self.steps_done, self.total_steps))
        indices = (range(b * size, (b + 1) * size) for b in range(first, end))
        stream = TrainingStream(
            self.dataset,
            self.config.seed,
            size,
            self.rank,
            self.world,
            group=self.config.batch_size if self.config.shape_groups else 1,
            early=early(self.config),
            denoising=self.config.denoising if self.config.two_stage else 0,
        )
        loader = iter(make_loader(stream, indices, self.device, self.workers))
        while True:
            try:
                batches = list(itertools.islice(loader, self.accumulate))
            except DataError as error:  # in a loader process: its message is a whole traceback, which ends with ours
                raise DataError(str(error).rpartition(f"{DataError.__module__}.DataError: ")[2].strip()) from None
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                lines = str(error).strip().split("\n")
                text = lines[-1] if lines[0].startswith("Caught") else lines[0]  # the last of a traceback
                hint = "fewer --workers need less memory"
                if multiprocessing.get_start_method() != "fork":  # each process imports the script that started it
                    hint += ', and a script must call this below `if __name__ == "__main__":`'
                raise TrainingError(f"step {self.steps_done}: {text}; {hint}") from error
            if not batches:
                return
            yield batches

    def step(self, batches: list[Batch], stop: bool = False) -> Step:
        """One optimiser step. A step that is skipped, because its loss or gradient is not finite, counts as done.

        Args:
            stop: this process was asked to stop.

        Raises:
            TrainingError: more image files than `config.max_unreadable` could not be read.
        """
        # dropout too is a function of seed and step
        torch.manual_seed(seed_of(self.config.seed, 2, self.steps_done, self.rank))
        messages = (m for _, _, targets in batches for target in targets for m in target.get("unreadable", ()))
        unreadable = [message for message in dict.fromkeys(messages) if message not in self.unreadable]
        step = self.learner.step(batches, len(unreadable), stop)
        if step.taken:
            self.sums.update(step.values | {"count": 1})
        self.skipped = 0 if step.taken else self.skipped + step.skipped
        self.steps_done += 1
        self._set_rates()
        if step.unreadable:
            self.note_unreadable(unreadable)
        return step

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

    def evaluate(self, val: DataLoader) -> Evaluation:
        """Detections on `val` and their metrics: each process detects on a share of the images, the main one counts."""
        detections, unreadable = detect(self.learner.evaluated_model, val, self.device)
        self.note_unreadable(unreadable)
        shares = distributed.gather_on_main(detections)
        detections = {image_id: found for share in shares or () for image_id, found in share.items()}
        return Evaluation(detections, *distributed.from_main(lambda: coco_metrics(val.dataset.split, detections)))

    def _note_if_best(self, metrics: dict[str, Any]) -> bool:
        """Take an evaluation into `best_ap` and `stale`; whether it is better than all before."""
        better = metrics["AP"] > self.best_ap
        self.best_ap, self.stale = (metrics["AP"], 0) if better else (self.best_ap, self.stale + 1)
        return better

    def pop_averages(self) -> dict[str, float]:
        """Means since the last call, over the steps that were not skipped: losses, gradient norm, seconds per step.

        The seconds of skipped steps are shared out among the others.
        """
        count = self.sums.pop("count", 0)
        averages = {name: value / count for name, value in self.sums.items() if count}
        self.sums.clear()
        return averages

    def _report_skipped(self, step: Step, batches: list[Batch], out: Path) -> None:
        """Keep the batches of a step that was skipped, and end the run if there were too many one after the other."""
        images = self.split.named(image_ids(batches)) if step.culprit else []
        if step.culprit:
            keep_batches(out, self.steps_done, self.rank, batches, images, step.loss)
        ids = [i for each in distributed.gather(images) for i in each]
        what = "the gradient of the loss" if math.isfinite(step.loss) else "the loss"
        message = f"step {self.steps_done}: {what} is not finite, on the images {ids}, see {out / 'nonfinite.jsonl'}"
        if self.skipped >= self.config.max_nonfinite:
            raise TrainingError(
                f"{message}; {self.skipped} such steps in a row: a lower lr, or amp bf16 or none, may help"
            )
        if distributed.is_main():
            warnings.warn(f"{message}; the step is skipped", stacklevel=2)

    def weights(self) -> dict[str, Any]:
        """What a checkpoint needs to be used: `detr.checkpoint.KEYS`. The weights are those that are evaluated."""
        return {
            "config": self.config.to_dict(),
            "class_names": self.split.class_names,
            "category_ids": self.split.category_ids,
            "model": self.learner.evaluated_model.state_dict(),
            "averaged": self.learner.average is not None,
            "steps_done": self.steps_done,
        }

    def state(self) -> dict[str, Any]:
        """`weights` and everything else that the next steps depend on."""
        position = {name: getattr(self, name) for name in _POSITION}
        seen = {"unreadable": self.unreadable, "sums": dict(self.sums), "train_images": len(self.dataset)}
        return self.weights() | self.learner.state() | position | seen

    def load_state(self, state: dict[str, Any], path: Path, other_data: bool = False) -> None:
        """Continue from a `state` that `checkpoint.load` read from `path`.

        Args:
            other_data: the training set may have another number of images than before.

        Raises:
            CheckpointError: it is not of this model or not of this training set, holds weights only, or a field of it
            is absent or wrong.
        """
        checkpoint.require(state, ("optimizer", "scaler", "train_images", *_POSITION, "unreadable", "sums"), path)
        if not other_data and state["train_images"] != len(self.dataset):
            raise CheckpointError(
                f"{path}: train_images: of another dataset: expected {len(self.dataset)}, got {state['train_images']}"
            )
        self.learner.load_state(state, path)
        for name in _POSITION:
            setattr(self, name, state[name])
        self.unreadable = list(state["unreadable"])
        self.sums = Counter(state["sums"])


def _check_batch(config: Config, images: int, processes: int) -> None:
    if config.batch_size % (max(1, config.accumulate) * processes):
        accumulated = f" x {config.accumulate} accumulated batches" if config.accumulate else ""
        raise ArgumentError(
            f"batch_size: expected a multiple of {processes} processes{accumulated}, got {config.batch_size}"
        )
    most = _MOST_PASSES * images
    if config.batch_size > most:
        raise ArgumentError(
            f"batch_size: expected at most {most}, {_MOST_PASSES} times the {images} training images, "
            f"got {config.batch_size}"
        )


def lr_factor(step: int, total_steps: int, config: Config) -> float:
    """Factor on all learning rates before optimiser step `step` (from 0): linear warm-up, then `config.schedule`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return 1.0 if step < 0.8 * total_steps else 0.1
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
