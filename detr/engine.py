"""A whole run: steps, evaluations and checkpoints, from a trainer to a full run directory."""

import contextlib
import json
import math
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detr import checkpoint, distributed, run_folder
from detr.evaluate import STATS, coco_metrics, detect, per_class_table
from detr.output import Folder
from detr.progress import progress
from detr.record import Record, image_ids, keep_batches, stop_on_signal
from detr.trainer import Batch, Trainer, TrainingError
from detr.visualize import draw_predictions, plot_curves

LOG_EVERY = 20  # optimiser steps that a line of metrics.jsonl averages
CHECKPOINT_SECONDS = 600  # a killed run loses no more than this


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
        TrainingError: too many losses are not finite, or too many images cannot be read. OutputError: a file cannot be
        written, or another than the run's is in its place (`detr.run_folder` sees to it that none is at the start).
    """
    main = distributed.is_main()
    if main:
        folder = Folder(out, run_folder.BY)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        classes = {str(i): name for i, name in trainer.split.categories.items()}
        description = {"config": trainer.config.to_dict(), "data": data, "classes": classes, "versions": versions}
        folder.write("config.json", _json(description))
    record = Record(folder, trainer.steps_done, data.get("wandb"), trainer.config.to_dict()) if main else None
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
                    checkpoint.save(out / "best.pt", trainer.weights() | {"metrics": metrics, "data": data}, folder)
            due = trainer.stopping or evaluated or time.perf_counter() - saved > CHECKPOINT_SECONDS
            if main and due:
                checkpoint.save(out / "checkpoint.pt", trainer.state() | {"data": data}, folder)
                saved = time.perf_counter()
            mark = time.perf_counter()
            if trainer.stopping or trainer.finished:
                break

    if main:
        folder.write("curves.png", plot_curves(out / "metrics.jsonl"))
    if not trainer.finished:
        distributed.wait()  # for the checkpoint
        return None
    # a run that was killed after its last step has only this left to do
    detections, metrics, table = evaluated or _validate(trainer, val)
    metrics |= {"step": trainer.steps_done, "best_AP": trainer.best_ap}
    if main:
        folder.write("eval.json", _json(metrics))
        folder.write("predictions.png", draw_predictions(val.dataset.split, detections, metrics))
        print(table, per_class_table(metrics), sep="\n")
    distributed.wait()
    return metrics


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _report_skipped(trainer: Trainer, batches: list[Batch], loss: float, out: Path) -> None:
    """Keep the batches of a step that was skipped, and end the run if there were too many one after the other."""
    images = trainer.split.named(image_ids(batches)) if trainer.culprit else []
    if trainer.culprit:
        keep_batches(out, trainer.steps_done, trainer.rank, batches, images, loss)
    ids = [i for each in distributed.gather(images) for i in each]
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
