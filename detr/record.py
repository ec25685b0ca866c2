"""What a run writes while it goes on: metrics to a file, TensorBoard and Weights & Biases; and batches that failed."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from detr import run_folder
from detr.output import Folder, naming, write_whole

KEPT_BATCHES = 3  # of steps that were skipped; the ids of their images are noted for all


class Record:
    """The lines of metrics.jsonl, and the same as TensorBoard events and to Weights & Biases if it is wanted.

    Args:
        folder: of the run. step: optimiser steps done; lines after it are forgotten, a killed run left them.
        wandb: None, or the "project" and the "id" of the run there.
        config: what Weights & Biases shall know of the run.
    """

    def __init__(self, folder: Folder, step: int, wandb: dict[str, str] | None, config: dict[str, Any]) -> None:
        self.path = folder.own("metrics.jsonl")
        _forget_after(self.path, step)
        with naming(self.path):
            self.file = self.path.open("a")
            self.board = SummaryWriter(folder.path, purge_step=step + 1)
        self.wandb = None
        if wandb and not importlib.util.find_spec("wandb"):
            warnings.warn("the package wandb is not installed here: the run goes on without it", stacklevel=2)
        elif wandb:
            import wandb as package

            self.wandb = package.init(dir=folder.path, name=folder.path.name, config=config, resume="allow", **wandb)

    def write(self, step: int, epoch: float, row: dict[str, float]) -> None:
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | row) + "\n")
            self.file.flush()
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
            self.board.close()
        if self.wandb:
            self.wandb.finish()


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
