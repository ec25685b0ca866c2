"""The images and boxes of one part of a dataset, whatever format they were read from."""

import copy
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.images import DEFAULT_READING, Reading

SPLITS = ("train", "val", "test")  # the usual names
LARGEST_AREA = 1e10  # square pixels: COCO's average precision leaves out objects that are larger
_COLUMNS = {"boxes": np.float32, "labels": np.int64, "areas": np.float64, "crowd": np.bool_}


@dataclass(frozen=True)
class Annotated:
    """One image and its T boxes, those of zero area left out."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: Tensor  # [T, 4] float32, x0, y0, x1, y1 in pixels, inside the image
    labels: Tensor  # [T] int64 in 0..K-1
    areas: Tensor  # [T] float64, square pixels; of the object where the dataset knows it, else of the box
    crowd: Tensor  # [T] bool: a group, no target of training, ignored by the evaluation


class Images(Sequence):
    """Many `Annotated`, kept as a few arrays: a process that loads images is sent these, and not a tensor for each box.

    Of the N images: ids, paths, sizes [N, 2] (width, height) in pixels, and ends [N]. Of the T boxes of all images, one
    image after the other: boxes [T, 4], labels, areas and crowd [T], as in `Annotated`. Those of image i are the rows
    from `ends[i - 1]` to `ends[i]`.
    """

    def __init__(self, images: Iterable[Annotated]) -> None:
        images = list(images)
        self.ids = [image.image_id for image in images]
        self.paths = [str(image.path) for image in images]
        self.sizes = np.array([(image.width, image.height) for image in images], np.int64).reshape(-1, 2)
        self.ends = np.cumsum([len(image.labels) for image in images], dtype=np.int64)
        for name, dtype in _COLUMNS.items():
            parts = [np.asarray(getattr(image, name), dtype) for image in images]
            empty = np.zeros((0, 4) if name == "boxes" else 0, dtype)
            setattr(self, name, np.concatenate([empty, *parts]))

    @classmethod
    def of(
        cls, ids: list[int], paths: list[str], sizes: np.ndarray, counts: np.ndarray, **columns: np.ndarray
    ) -> "Images":
        """Images whose arrays are there: `counts` [N] boxes of each image, and the columns of all boxes."""
        images = cls(())
        images.ids, images.paths, images.sizes, images.ends = ids, paths, sizes, np.cumsum(counts, dtype=np.int64)
        for name, dtype in _COLUMNS.items():
            setattr(images, name, columns[name].astype(dtype))
        return images

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        rows = self.rows(i)
        columns = {name: torch.from_numpy(getattr(self, name)[rows].copy()) for name in _COLUMNS}
        width, height = self.sizes[i].tolist()
        return Annotated(self.ids[i], Path(self.paths[i]), width, height, **columns)

    def __iter__(self) -> Iterator[Annotated]:
        return (self[i] for i in range(len(self)))

    def rows(self, i: int) -> slice:
        """Of the arrays: the boxes of image i."""
        return slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))

    @property
    def image_of_box(self) -> np.ndarray:
        """[T]: the index of the image of each box."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))

    @property
    def objects(self) -> np.ndarray:
        """[N]: how many boxes each image has, crowds apart."""
        return np.bincount(self.image_of_box[~self.crowd], minlength=len(self))

    def only(self, indices: Sequence[int]) -> "Images":
        """Some of the images, in this order."""
        rows = [np.arange(*self.rows(i).indices(len(self.labels))) for i in indices]
        kept = np.concatenate([np.zeros(0, np.int64), *rows])
        ids, paths = [self.ids[i] for i in indices], [self.paths[i] for i in indices]
        columns = {name: getattr(self, name)[kept] for name in _COLUMNS}
        return Images.of(ids, paths, self.sizes[list(indices)], np.array([len(each) for each in rows]), **columns)


@dataclass(frozen=True)
class Split:
    """The validated images and boxes of one part of a dataset. Label k means the k-th of `categories`."""

    source: Path  # the file or folder that it was read from, for messages
    image_dir: Path  # names of images are relative to it
    images: Images  # or any iterable of `Annotated`
    categories: dict[int, str]  # id in the dataset -> name, in the order of labels
    reading: Reading = DEFAULT_READING  # how its image files are read
    files: list[str] | None = None  # of each image, the file with its boxes; None: `source` has those of all, by id
    own_ids: bool = True  # False: the dataset knows its classes by name only
    own_sizes: bool = True  # False: boxes are of the pixels as `reading` turns them, whose sizes were measured

    def __post_init__(self) -> None:
        if not isinstance(self.images, Images):
            object.__setattr__(self, "images", Images(self.images))

    def place(self, i: int) -> tuple[str, str]:
        """Where the dataset has image i: a file, and the entry in it if it has several."""
        return (str(self.source), f"image {self.images.ids[i]}") if self.files is None else (self.files[i], "")

    def in_classes(self, categories: dict[int, str]) -> "Split":
        """The same with labels that mean `categories` (id -> name, in order), which have all names of this one."""
        label_of = {name: label for label, name in enumerate(categories.values())}
        labels = np.array([label_of[name] for name in self.class_names], np.int64)[self.images.labels]
        images = copy.copy(self.images)
        images.labels = labels
        return replace(self, images=images, categories=categories)

    def named(self, ids: Iterable[int]) -> list[int | str]:
        """Of images with these ids, what the dataset calls them: the id itself, or the file where it has no ids."""
        if self.files is None:
            return list(ids)
        path_of = dict(zip(self.images.ids, self.images.paths, strict=True))
        return [path_of[image_id] for image_id in ids]

    def only(self, indices: Sequence[int]) -> "Split":
        """Some of the images, in this order."""
        files = self.files and [self.files[i] for i in indices]
        return replace(self, images=self.images.only(indices), files=files)

    @property
    def class_names(self) -> list[str]:
        return list(self.categories.values())

    @property
    def category_ids(self) -> list[int]:
        return list(self.categories)

    @property
    def file_digests(self) -> list[bytes]:
        """Of each image, a hash of the length and the last bytes of its file."""
        return self._files[1]

    @functools.cached_property
    def names(self) -> list[str]:
        return [os.path.relpath(path, self.image_dir) for path in self.images.paths]

    @functools.cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self.names)), key=self.names.__getitem__)

    @functools.cached_property
    def _files(self) -> tuple[str, list[bytes]]:
        """One hash of all files in the order of their names, and one of each in the order of the images: read once."""
        parts = [b""] * len(self.names)

        def read() -> Iterator[bytes]:
            for i in self._order:
                part = _file(self.images.paths[i])
                parts[i] = hashlib.sha256(part).digest()
                yield part

        return _hash(read()), parts

    def content(self) -> dict[str, Any]:
        """What a training on this split depends on, as a number and hashes: to see whether it changed.

        Not in it are ids of images and boxes, where the dataset lies, and how it is written. An image is known by
        its path below the image folder, its size in pixels, and the length and the last bytes of its file. The classes
        are `categories`.
        """
        images = self.images
        names, order = self.names, self._order
        rows = [images.rows(i) for i in order]

        def column(name: str) -> Iterator[bytes]:
            return (getattr(images, name)[each].tobytes() for each in rows)

        counts = np.diff(images.ends, prepend=0)[order].tobytes()
        return {
            "images": len(names),
            "paths": _hash(os.fsencode(names[i]) + b"\n" for i in order),
            "order": _hash(os.fsencode(name) + b"\n" for name in names),
            "files": self._files[0],
            "sizes": _hash([images.sizes[order].tobytes()]),
            "boxes": _hash([counts, *column("boxes"), *column("crowd"), *column("areas")]),
            "labels": _hash([counts, *column("labels")]),
        }


_CHANGES = {
    "paths": "images of other names",
    "order": "the images in another order",
    "files": "other image files",
    "sizes": "images of other sizes in pixels",
    "boxes": "other boxes",
    "labels": "other labels",
}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How `now`, a `Split.content`, is not as `before`, in words; empty if it is."""
    if before["images"] != now["images"]:
        return f"{now['images']} images instead of {before['images']}"
    changed = [name for name in _CHANGES if before[name] != now[name]]
    if "paths" in changed:  # the rest is compared in their order
        return _CHANGES["paths"]
    return ", ".join(_CHANGES[name] for name in changed)


def _file(path: str) -> bytes:
    """The length and the last bytes of a file: all of it would be slow, and the length of a bitmap says little."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 4096))
        return length.to_bytes(8, "little") + file.read()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
