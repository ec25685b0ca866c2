"""Detection on image files: a picture with boxes for each, and one json."""

import glob
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from detr import run_folder
from detr.config import Config
from detr.data import collate
from detr.images import (
    DEEP,
    DEFAULT_READING,
    SUFFIXES,
    DataError,
    Reading,
    draw_boxes,
    read_header,
    read_image,
    to_tensor,
)
from detr.output import Folder, Written, picture_of
from detr.postprocess import postprocess
from detr.progress import progress
from detr.transforms import evaluation_transform, resize

BY = "detr predict"
RESULTS = "predictions.json"


def find_images(inputs: list[str]) -> list[tuple[Path, Path]]:
    """The image files that `inputs` name, each with a relative path to write it to.

    An input is an image, a folder, a glob pattern, or a text file (.txt) with one of these on each line. In folders and
    patterns the pictures that `detr predict` and `detr train` wrote are left out, with a warning.

    Raises:
        DataError: an input names nothing, or two images would be written to one file.
    """
    found: dict[Path, Path] = {}
    written = Written()
    for text in inputs:
        path, own = Path(text), []
        if path.suffix == ".txt" and path.is_file():
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            pairs = find_images(lines)
        elif path.exists() and not path.is_dir():
            pairs = [(path, Path(path.name))]
        else:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
                pairs = [(p, p.relative_to(path)) for p in inside]
            else:
                pairs = [(Path(name), Path(Path(name).name)) for name in sorted(glob.glob(text, recursive=True))]
            own = [source for source, _ in pairs if written.by(source) in (BY, run_folder.BY)]
            left_out = set(own)
            pairs = [pair for pair in pairs if pair[0] not in left_out]
        if own:
            warnings.warn(f"{text}: left out {len(own)} pictures that detr wrote, the first: {own[0]}", stacklevel=2)
        if not pairs:
            raise DataError(f"{text}: expected an image, a folder of images or a pattern, found no image")
        for source, target in pairs:
            if found.setdefault(target, source) != source:
                raise DataError(f"{source}: {found[target]} has the same name; predict them one after the other")
    return [(source, target) for target, source in found.items()]


def load_pixels(picture: Image.Image, config: Config) -> Tensor:
    """The image [3, H, W] that the model of `config` sees."""
    pixels = resize(to_tensor(picture), config.image_size, config.max_size)
    return evaluation_transform()(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))[0]


def predict(
    model: nn.Module,
    config: Config,
    categories: dict[int, str],
    images: list[tuple[Path, Path]],
    out: Path,
    threshold: float,
    device: torch.device,
    batch_size: int = 1,
    reading: Reading = DEFAULT_READING,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write `out`/<picture with boxes> for each image and `out`/predictions.json with the detections of all.

    Args:
        categories: raw id -> name, in the order of labels. images: as from `find_images`.
        threshold: score in [0, 1] below which detections are left out.
        batch_size: most images that the model gets at a time. They are of one size in the model, so that none is padded
            and none changes the detections of another.

    Returns:
        The content of the json: for each image file, width, height and detections (category_id, name, score, bbox as
        x, y, width, height in pixels), best first. And one message for each file that could not be read.

    Raises:
        OutputError: before the first image, if a file is in the way that `detr predict` did not write. DataError: an
        image has the name of the json.
        NotFiniteError: the model gives no numbers.
    """
    folder = Folder(out, BY)
    taken = next((source for source, target in images if target.parts[0] == RESULTS), None)
    if taken:
        raise DataError(f"{taken}: its picture would be in the place of {out / RESULTS}")
    folder.claim([RESULTS, *(target.as_posix() for _, target in images)])
    results: dict[Path, dict[str, Any]] = {}
    waiting: dict[tuple[int, ...], list[tuple[Path, Path, Image.Image, Tensor]]] = defaultdict(list)
    unreadable, deep = [], False

    def run(batch: list[tuple[Path, Path, Image.Image, Tensor]]) -> None:
        images, mask, _ = collate([(pixels, {}) for *_, pixels in batch])
        with torch.inference_mode():
            outputs = model(images.to(device), mask.to(device))
        sizes = torch.tensor([[picture.height, picture.width] for _, _, picture, _ in batch], device=device)
        for (source, target, picture, _), found in zip(batch, postprocess(outputs, sizes), strict=True):
            shown = [row for row in _rows(found) if row[2] >= threshold]
            folder.write(target.as_posix(), picture_of(_draw(picture, shown, categories), target.suffix, BY))
            results[source] = {"file": str(source)} | _describe(picture, shown, categories)

    for source, target in progress(images, desc="detecting", unit="image", delay=2):
        try:
            header, picture = read_header(source, None, reading), read_image(source, None, reading)
        except DataError as error:
            unreadable.append(f"{source}: {error}")
            continue
        if header.deep and not deep:
            warnings.warn(f"{source}: {DEEP}", stacklevel=2)
        deep |= header.deep
        pixels = load_pixels(picture, config)
        batch = waiting[pixels.shape]
        batch.append((source, target, picture, pixels))
        # pictures wait in memory for others of their size, but not too many of them
        if sum(map(len, waiting.values())) >= 8 * batch_size:
            batch = max(waiting.values(), key=len)
        elif len(batch) < batch_size:
            continue
        run(batch)
        batch.clear()
    for batch in waiting.values():
        for i in range(0, len(batch), batch_size):
            run(batch[i : i + batch_size])

    in_order = [results[source] for source, _ in images if source in results]
    lines = ",\n".join(json.dumps(result) for result in in_order)
    folder.write(RESULTS, f"[\n{lines}\n]\n".encode())
    return in_order, unreadable


def _rows(found: dict[str, Tensor]) -> list[tuple[list[float], int, float]]:
    """(box, label, score) of each detection."""
    return list(zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True))


def _draw(picture: Image.Image, rows: list, categories: dict[int, str]) -> Image.Image:
    names = list(categories.values())
    texts = [f"{names[label]} {score:.2f}" for _, label, score in rows]
    return draw_boxes(picture, [box for box, _, _ in rows], [label for _, label, _ in rows], texts)


def _describe(picture: Image.Image, rows: list, categories: dict[int, str]) -> dict[str, Any]:
    ids, names = list(categories), list(categories.values())
    detections = [
        {
            "category_id": ids[label],
            "name": names[label],
            "score": round(score, 4),
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        }
        for (x0, y0, x1, y1), label, score in rows
    ]
    return {"width": picture.width, "height": picture.height, "detections": detections}
