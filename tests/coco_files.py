"""Small COCO-format datasets on disk for the tests of the detector."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

from detr.formats import open_dataset
from detr.problems import Problem
from detr.split import Split
from detr.splits import load_split, read_part

# ids with gaps and out of order: labels follow the ids
CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "ant"}, {"id": 17, "name": "owl"}]
CONTENT = {
    "categories": CATEGORIES,
    "images": [
        {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "sub/b.png", "width": 20, "height": 50},
        {"id": 9, "file_name": "c.png", "width": 16, "height": 16},
    ],
    "annotations": [
        {"id": 0, "image_id": 5, "category_id": 90, "bbox": [4, 6, 10, 12], "area": 100, "iscrowd": 0},
        {"id": 11, "image_id": 2, "category_id": 3, "bbox": [0, 0, 20, 50]},
        {"id": 7, "image_id": 5, "category_id": 17, "bbox": [20.5, 10, 19.5, 20], "area": 390, "iscrowd": 0},
        {"id": 8, "image_id": 5, "category_id": 3, "bbox": [1, 1, 30, 20], "iscrowd": 1},
    ],
}


def content() -> dict:
    """A copy of CONTENT to change."""
    return copy.deepcopy(CONTENT)


def write(root: Path, data: dict | None = None, split: str = "train") -> tuple[Path, Path]:
    """Write `data` (CONTENT) in the flat layout with random images; the json and the image folder."""
    data = content() if data is None else data
    json_path, image_dir = root / f"instances_{split}.json", root / split
    for i, image in enumerate(data["images"]):
        path = image_dir / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    json_path.write_text(json.dumps(data))
    return json_path, image_dir


def load(files: tuple[Path, Path], *args, **kwargs) -> Split:
    """`load_split` of what `write` gave."""
    json_path, image_dir = files
    return load_split(open_dataset(json_path.parent), image_dir.name, *args, **kwargs)


def problems(files: tuple[Path, Path], categories: dict[int, str] | None = None, decode: bool = False) -> list[Problem]:
    """All faults of it."""
    json_path, image_dir = files
    return read_part(open_dataset(json_path.parent), image_dir.name, categories, decode=decode).problems
