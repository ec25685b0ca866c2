"""Detection on image files: a picture with boxes for each, and one json."""

import glob
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr.config import Config
from detr.data import collate
from detr.images import SUFFIXES, DataError, draw_boxes, read_image, to_tensor
from detr.postprocess import postprocess
from detr.progress import progress
from detr.transforms import evaluation_transform, resize


def find_images(inputs: list[str]) -> list[tuple[Path, Path]]:
    """The image files that `inputs` (files, folders, glob patterns) name, each with a relative path to write it to.

    Raises:
        DataError: an input names nothing, or two images would be written to one file.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            pairs = [(p, p.relative_to(path)) for p in inside]
        elif path.exists():
            pairs = [(path, Path(path.name))]
        else:
            pairs = [(Path(name), Path(Path(name).name)) for name in sorted(glob.glob(text, recursive=True))]
        if not pairs:
            raise DataError(f"{text}: expected an image, a folder of images or a pattern, found no image")
        for source, target in pairs:
            if found.setdefault(target, source) != source:
                raise DataError(f"{source}: {found[target]} has the same name; predict them one after the other")
    return [(source, target) for target, source in found.items()]


def predict(
    model: nn.Module,
    config: Config,
    categories: dict[int, str],
    images: list[tuple[Path, Path]],
    out: Path,
    threshold: float,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write `out`/<picture with boxes> for each image and `out`/predictions.json with the detections of all.

    Args:
        categories: raw id -> name, in the order of labels. images: as from `find_images`.
        threshold: score in [0, 1] below which detections are left out.

    Returns:
        The content of the json: for each image file, width, height and detections (category_id, name, score, bbox as
        x, y, width, height in pixels), best first. And one message for each file that could not be read.
    """
    transform = evaluation_transform()
    ids, names = list(categories), list(categories.values())
    results, unreadable = [], []
    for source, target in progress(images, desc="detecting", unit="image", delay=2):
        try:
            picture = read_image(source)
        except DataError as error:
            unreadable.append(f"{source}: {error}")
            continue
        pixels = resize(to_tensor(picture), config.image_size, config.max_size)
        pixels, _, _ = transform(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        batch, mask, _ = collate([(pixels, {})])
        with torch.inference_mode():
            outputs = model(batch.to(device), mask.to(device))
        found = postprocess(outputs, torch.tensor([[picture.height, picture.width]], device=device))[0]
        columns = (found[name].tolist() for name in ("boxes", "labels", "scores"))
        shown = [row for row in zip(*columns, strict=True) if row[2] >= threshold]
        drawn = draw_boxes(
            picture,
            [box for box, _, _ in shown],
            [label for _, label, _ in shown],
            [f"{names[label]} {score:.2f}" for _, label, score in shown],
        )
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        drawn.save(out / target)
        detections = [
            {
                "category_id": ids[label],
                "name": names[label],
                "score": round(score, 4),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            }
            for (x0, y0, x1, y1), label, score in shown
        ]
        size = {"width": picture.width, "height": picture.height}
        results.append({"file": str(source), **size, "detections": detections})
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in results)
    (out / "predictions.json").write_text(f"[\n{lines}\n]\n")
    return results, unreadable
