"""Synthetic COCO-format datasets on disk, deterministic by seed: small coloured shapes, or large animals."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detr.output import Folder
from detr.progress import progress

BY = "detr synth"
CLASSES = ("disc", "square", "triangle", "star")
ANIMALS = ("animal",)  # the one class of the large set
SMALLEST, LARGEST = 10 / 128, 60 / 128  # longest side of an object's box, as a fraction of the image's side
MAX_OBJECTS = 5
ANIMAL_SIDES = 0.25, 1.2  # longest side of an animal's box, as a fraction of the image's, before the border cuts it
MUTED = 0.25  # the part of their colour that the large set's pictures keep
MIN_VISIBLE = 0.5  # objects that later ones cover more than this leaves are not annotated
MIN_CONTRAST = 60  # distance of an object's colour from the mean colour of the background, of 255 * sqrt(3)
_FINE = 4  # shapes are drawn at this multiple of the image's size: soft edges, boxes exact to a quarter of a pixel
_TRIES = 50


def write_dataset(
    root: Path, n_train: int = 2000, n_val: int = 200, size: int = 128, seed: int = 0, large: bool = False
) -> None:
    """Write `root`/instances_{train,val}.json and the JPEG files `root`/{train,val}/*.jpg.

    Image i of a split depends on (seed, split, i) alone. Shapes have a side of 10 to 60 pixels at size 128 and in
    proportion at others, large animals one of a quarter of the image to more than all of it. Objects overlap, and are
    annotated by the box of what is visible of them.

    Args:
        n_train, n_val: images. size: width and height of every image, in pixels.
        large: one class of objects that fill up to the whole image, as in photographs of one kind of animal.

    Raises:
        OutputError: a file is in the way that an earlier call did not write.
    """
    folder = Folder(root, BY)
    counts = {"train": n_train, "val": n_val}
    draw, classes, what = (draw_large, ANIMALS, "animals") if large else (draw_image, CLASSES, "shapes")
    folder.claim([f"instances_{name}.json" for name in counts])
    folder.claim(f"{name}/{i:06d}.jpg" for name, count in counts.items() for i in range(count))
    for split, (name, count) in enumerate(counts.items()):
        images, annotations = [], []
        for i in progress(range(count), desc=f"drawing {name}"):
            pixels, boxes, labels, areas = draw(np.random.default_rng((seed, split, i)), size)
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
            "info": {"description": f"synthetic {what}, seed {seed}, split {name}"},
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(classes)],
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
        _polygon(owner, _place(rng, _shape(rng, CLASSES[label]), size), k + 1)
        labels.append(label)
        drawn_areas.append(int((np.asarray(owner) == k + 1).sum()))
        fills.append(_fill(rng, size, mean_colour))
    return _finish(canvas, np.asarray(owner), labels, drawn_areas, fills)


def draw_large(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[list[float]], list[int], list[float]]:
    """As `draw_image`: one to three animals, most of them large, before shapes that are not annotated."""
    canvas = _muted(rng, size)
    for _ in range(int(rng.integers(6))):
        canvas = _paint(canvas, _parts([_clutter(rng, size)], size) > 0, _muted(rng, size))
    owner = np.zeros((_FINE * size, _FINE * size), np.uint8)
    drawn_areas, fills = [], []
    for k in range(1 + int(rng.choice(3, p=(0.85, 0.1, 0.05)))):
        parts = _placed_animal(rng, size)
        coat, patches = _muted(rng, size), _muted(rng, size)
        patched, shade = np.zeros((2, 1 + len(parts)), np.float32)
        for i in range(len(parts)):  # each a little lighter or darker, so that its outline is seen
            patched[1 + i], shade[1 + i] = rng.random() < 0.3, rng.uniform(-25, 25)
        part = _parts(parts, size)
        mix = _coarse(patched[part])
        owner[part > 0] = k + 1
        drawn_areas.append(int((part > 0).sum()))
        fills.append(coat * (1 - mix) + patches * mix + _coarse(shade[part]))
    labels: list[int | None] = [0] * len(fills)
    if rng.random() < 0.5:  # something stands before them
        before = _parts([_clutter(rng, size)], size) > 0
        labels.append(None)
        owner[before] = len(labels)
        drawn_areas.append(int(before.sum()))
        fills.append(_muted(rng, size))
    return _finish(canvas, owner, labels, drawn_areas, fills)


def _clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """Corners of some shape, in pixels."""
    corners = _shape(rng, CLASSES[int(rng.integers(len(CLASSES)))])
    return corners / np.ptp(corners, 0).max() * rng.uniform(0.1, 0.6) * size + rng.uniform(0, size, 2)


def _muted(rng: np.random.Generator, size: int) -> np.ndarray:
    """A texture with a quarter of its colour: objects cannot be told by their colour alone."""
    picture = _background(rng, size)
    grey = picture.mean(2, keepdims=True)
    return grey + MUTED * (picture - grey)


def _finish(
    canvas: np.ndarray, owner: np.ndarray, labels: list[int | None], drawn_areas: list[int], fills: list[np.ndarray]
) -> tuple[np.ndarray, list[list[float]], list[int], list[float]]:
    """The image, boxes, labels and areas of what `owner` says where it is seen; without a label it has no box."""
    boxes, kept_labels, areas = [], [], []
    for k, (label, drawn_area, fill) in enumerate(zip(labels, drawn_areas, fills, strict=True), start=1):
        seen = owner == k
        canvas = _paint(canvas, seen, fill)
        if label is None or seen.sum() < MIN_VISIBLE * drawn_area:
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        boxes.append([float(v) / _FINE for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)])
        kept_labels.append(label)
        areas.append(float(seen.sum()) / _FINE**2)
    return canvas.clip(0, 255).astype(np.uint8), boxes, kept_labels, areas


def _paint(canvas: np.ndarray, seen: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """`canvas` [size, size, 3] with `fill` where the fine pixels `seen` are, with soft edges."""
    coverage = np.asarray(Image.fromarray(seen.astype(np.uint8) * 255).reduce(_FINE))[..., None] / 255
    return canvas * (1 - coverage) + fill * coverage


def _coarse(fine: np.ndarray) -> np.ndarray:
    """[size, size, 1]: means of the fine pixels."""
    return np.asarray(Image.fromarray(fine.astype(np.float32)).reduce(_FINE))[..., None]


def _polygon(image: Image.Image, corners: np.ndarray, fill: int) -> None:
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners * _FINE], fill=fill)


def _parts(polygons: list[np.ndarray], size: int) -> np.ndarray:
    """1 + the index of the last polygon that holds each fine pixel, or 0; corners are in pixels of the image."""
    image = Image.new("L", (_FINE * size, _FINE * size))
    for i, corners in enumerate(polygons, start=1):
        _polygon(image, corners, i)
    return np.asarray(image)


def _placed_animal(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    """Parts of an animal in pixels: it may be cut off at the borders, but most of it lies inside."""
    parts = _animal(rng)
    corners = np.concatenate(parts)
    low, extent = corners.min(0), np.ptp(corners, 0)
    side = ANIMAL_SIDES[0] + (ANIMAL_SIDES[1] - ANIMAL_SIDES[0]) * rng.random() ** 0.7
    scale = side * size / extent.max()
    room = size - extent * scale
    margin = 0.15 * extent * scale  # this much may be outside
    place = rng.uniform(np.minimum(-margin, room), np.maximum(room + margin, 0))
    return [(part - low) * scale + place for part in parts]


def _animal(rng: np.random.Generator) -> list[np.ndarray]:
    """Parts [n, 2] (x to the right, y down) of an animal: tail, legs, body, head, ears and eyes, in a random pose."""
    length, height = 1.0, rng.uniform(0.35, 0.6)
    body = _ellipse((0, 0), (length, height))
    legs = []
    for x in rng.uniform((-0.85, -0.6, 0.35, 0.6), (-0.6, -0.35, 0.6, 0.85)):
        swing, leg, width = rng.uniform(-0.35, 0.35), rng.uniform(0.5, 0.9), rng.uniform(0.09, 0.15)
        top, foot = np.array((x, height * 0.4)), np.array((x + swing, height * 0.4 + leg))
        side = np.array((width, 0))
        legs.append(np.array([top - side, top + side, foot + side, foot - side]))
    neck, up = rng.uniform(0.7, 1.05), rng.uniform(-0.9, 0.1)
    skull = rng.uniform(0.28, 0.42)
    head = np.array((neck, up))
    throat = np.array(
        [
            (0.5, -height * 0.6),
            (0.9, height * 0.3),
            head + skull * np.array((0.4, 0.7)),
            head - skull * np.array((0.6, 0.5)),
        ]
    )
    ears = []
    for x in (-0.6, 0.5):
        tip = head + skull * np.array((x + rng.uniform(-0.3, 0.3), -1.3 - rng.uniform(0, 0.7)))
        ears.append(
            np.array([head + skull * np.array((x - 0.35, -0.6)), tip, head + skull * np.array((x + 0.35, -0.6))])
        )
    eyes = [_ellipse(head + skull * np.array((x, -0.15)), (skull * 0.13, skull * 0.16)) for x in (-0.25, 0.4)]
    nose = _ellipse(head + skull * np.array((0.3, 0.4)), (skull * 0.25, skull * 0.18))
    bend = rng.uniform(-0.8, 0.6, 2)
    spine = np.array([(-0.9, -0.1), (-1.3, -0.1 + bend[0] * 0.5), (-1.5, -0.1 + bend.sum())])
    tail = np.concatenate([spine - np.array((0, 0.08)), spine[::-1] + np.array((0, 0.05))])
    parts = [tail, *legs, throat, body, *ears, _ellipse(head, (skull, skull * rng.uniform(0.8, 1.1))), *eyes, nose]
    turn = rng.normal(0, 0.5)
    rotation = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    shorter = (rng.choice((-1, 1)) * rng.uniform(0.3, 1), 1)  # seen more or less from the front, to either side
    return [part * shorter @ rotation for part in parts]


def _ellipse(centre: np.ndarray | tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    angle = np.arange(48) * 2 * np.pi / 48
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radii + centre


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
