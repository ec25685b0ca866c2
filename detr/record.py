"""What a run writes while it goes on: metrics to a file, TensorBoard and Weights & Biases; and batches that failed."""

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from detr.output import whole, write_whole

KEPT_BATCHES = 3  # of steps that were skipped; the ids of their images are noted for all


class Record:
    """The lines of metrics.jsonl, and the same as TensorBoard events and to Weights & Biases if it is wanted.

    Args:
        out: the run directory. step: optimiser steps done; lines after it are forgotten, a killed run left them.
        wandb: None, or the "project" and the "id" of the run there.
        config: what Weights & Biases shall know of the run.
    """

    def __init__(self, out: Path, step: int, wandb: dict[str, str] | None, config: dict[str, Any]) -> None:
        self.path = out / "metrics.jsonl"
        _forget_after(self.path, step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(out, purge_step=step + 1)
        self.wandb = None
        if wandb:
            import wandb as package  # `detr train --wandb` made sure that it is installed

            self.wandb = package.init(dir=out, name=out.name, config=config, resume="allow", **wandb)

    def write(self, step: int, epoch: float, row: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | row) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)

    def close(self) -> None:
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def _forget_after(metrics_path: Path, step: int) -> None:
    if metrics_path.exists():
        lines = metrics_path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (done := _step(line)) is not None and done <= step]
        if kept != lines:
            write_whole(metrics_path, b"".join(kept))


def _step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is broken, as a process that was killed leaves its last one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if type(step) is int and line.endswith(b"\n") else None


def keep_batches(
    out: Path, step: int, rank: int, batches: list[tuple[Tensor, Tensor, list[dict[str, Any]]]], loss: float
) -> None:
    """Note the images of a step that was skipped in `out`/nonfinite.jsonl, and for the first of them keep the batches.

    A line holds step, rank, loss (null if it is not finite), image_ids, and the file with the images, masks and targets
    if they were kept: `torch.load` reads it.
    """
    kept = out / f"nonfinite_step{step}_rank{rank}.pt"
    if len(list(out.glob("nonfinite_step*.pt"))) < KEPT_BATCHES:
        content = [{"images": images, "mask": mask, "targets": targets} for images, mask, targets in batches]
        with whole(kept) as file:
            torch.save(content, file)
    line = {
        "step": step,
        "rank": rank,
        "loss": loss if math.isfinite(loss) else None,
        "image_ids": image_ids(batches),
        "file": kept.name if kept.exists() else None,
    }
    with (out / "nonfinite.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def image_ids(batches: list[tuple[Tensor, Tensor, list[dict[str, Any]]]]) -> list[int]:
    """Raw ids of all images in batches."""
    return [target["image_id"] for _, _, targets in batches for target in targets]


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


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
