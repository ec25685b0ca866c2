"""A synthetic COCO-format dataset on disk: coloured shapes on textured backgrounds, deterministic by seed."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detr.output import Folder
from detr.progress import progress

BY = "detr synth"
CLASSES = ("disc", "square", "triangle", "star")
SMALLEST, LARGEST = 10 / 128, 60 / 128  # longest side of an object's box, as a fraction of the image's side
MAX_OBJECTS = 5
MIN_VISIBLE = 0.5  # objects that later ones cover more than this leaves are not annotated
MIN_CONTRAST = 60  # distance of an object's colour from the mean colour of the background, of 255 * sqrt(3)
_FINE = 4  # shapes are drawn at this multiple of the image's size: soft edges, boxes exact to a quarter of a pixel
_TRIES = 50


def write_dataset(root: Path, n_train: int = 2000, n_val: int = 200, size: int = 128, seed: int = 0) -> None:
    """Write `root`/instances_{train,val}.json and the JPEG files `root`/{train,val}/*.jpg.

    Image i of a split depends on (seed, split, i) alone. Objects have a side of 10 to 60 pixels at size 128 and in
    proportion at others, overlap, and are annotated by the box of what is visible of them.

    Args:
        n_train, n_val: images. size: width and height of every image, in pixels.

    Raises:
        OutputError: a file is in the way that an earlier call did not write.
    """
    folder = Folder(root, BY)
    counts = {"train": n_train, "val": n_val}
    folder.claim([f"instances_{name}.json" for name in counts])
    folder.claim(f"{name}/{i:06d}.jpg" for name, count in counts.items() for i in range(count))
    for split, (name, count) in enumerate(counts.items()):
        images, annotations = [], []
        for i in progress(range(count), desc=f"drawing {name}"):
            pixels, boxes, labels, areas = draw_image(np.random.default_rng((seed, split, i)), size)
            file_name = f"{i:06d}.jpg"
            jpeg = io.BytesIO()
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=90)
            folder.write(f"{name}/{file_name}", jpeg.getvalue())
            images.append({"id": i + 1, "file_name": file_name, "width": size, "height": size})
            for (x0, y0, x1, y1), label, area in zip(boxes, labels, areas, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": label + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        content = {
            "info": {"description": f"synthetic shapes, seed {seed}, split {name}"},
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        folder.write(f"instances_{name}.json", json.dumps(content).encode())


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[list[float]], list[int], list[float]]:
    """One image [size, size, 3] uint8 with its boxes (xyxy, pixels), labels (index into CLASSES) and visible areas."""
    canvas = _background(rng, size)
    mean_colour = canvas.mean((0, 1))
    owner = Image.new("L", (_FINE * size, _FINE * size))  # 1 + index of the object that is seen at each fine pixel
    labels, drawn_areas, fills = [], [], []
    for k in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        label = int(rng.integers(len(CLASSES)))
        corners = _place(rng, _shape(rng, CLASSES[label]), size)
        ImageDraw.Draw(owner).polygon([tuple(corner) for corner in corners * _FINE], fill=k + 1)
        labels.append(label)
        drawn_areas.append(int((np.asarray(owner) == k + 1).sum()))
        fills.append(_fill(rng, size, mean_colour))

    boxes, kept_labels, areas = [], [], []
    owner = np.asarray(owner)
    for k, (label, drawn_area, fill) in enumerate(zip(labels, drawn_areas, fills, strict=True), start=1):
        seen = owner == k
        coverage = np.asarray(Image.fromarray(seen.astype(np.uint8) * 255).reduce(_FINE))[..., None] / 255
        canvas = canvas * (1 - coverage) + fill * coverage
        if seen.sum() < MIN_VISIBLE * drawn_area:
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        boxes.append([float(v) / _FINE for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)])
        kept_labels.append(label)
        areas.append(float(seen.sum()) / _FINE**2)
    return canvas.clip(0, 255).astype(np.uint8), boxes, kept_labels, areas


def _shape(rng: np.random.Generator, name: str) -> np.ndarray:
    """Corners [n, 2] of a randomly turned and stretched shape around the origin."""
    count = {"disc": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angle = np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2, rng.uniform(0.4, 0.5), 1) if name == "star" else np.ones(count)
    corners = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))])
    return corners @ rotation * (1, rng.uniform(0.8, 1))


def _place(rng: np.random.Generator, corners: np.ndarray, size: int) -> np.ndarray:
    """The corners in pixels, scaled to a random side and moved to a random place inside the image."""
    low, extent = corners.min(0), np.ptp(corners, 0)
    side = rng.uniform(SMALLEST, LARGEST) * size
    scale = side / extent.max()
    return (corners - low) * scale + rng.uniform(0, size - extent * scale)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """[size, size, 3] float: two colours mixed by a cloud of several scales, stripes, and fine noise of every pixel."""
    cloud = np.zeros((size, size))
    for cells in (2, 4, 8, 16, 32):
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        cloud += (
            np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * rng.uniform(0.2, 1) / np.sqrt(cells)
        )
    y, x = np.mgrid[:size, :size] / size
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 20)
    stripes = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    mix = 1 / (1 + np.exp(-2 * cloud - rng.uniform(0, 1) * stripes))[..., None]
    first = rng.uniform(40, 215, 3)
    second = first + rng.uniform(-70, 70, 3)
    return first * mix + second * (1 - mix) + rng.normal(0, rng.uniform(2, 12), (size, size, 3))


def _fill(rng: np.random.Generator, size: int, background: np.ndarray) -> np.ndarray:
    """[size, size, 3]: a colour that can be told from the background's mean, with a gradient and noise."""
    colours = rng.uniform(20, 235, (_TRIES, 3))
    visible = np.linalg.norm(colours - background, axis=1) >= MIN_CONTRAST
    colour = colours[np.argmax(visible)]
    slope = rng.uniform(-40, 40, 2)
    y, x = np.mgrid[:size, :size] / size - 0.5
    return colour + (slope[0] * y + slope[1] * x)[..., None] + rng.normal(0, rng.uniform(2, 10), (size, size, 3))
