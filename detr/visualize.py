"""The pictures of a run: learning curves, and ground truth beside detections."""

import io
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detr.errors import DataError
from detr.images import draw_boxes, read_image
from detr.labels import drawable_names
from detr.split import Split

_HEIGHT = 320  # pixels of every image in predictions.png
_GAP = 6


def plot_curves(rows: list[dict[str, float]]) -> bytes:
    """A PNG of losses, average precision and learning rate over the optimiser steps, from rows of metrics.jsonl."""
    panels = {
        "loss": (("loss", "loss_ce", "loss_bbox", "loss_giou"), "weighted loss"),
        "AP on val": (("AP", "AP50", "AP75"), "average precision"),
        "learning rate": (("lr",), "learning rate"),
    }
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axes, (title, (names, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, marker="." if len(points) < 30 else None, label=name)
        axes.set(title=title, xlabel="optimiser step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_yscale("log")
    figure.axes[1].set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_predictions(
    split: Split,
    detections: dict[int, dict[str, Tensor]],
    metrics: dict[str, Any],
    n_images: int = 8,
) -> bytes:
    """A PNG, a sheet of images spread over the split: ground truth at the left, detections at the right of each pair.

    In the place of an image that cannot be read is a grey one.
    Shown are detections above the threshold with the best F1 of their class (`detr.evaluate.coco_metrics`).
    """
    names = drawable_names(split.categories)
    thresholds = [metrics["per_class"][name]["best_f1_threshold"] or 0.5 for name in split.class_names]
    count = min(n_images, len(split.images))
    pairs = []
    for image in (split.images[i * len(split.images) // count] for i in range(count)):
        try:
            pixels = read_image(image.path, (image.width, image.height), split.reading)
        except DataError:
            pixels = Image.new("RGB", (image.width, image.height), "grey")
        scale = _HEIGHT / image.height
        pixels = pixels.resize((round(image.width * scale), _HEIGHT), Image.Resampling.BICUBIC)
        labels = image.labels.tolist()
        truth = draw_boxes(pixels, (image.boxes * scale).tolist(), labels, [names[label] for label in labels])
        found = detections[image.image_id]
        shown = [
            (box, label, names[label], score)
            for box, label, score in zip((found["boxes"] * scale).tolist(), *_lists(found), strict=True)
            if score >= thresholds[label]
        ]
        columns = map(list, zip(*shown, strict=True)) if shown else ([], [], [])
        pairs.append((truth, draw_boxes(pixels, *columns)))
    buffer = io.BytesIO()
    _sheet(pairs).save(buffer, "PNG")
    return buffer.getvalue()


def _lists(found: dict[str, Tensor]) -> tuple[list[int], list[float]]:
    return found["labels"].tolist(), found["scores"].tolist()


def _sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Two pairs a row, under the titles of their columns."""
    title_height = 24
    width = max(left.width for left, _ in pairs)
    columns = 4 if len(pairs) > 1 else 2
    rows = -(-2 * len(pairs) // columns)
    size = (columns * (width + _GAP), title_height + rows * (_HEIGHT + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        title = ("ground truth", "detections")[column % 2]
        draw.text((column * (width + _GAP) + 4, 4), title, fill="black", font=ImageFont.load_default(14))
    for i, picture in enumerate(picture for pair in pairs for picture in pair):
        row, column = divmod(i, columns)
        sheet.paste(picture, (column * (width + _GAP), title_height + row * (_HEIGHT + _GAP)))
    return sheet
