"""COCO-format datasets: finding the files, the validated split, the torch datasets and the collate function."""

import os
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr.check_data import Problem, check_split
from detr.config import Config
from detr.images import DataError, read_image, to_tensor
from detr.progress import progress
from detr.transforms import evaluation_transform, resize, resized_size

# (json, image folder) of COCO 2017's layout and of the flat one
LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("instances_{split}.json", "{split}"),
)
# resized images are kept in memory if all of a split take no more than this
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Annotated:
    """One image and its T boxes, those of zero area left out."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: Tensor  # [T, 4] float32, x0, y0, x1, y1 in pixels, inside the image
    labels: Tensor  # [T] int64 in 0..K-1
    areas: Tensor  # [T] float64, square pixels; of the object where the json knows it, else of the box
    crowd: Tensor  # [T] bool: a group, no target of training, ignored by the evaluation


@dataclass(frozen=True)
class Split:
    """The validated images and boxes of one json. Label k means the k-th of `categories`."""

    json_path: Path
    image_dir: Path
    images: list[Annotated]
    categories: dict[int, str]  # id in the json -> name, in the order of labels

    @property
    def class_names(self) -> list[str]:
        return list(self.categories.values())

    @property
    def category_ids(self) -> list[int]:
        return list(self.categories)


def find_split(
    root: Path, split: str, json_path: Path | None = None, image_dir: Path | None = None
) -> tuple[Path, Path]:
    """The json and the image folder of `split` ("train", "val", ...) under `root`, in one of `LAYOUTS`.

    Args:
        json_path, image_dir: names given by the user, absolute or relative to root; they win over the layouts.

    Raises:
        DataError: there is no such json or folder; names what was looked for.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with a COCO-format dataset, found none")
    jsons = [json_path] if json_path else [Path(name.format(split=split)) for name, _ in LAYOUTS]
    dirs = [image_dir] if image_dir else [Path(name.format(split=split)) for _, name in LAYOUTS]
    found_json = next((root / path for path in jsons if (root / path).is_file()), None)
    found_dir = next((root / path for path in dirs if (root / path).is_dir()), None)
    for found, looked_for, kind in ((found_json, jsons, "json"), (found_dir, dirs, "image folder")):
        if found is None:
            names = " or ".join(dict.fromkeys(map(str, looked_for)))
            raise DataError(f"{root}: no {kind} of the split {split!r}: looked for {names}")
    return found_json, found_dir


def load_split(json_path: Path, image_dir: Path, categories: dict[int, str] | None = None) -> Split:
    """Read and validate one json and the headers of its images. Warns once about dropped boxes, with their count.

    Args:
        categories: the classes that the labels shall mean, id -> name (those of the training set or of a checkpoint);
            None takes those of the json, in the order of their ids.

    Raises:
        DataError: a fatal problem (`check_data`); the message names file, id and field, and how many more there are.
    """
    data, problems = check_split(json_path, image_dir, decode=False)
    _raise_or_warn(problems)

    declared = {category["id"]: category["name"] for category in data["categories"]}
    categories = dict(sorted(declared.items())) if categories is None else categories
    for category_id, name in declared.items():
        if categories.get(category_id) != name:
            expected = f"{categories[category_id]!r}" if category_id in categories else "no such category"
            raise DataError(f"{json_path}: category {category_id}: name: expected {expected}, got {name!r}")
    label_of = {category_id: label for label, category_id in enumerate(categories)}

    per_image = defaultdict(list)
    for annotation in data["annotations"]:
        per_image[annotation["image_id"]].append(annotation)
    images = [_annotated(entry, per_image[entry["id"]], image_dir, label_of) for entry in data["images"]]
    if not any(len(image.boxes) for image in images):
        raise DataError(f"{json_path}: annotations: the dataset is empty: no box has an area")
    return Split(json_path, image_dir, images, categories)


def _raise_or_warn(problems: list[Problem]) -> None:
    """Stop at the first fatal problem; else warn once for each kind, with its count and first case."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more; `detr check-data` lists them)" if len(fatal) > 1 else ""
        raise DataError(f"{fatal[0]}{more}")
    for kind in dict.fromkeys(problem.kind for problem in problems):
        cases = [problem for problem in problems if problem.kind == kind]
        boxes = "1 box" if len(cases) == 1 else f"{len(cases)} boxes"
        warnings.warn(f"{boxes} of {kind} dropped, the first: {cases[0]}", stacklevel=3)


def _annotated(
    entry: dict[str, Any], annotations: list[dict[str, Any]], root: Path, label_of: dict[int, int]
) -> Annotated:
    xywh = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([entry["width"], entry["height"]] * 2, dtype=torch.float64))
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides > 0).all(1)
    areas = torch.tensor([a.get("area", 0) for a in annotations], dtype=torch.float64)
    return Annotated(
        image_id=entry["id"],
        path=root / entry["file_name"],
        width=entry["width"],
        height=entry["height"],
        boxes=boxes[kept].float(),
        labels=torch.tensor([label_of[a["category_id"]] for a in annotations], dtype=torch.int64)[kept],
        areas=torch.where(areas > 0, areas, sides.prod(1))[kept],
        crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool)[kept],
    )


class CocoDataset(Dataset):
    """Item i: (image [3, H, W] as `transform` makes it, target) of image i of the split.

    The target has "labels" [T] int64, "boxes" [T, 4] cxcywh in [0, 1], "image_id" int and "orig_size" [2] int64 (h, w);
    crowds are not in it.

    Args:
        transform: (uint8 image [3, H, W], boxes [T, 4] xyxy pixels, labels) -> (float image, boxes, labels).
        resize_to: None, or (shortest side, longest side): images are brought to this size first, and are kept in memory
            as uint8 if all of them fit into CACHE_BYTES. Decoding then happens here, once.

    Raises:
        DataError: an image file is damaged: here if the images are kept in memory, else when it is read.
    """

    def __init__(self, split: Split, transform: Callable, resize_to: tuple[int, int] | None = None) -> None:
        self.split = split
        self.transform = transform
        self.resize_to = resize_to
        self.cache: list[Tensor] | None = None
        if resize_to is not None:
            sizes = (resized_size(image.height, image.width, *resize_to) for image in split.images)
            if sum(3 * height * width for height, width in sizes) <= CACHE_BYTES:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    reading = pool.map(self._read, split.images)
                    name = f"reading {split.image_dir}"
                    self.cache = list(progress(reading, desc=name, total=len(split.images), leave=False, delay=2))

    def _read(self, image: Annotated) -> Tensor:
        try:
            pixels = to_tensor(read_image(image.path, (image.width, image.height)))
        except DataError as error:
            raise DataError(f"{self.split.json_path}: image {image.image_id}: {image.path}: {error}") from None
        return pixels if self.resize_to is None else resize(pixels, *self.resize_to)

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.split.images[index]
        pixels = self._read(image) if self.cache is None else self.cache[index]
        height, width = pixels.shape[-2:]
        scale = torch.tensor([width / image.width, height / image.height] * 2)
        real = ~image.crowd
        pixels, boxes, labels = self.transform(pixels, image.boxes[real] * scale, image.labels[real])
        height, width = pixels.shape[-2:]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        boxes = torch.cat([centres, boxes[:, 2:] - boxes[:, :2]], 1) / torch.tensor([width, height] * 2)
        orig_size = torch.tensor([image.height, image.width])
        return pixels, {"labels": labels, "boxes": boxes, "image_id": image.image_id, "orig_size": orig_size}


class TrainingStream(Dataset):
    """The endless sequence of training samples: epoch after epoch, each a new permutation of `dataset`.

    Sample n is a function of (seed, n) alone, its augmentation included: it does not depend on the number of workers or
    processes or on where a run was interrupted. A loader over `range(a, b)` continues any run.
    """

    def __init__(self, dataset: CocoDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, n: int) -> tuple[Tensor, dict[str, Any]]:
        epoch, position = divmod(n, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, 0, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        # torchvision's transforms draw from the global CPU generator; torch.manual_seed would reset the GPU's too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(self.seed, 1, n))
            return self.dataset[int(self._order[position])]


def _seed(*numbers: int) -> int:
    """64 random bits from integers: neighbouring samples must not start from neighbouring states of a generator."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Images [B, 3, H, W] padded with zeros at the right and bottom, mask [B, H, W] (True = padding), targets."""
    images, targets = zip(*samples, strict=True)
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask, list(targets)


def make_loader(
    dataset: CocoDataset | TrainingStream,
    batch_size: int,
    device: torch.device,
    workers: int | None = None,
    sampler: range | None = None,
) -> DataLoader:
    """A loader of collated batches.

    Args:
        workers: processes that prepare samples; None is none where the images are in memory, else one a CPU, at most 8.
        sampler: the indices to load, in order; None takes all of the dataset.
    """
    if workers is None:
        source = dataset.dataset if isinstance(dataset, TrainingStream) else dataset
        workers = min(8, os.cpu_count() or 1) if source.cache is None else 0
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        pin_memory=device.type == "cuda",
        # the loader would draw a seed from the global generator, which a resumed run has to find unchanged
        generator=torch.Generator(),
    )


def _leave_ctrl_c_to_the_parent(_worker: int) -> None:
    # a terminal sends it to all processes; the parent still needs batches to end its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def validation_loader(split: Split, config: Config, device: torch.device, workers: int | None = None) -> DataLoader:
    """The images of a split in their order, at the size of `config`."""
    dataset = CocoDataset(split, evaluation_transform(), (config.image_size, config.max_size))
    return make_loader(dataset, config.batch_size, device, workers)
