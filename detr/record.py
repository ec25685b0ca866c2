"""What a run writes: metrics, checkpoints and pictures; and batches that failed."""

import importlib.util
import json
import math
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from detr import checkpoint, distributed, run_folder
from detr.config import Config
from detr.evaluate import STATS
from detr.output import Folder, naming, write_whole
from detr.split import Split
from detr.visualize import draw_predictions, plot_curves

KEPT_BATCHES = 3  # of steps that were skipped; the ids of their images are noted for all


class Record:
    """The folder of a run, as it fills: everything but what `keep_batches` writes there.

    config.json (everything that the run was made from), metrics.jsonl, the same as TensorBoard events and to Weights &
    Biases if it is wanted, checkpoint.pt (the last state, to resume), best.pt (the weights with the best AP),
    eval.json, curves.png and predictions.png.

    Args:
        step: optimiser steps done; lines after it are forgotten, a killed run left them.
        data: what config.json keeps about the data; "wandb" in it is None, or "project" and "id" of the run there.
    """

    def __init__(self, out: Path, step: int, config: Config, data: dict[str, Any], classes: dict[int, str]) -> None:
        self.folder = Folder(out, run_folder.BY)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        names = {str(i): name for i, name in classes.items()}
        self._write("config.json", {"config": config.to_dict(), "data": data, "classes": names, "versions": versions})
        self.path = self.folder.own("metrics.jsonl")
        _forget_after(self.path, step)
        with naming(self.path):
            self.file = self.path.open("a")
            self.board = SummaryWriter(out, purge_step=step + 1)
        self.wandb, wanted = None, data.get("wandb")
        if wanted and not importlib.util.find_spec("wandb"):
            warnings.warn("the package wandb is not installed here: the run goes on without it", stacklevel=2)
        elif wanted:
            import wandb

            self.wandb = wandb.init(dir=out, name=out.name, config=config.to_dict(), resume="allow", **wanted)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def write(self, step: int, epoch: float, row: dict[str, float]) -> None:
        """A line of metrics.jsonl."""
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | row) + "\n")
            self.file.flush()
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)

    def write_metrics(self, step: int, epoch: float, metrics: dict[str, Any]) -> None:
        """The line of an evaluation, and one for people."""
        self.write(step, epoch, {name: metrics[name] for name in STATS if metrics[name] is not None})
        tqdm.write(f"step {step}: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}", sys.stderr)

    def save(self, name: str, content: dict[str, Any]) -> None:
        """A checkpoint."""
        checkpoint.save(self.folder.path / name, content, self.folder)

    def close(self) -> None:
        """No more lines."""
        with naming(self.path):
            self.file.close()
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def draw_curves(self) -> None:
        """The picture of metrics.jsonl."""
        self.folder.write("curves.png", plot_curves(metrics_of(self.path)))

    def finish(self, split: Split, detections: dict[int, dict[str, Tensor]], metrics: dict[str, Any]) -> None:
        """The last evaluation."""
        self._write("eval.json", metrics)
        self.folder.write("predictions.png", draw_predictions(split, detections, metrics))


class NoRecord:
    """In the place of a `Record` on all processes but the main one: it does nothing."""

    def write(self, *_: Any) -> None:
        pass

    write_metrics = save = close = draw_curves = finish = write


def open_record(*arguments: Any) -> Record | NoRecord:
    """A `Record` on the main process."""
    return Record(*arguments) if distributed.is_main() else NoRecord()


def _forget_after(metrics_path: Path, step: int) -> None:
    if metrics_path.exists():
        lines = metrics_path.read_bytes().splitlines(keepends=True)
        # a process that was killed may have left half a line
        whole_lines = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole_lines if (row := _row(line)) is None or row["step"] <= step]
        if kept != lines:
            write_whole(metrics_path, b"".join(kept))


def metrics_of(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; lines that are something else, because somebody wrote them, are left out."""
    return [row for line in path.read_bytes().splitlines() if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
        return row if type(row["step"]) is int and all(-1e300 < value < 1e300 for value in row.values()) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def keep_batches(
    out: Path,
    step: int,
    rank: int,
    batches: list[tuple[Tensor, Tensor, list[dict[str, Any]]]],
    images: list[int | str],
    loss: float,
) -> None:
    """Note the images of a step that was skipped in `out`/nonfinite.jsonl, and for the first of them keep the batches.

    A line holds step, rank, loss (null if it is not finite), image_ids, and the file with the images, masks and targets
    if they were kept: `torch.load` reads it.

    Args:
        images: what the dataset calls them, see `Split.named`.
    """
    folder = Folder(out, run_folder.BY)
    kept = out / f"nonfinite_step{step}_rank{rank}.pt"
    keep = len(list(out.glob("nonfinite_step*.pt"))) < KEPT_BATCHES and not os.path.lexists(kept)
    if keep:
        content = [{"images": images, "mask": mask, "targets": targets} for images, mask, targets in batches]
        with folder.whole(kept.name) as file:
            torch.save(content, file)
    line = {
        "step": step,
        "rank": rank,
        "loss": loss if math.isfinite(loss) else None,
        "image_ids": images,
        "file": kept.name if keep else None,
    }
    path = folder.own("nonfinite.jsonl")
    with naming(path), path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def image_ids(batches: list[tuple[Tensor, Tensor, list[dict[str, Any]]]]) -> list[int]:
    """Ids of all images in batches."""
    return [target["image_id"] for _, _, targets in batches for target in targets]
