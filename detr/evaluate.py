"""COCO average precision, with a table of each class: by faster-coco-eval if it is installed, else by pycocotools."""

import contextlib
import importlib.util
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr.config import MAX_DETS
from detr.model import DeformableDETR
from detr.postprocess import postprocess
from detr.progress import progress
from detr.split import LARGEST_AREA, Split
from detr.terminal import one_line

# COCOeval.stats in its order; -1 there means that no ground truth is of the kind
STATS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")

_PRINTING = threading.Lock()
EVALUATORS = {"faster-coco-eval": "faster_coco_eval", "pycocotools": "pycocotools"}  # name -> module


def detect(
    model: nn.Module, loader: DataLoader, device: torch.device, top_k: int = MAX_DETS
) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """Detections on the images of a loader, in float32.

    Returns:
        The `top_k` best of each image, by image id, on the CPU: see `detr.postprocess`. An image file that cannot be
        read has none, and a message in the list.
    """
    detections, unreadable = {}, []
    training = model.training
    model.eval()
    with torch.inference_mode():
        for images, mask, targets in progress(loader, desc="evaluating", leave=False, delay=2):
            outputs = model(images.to(device), mask.to(device))
            sizes = torch.stack([target["orig_size"] for target in targets]).to(device)
            for target, found in zip(targets, postprocess(outputs, sizes, top_k), strict=True):
                if "unreadable" in target:
                    unreadable += target["unreadable"]
                    found = {name: tensor[:0] for name, tensor in found.items()}
                detections[target["image_id"]] = {name: tensor.cpu() for name, tensor in found.items()}
    model.train(training)
    return detections, unreadable


def coco_metrics(
    split: Split,
    detections: dict[int, dict[str, Tensor]],
    evaluator: str | None = None,
    max_dets: int = MAX_DETS,
) -> tuple[dict[str, Any], str]:
    """Metrics of `detections` on `split`, and COCO's own table as text.

    Images, classes and annotations are numbered anew from 1: evaluators read ids as float64, exact up to 2^53, and
    pycocotools takes the annotation 0 for "not matched". Images without detections, and no detections at all, are fine.

    Args:
        detections: by image id, as `detect` gives them.
        evaluator: a key of EVALUATORS; None takes the first that is installed. Their metrics are the same.
        max_dets: most detections of an image; more must not be given.

    Returns:
        STATS by name, each a fraction or None where there is no ground truth of the kind; AR100 is AR300 for max_dets
        of 300. "per_class": name -> AP, AP50, boxes, and the score threshold with the best F1 at IoU 0.5 with its
        precision and recall.
    """
    # in the order of their ids, which decides between equal scores
    numbers = {image_id: i for i, image_id in enumerate(sorted(split.images.ids), start=1)}
    ground_truth, results = [], []
    for image in split.images:
        columns = (column.tolist() for column in (image.boxes, image.labels, image.areas, image.crowd))
        for box, label, area, crowd in zip(*columns, strict=True):
            ground_truth.append(
                _entry(numbers[image.image_id], label, box) | {"area": min(area, LARGEST_AREA), "iscrowd": int(crowd)}
            )
    for image_id, found in detections.items():
        columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
        for box, label, score in zip(*columns, strict=True):
            results.append(_entry(numbers[image_id], label, box) | {"iscrowd": 0, "score": score})

    COCO, COCOeval = _evaluator(evaluator)
    with _heard(COCO, COCOeval) as said:
        truth, found = (_coco(COCO, split, numbers, entries) for entries in (ground_truth, results))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = [min(n, max_dets) for n in (1, 10, max_dets)]
        evaluation.evaluate()
        evaluation.accumulate()
        said.clear()
        evaluation.print_function = said.append  # of faster-coco-eval, which would write its table to the log
        evaluation.summarize()
    # AR5, for 5 detections, is the recall at 10 and at 100 too
    allowed = {f"AR{n}": f"AR{min(n, max_dets) if n < MAX_DETS else max_dets}" for n in (1, 10, MAX_DETS)}
    names = (allowed.get(name, name) for name in STATS)
    metrics: dict[str, Any] = {name: _fraction(v) for name, v in zip(names, evaluation.stats, strict=False)}
    # [IoU thresholds, recall thresholds, classes, areas, detections allowed]: all areas, max_dets
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    scores = evaluation.eval["scores"][0, :, :, 0, -1]
    counts = np.bincount(split.images.labels[~split.images.crowd], minlength=len(split.class_names))
    text = "".join(f"{line}\n" for line in said)
    if max_dets != MAX_DETS and (precision > -1).any():
        # pycocotools looks for 100 in the first line, whatever it was told
        metrics["AP"] = float(precision[precision > -1].mean())
        text = text.replace("maxDets=100 ] = -1.000", f"maxDets={max_dets:>3d} ] = {metrics['AP']:0.3f}", 1)
    metrics["per_class"] = {}
    for k, name in enumerate(split.class_names):
        metrics["per_class"][name] = {
            "AP": _fraction(precision[:, :, k].mean()),
            "AP50": _fraction(precision[0, :, k].mean()),
            "boxes": int(counts[k]),
            **_best_f1(precision[0, :, k], scores[:, k], evaluation.params.recThrs),
        }
    return metrics, text


def evaluate(
    model: DeformableDETR, loader: DataLoader, device: torch.device, max_dets: int = MAX_DETS
) -> tuple[dict[str, Any], str]:
    """`coco_metrics` of a model on the split of `loader.dataset`, with the "images" and the "seconds" it took.

    The last line of the table says what `max_dets` leaves out, if anything: it is "left_out" in the metrics. Warns of
    each image file that cannot be read; they are "unreadable" in the metrics.
    """
    start = time.perf_counter()
    found, unreadable = detect(model, loader, device, max(max_dets, model.config.n_queries))
    for message in unreadable:
        warnings.warn(f"{message}; nothing is detected in it", stacklevel=2)
    detections = {image_id: {name: x[:max_dets] for name, x in each.items()} for image_id, each in found.items()}
    metrics, table = coco_metrics(loader.dataset.split, detections, max_dets=max_dets)
    more = [len(each["scores"]) - max_dets for each in found.values() if len(each["scores"]) > max_dets]
    if more:
        table += f"left out: {sum(more)} detections of {len(more)} images, those beyond the best {max_dets} of each"
        table += " (--max-dets counts more)\n"
    metrics |= {"max_dets": max_dets, "left_out": sum(more), "images": len(found), "unreadable": len(unreadable)}
    return metrics | {"seconds": round(time.perf_counter() - start, 3)}, table


def per_class_table(metrics: dict[str, Any]) -> str:
    """One line for each class: AP, AP50, boxes, best-F1 threshold."""
    rows = [f"{'class':<20} {'boxes':>7} {'AP':>6} {'AP50':>6} {'best F1':>8} {'at score':>9}"]
    for name, row in metrics["per_class"].items():
        numbers = (
            f"{'-' if row[key] is None else format(row[key], '.3f'):>{width}}"
            for key, width in (("AP", 6), ("AP50", 6), ("best_f1", 8), ("best_f1_threshold", 9))
        )
        rows.append(f"{one_line(name):<20} {row['boxes']:>7} {' '.join(numbers)}")
    return "\n".join(rows)


def _entry(number: int, label: int, box: list[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    return {
        "image_id": number,
        "category_id": label + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
    }


def _evaluator(name: str | None) -> tuple[Any, Any]:
    """The classes COCO and COCOeval of an evaluator."""
    if name is None:
        name = next(name for name, module in EVALUATORS.items() if importlib.util.find_spec(module))
    if name == "faster-coco-eval":
        import faster_coco_eval

        return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


@contextlib.contextmanager
def _heard(*classes: type) -> Iterator[list[str]]:
    """What the modules of these classes print goes to this list: standard output belongs to all threads, and stays."""
    said: list[str] = []
    modules = {sys.modules[each.__module__] for each in classes}
    with _PRINTING:
        for module in modules:
            module.print = said.append
        try:
            yield said
        finally:
            for module in modules:
                del module.print


def _coco(COCO: Any, split: Split, numbers: dict[int, int], annotations: list[dict[str, Any]]) -> Any:
    # loadRes of pycocotools fails on an empty list; an index made directly does not
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": numbers[image_id], "width": width, "height": height}
            for image_id, (width, height) in zip(split.images.ids, split.images.sizes.tolist(), strict=True)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(split.class_names, start=1)],
        "annotations": [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _fraction(value: float) -> float | None:
    return None if value < 0 else float(value)


def _best_f1(precision: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> dict[str, float | None]:
    """The score threshold with the best F1 on one precision-recall curve; None for a class without ground truth."""
    if precision.min() < 0:
        return {"best_f1": None, "best_f1_threshold": None, "precision": None, "recall": None}
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    return {
        "best_f1": float(f1[best]),
        "best_f1_threshold": float(scores[best]),
        "precision": float(precision[best]),
        "recall": float(recall[best]),
    }
