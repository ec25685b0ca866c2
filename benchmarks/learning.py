"""What a choice in the recipe of a small detector is worth: trained on one folder of images, with several seeds.

    python -m benchmarks.learning --data runs/large --steps 1000 --seeds 0 1 2 --threads 1 proposal_nms=1.0

A row of `results/learning.csv` for each seed; docs/learning.md has the tables. Fields are those of `detr.config`, and
`block`: batch-relu, group-silu or group-relu in place of what the small backbone is made of, batch-silu.
"""

import argparse
import csv
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from detr import backbone
from detr.config import Config
from detr.data import validation_loader
from detr.evaluate import coco_metrics, detect
from detr.pace import set_pace
from detr.presets import preset
from detr.run import Run
from detr.split import Split
from detr.splits import load_split

CSV = Path(__file__).parent / "results" / "learning.csv"
COLUMNS = (
    *("commit", "data", "model", "changes", "seed", "threads", "minutes", "steps", "seconds_per_step"),
    *("AP", "AP50", "AP75", "AP_nms", "AP_train", "duplicates", "detections_of_an_object", "torch"),
)
OF_TRAINING = 40  # training images that are evaluated too
EQUAL = 0.8  # IoU above which a detection is a duplicate of a better one
SUPPRESSED = 0.7  # IoU of the suppression that "AP nms" would have

Detections = dict[int, dict[str, Tensor]]


def duplicates(detections: Detections, thresholds: Tensor) -> float:
    """The part of the detections above their class's threshold [K] that repeat a better one of the class."""
    counted = repeated = 0
    for found in detections.values():
        shown = found["scores"] >= thresholds[found["labels"]]
        boxes, labels = found["boxes"][shown], found["labels"][shown]
        equal = (box_iou(boxes, boxes) > EQUAL) & (labels[:, None] == labels)
        counted += len(boxes)
        repeated += int(equal.triu(1).any(0).sum())
    return repeated / max(counted, 1)


def detections_of_each_object(detections: Detections, split: Split) -> float:
    """Detections above 0.3 of their image's best score that have an IoU of more than 0.5 to an object; the mean."""
    counts = []
    for image in split.images:
        found = detections[image.image_id]
        shown = found["scores"] >= 0.3 * found["scores"][:1]  # best first
        counts += (box_iou(image.boxes.float(), found["boxes"][shown]) > 0.5).sum(1).tolist()
    return sum(counts) / max(len(counts), 1)


def after_nms(detections: Detections) -> Detections:
    """What is left after non-maximum suppression of each class."""
    kept = {}
    for image_id, found in detections.items():
        best = batched_nms(found["boxes"], found["scores"], found["labels"], SUPPRESSED)
        kept[image_id] = {name: values[best] for name, values in found.items()}
    return kept


def block(kind: str) -> Callable[..., list[nn.Module]]:
    """What makes a convolution of the small backbone, with its norm and its activation by name."""
    norm, activation = kind.split("-")
    norms = {"batch": backbone.BatchNorm, "group": partial(nn.GroupNorm, 8)}
    activations = {"silu": nn.SiLU, "relu": nn.ReLU}

    def layers(before: int, after: int, stride: int = 1) -> list[nn.Module]:
        return [backbone._conv(before, after, stride), norms[norm](after), activations[activation](inplace=True)]

    return layers


def best_thresholds(metrics: dict) -> Tensor:
    """The score with the best F1 of each class [K]; infinite for a class that is never found."""
    return torch.tensor([row["best_f1_threshold"] or torch.inf for row in metrics["per_class"].values()])


def write_row(path: Path, row: dict) -> None:
    """Print a run, and add it to the table with what it was made by."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    row = {"commit": commit.strip()} | row | {"torch": torch.__version__}
    row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def train(config: Config, folder: Path, minutes: float | None) -> dict[str, float]:
    """Train and evaluate; the numbers of the row."""
    began = time.perf_counter()
    split, val = (load_split(folder, name) for name in ("train", "val"))
    device = torch.device("cpu")
    run = Run(config, split, device)
    loader = validation_loader(val, config, device)
    if minutes:
        print(set_pace(run, loader, minutes, began), flush=True)
    start = time.perf_counter()
    for batches in run.batches():
        run.step(batches)
    of_steps = time.perf_counter() - start
    found, _ = detect(run.learner.evaluated_model, loader, device)
    metrics, _ = coco_metrics(val, found)
    part = replace(split, images=split.images[:OF_TRAINING])
    seen, _ = detect(run.learner.evaluated_model, validation_loader(part, config, device), device)
    return {
        "steps": run.steps_done,
        "seconds_per_step": of_steps / run.steps_done,
        "AP": metrics["AP"],
        "AP50": metrics["AP50"],
        "AP75": metrics["AP75"],
        "AP_nms": coco_metrics(val, after_nms(found))[0]["AP"],
        "AP_train": coco_metrics(part, seen)[0]["AP"],
        "duplicates": duplicates(found, best_thresholds(metrics)),
        "detections_of_an_object": detections_of_each_object(found, val),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, help="optimiser steps (the preset's)")
    parser.add_argument("--minutes", type=float, help="as of `detr train`, without the time to import libraries")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    changes = {}
    for text in options.changes:
        field, _, value = text.partition("=")
        if field == "block":
            backbone._small = block(value)
            continue
        try:
            changes[field] = json.loads(value)
        except ValueError:
            changes[field] = value
    if options.steps:
        changes["steps"] = options.steps
    for seed in options.seeds:
        row = {"data": options.data.name, "model": options.preset, "changes": " ".join(options.changes)}
        row |= {"seed": seed, "threads": options.threads, "minutes": options.minutes or ""}
        row |= train(preset(options.preset, seed=seed, **changes), options.data, options.minutes)
        write_row(options.csv, row)


if __name__ == "__main__":
    main()
