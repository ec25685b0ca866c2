"""A split while a reader fills it: boxes as they are written, each with its place, become a `Split` and its faults."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detr.images import DEFAULT_READING, Reading
from detr.problems import Problem
from detr.split import Images, Split

# boxes that reach beyond the image by rounding only are clipped, not refused
_BORDER = 1.0


@dataclass(frozen=True)
class Words:
    """What a format calls its parts, in messages."""

    box: str  # an entry, before its number: "annotation" 17, "line" 3
    box_field: str = ""  # the field of an entry that holds the box
    corners: bool = True  # boxes are shown as x0, y0, x1, y1; else as x, y, width, height
    first_pixel: int = 0  # 1 where pixels count from 1, and the last one belongs to the box

    def shown(self, corners: np.ndarray) -> str:
        """A box [4] as x0, y0, x1, y1, in words."""
        x0, y0, x1, y1 = self.written(corners).tolist()
        numbers = (x0, y0, x1, y1) if self.corners else (x0, y0, x1 - x0, y1 - y0)
        return f"[{', '.join(format(v, '.6g') for v in numbers)}]"

    def written(self, corners: np.ndarray) -> np.ndarray:
        """Corners [..., 4] in pixels from the upper left corner, as the format counts them."""
        return corners + np.array([self.first_pixel, self.first_pixel, 0, 0])

    @property
    def order(self) -> str:
        return "x0, y0, x1, y1" if self.corners else "x, y, width, height"


class Draft:
    """What a reader has found of a split.

    Args:
        source, image_dir, categories, reading, own_ids, own_sizes: as of `Split`. Labels count `categories`.
        words: of the format.
    """

    def __init__(
        self,
        source: Path,
        image_dir: Path,
        categories: dict[int, str],
        words: Words,
        reading: Reading = DEFAULT_READING,
        own_ids: bool = True,
        own_sizes: bool = True,
    ) -> None:
        self.source, self.image_dir, self.categories, self.words = source, image_dir, categories, words
        self.reading, self.own_ids, self.own_sizes = reading, own_ids, own_sizes
        self.problems: list[Problem] = []
        self._ids: list[int] = []
        self._paths: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._files: list[str | None] = []
        self._counts: list[int] = []
        self._corners: list[Sequence[float]] = []
        self._labels: list[int] = []
        self._numbers: list[int | str] = []
        self._areas: list[float] = []
        self._crowd: list[bool] = []

    def __len__(self) -> int:
        return len(self._ids)

    def image(self, path: Path, size: tuple[int, int], image_id: int, file: str | None = None) -> None:
        """Add an image; the boxes that follow are of it.

        Args:
            size: (width, height) in pixels, of what the boxes are drawn on. file: with its boxes, where each has one.
        """
        self._ids.append(image_id)
        self._paths.append(str(path))
        self._sizes.append(size)
        self._files.append(file)
        self._counts.append(0)

    def box(
        self, corners: Sequence[float], label: int, number: int | str, area: float = 0.0, crowd: bool = False
    ) -> None:
        """Add a box of the last image.

        Args:
            corners: x0, y0, x1, y1 in pixels from the upper left corner of the image, finite; x0 <= x1 and y0 <= y1.
            number: of its entry, or where it is in words, for messages.
            area: of the object, square pixels; 0 takes that of the box.
        """
        self._counts[-1] += 1
        self._corners.append(corners)
        self._labels.append(label)
        self._numbers.append(number)
        self._areas.append(area)
        self._crowd.append(crowd)

    def finish(self) -> tuple[Split, list[Problem]]:
        """The split, and all its faults, those of the reader first. Boxes end at the borders of their image, and those
        without area are left out."""
        sizes = np.array(self._sizes, np.int64).reshape(-1, 2)
        corners = np.array(self._corners, np.float64).reshape(-1, 4)
        image_of = np.repeat(np.arange(len(sizes)), np.array(self._counts, np.int64))
        limits = np.tile(sizes[image_of], 2).astype(np.float64)
        clipped = np.clip(corners, 0, limits)
        boxes = clipped.astype(np.float32)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        areas = np.array(self._areas, np.float64)
        areas = np.where(areas > 0, areas, (clipped[:, 2:] - clipped[:, :2]).prod(1))
        self.problems += self._geometry(corners, limits, image_of, kept)
        images = Images.of(
            self._ids,
            self._paths,
            sizes,
            np.bincount(image_of[kept], minlength=len(sizes)),
            boxes=boxes[kept],
            labels=np.array(self._labels, np.int64)[kept],
            areas=areas[kept],
            crowd=np.array(self._crowd, np.bool_)[kept],
        )
        files = None if None in self._files or not self._files else self._files
        rest = {"reading": self.reading, "own_ids": self.own_ids, "own_sizes": self.own_sizes}
        return Split(self.source, self.image_dir, images, self.categories, files=files, **rest), self.problems

    def _problem(self, box: int, image_of: np.ndarray, kind: str, message: str, fatal: bool = True) -> Problem:
        file = self._files[image_of[box]] or str(self.source)
        entry = f"{self.words.box} {self._numbers[box]}"
        return Problem(file, kind, entry, self.words.box_field, message, fatal)

    def _geometry(
        self, corners: np.ndarray, limits: np.ndarray, image_of: np.ndarray, kept: np.ndarray
    ) -> Iterator[Problem]:
        """Boxes that cannot be meant: outside of their image, without area, twice, in fractions of the image."""
        words, sides = self.words, corners[:, 2:] - corners[:, :2]
        flat = (sides == 0).any(1)
        low, high = (corners < -_BORDER).any(1), (corners > limits + _BORDER).any(1)
        outside = (low | high) & ~flat
        twice, first = _twice(np.column_stack([image_of, self._labels, corners]) if len(corners) else corners)
        fine = kept & ~outside
        for i in np.flatnonzero(outside | ~kept | (twice & fine)).tolist():
            box = words.shown(corners[i])
            if outside[i]:
                size, hint = _size(limits[i]), self._hint(corners[i], limits[i])
                yield self._problem(i, image_of, "box", f"{box} reaches outside its image of {size} pixels{hint}")
            elif not kept[i]:
                text = f"a box of zero area, {box}, is left out" if flat[i] else f"nothing of {box} is inside its image"
                yield self._problem(i, image_of, "zero area", text, fatal=False)
            else:
                other = f"{words.box} {self._numbers[first[i]]}"
                yield self._problem(i, image_of, "box twice", f"{box} is the box of {other} too", fatal=False)
        if outside.any() or any(problem.fatal for problem in self.problems):
            return
        # fatal if all are: some may be slivers in a corner
        written = words.written(corners)
        numbers = np.column_stack([written[:, :2], written[:, 2:] - written[:, :2]])
        small = ((numbers >= -0.1) & (numbers <= 1.1)).all(1) & ~flat
        for i in np.flatnonzero(small & (limits[:, :2].min(1) > 2)).tolist():
            message = (
                f"{words.shown(corners[i])} in an image of {_size(limits[i])}: expected {words.order} in pixels, and "
                "this looks like fractions of the image, as in YOLO's files"
            )
            yield self._problem(i, image_of, "fractions", message, fatal=bool((small | flat).all()))

    def _hint(self, corners: np.ndarray, limits: np.ndarray) -> str:
        """What the numbers may mean instead, of a box that is written as x, y, width, height."""
        x, y, right, bottom = corners.tolist()
        width, height, inside = right - x, bottom - y, (limits + _BORDER).tolist()
        if self.words.corners or not (x < width <= inside[0] and y < height <= inside[1]):
            return ""
        return ", as corners x0, y0, x1, y1 would not: expected x, y, width, height"


def _size(limits: np.ndarray) -> str:
    return f"{limits[0]:.0f}x{limits[1]:.0f}"


def _twice(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row: whether an equal one comes before it, and the index of the first equal one."""
    if not len(rows):
        return np.zeros(0, bool), np.zeros(0, int)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    first = first[inverse.reshape(-1)]
    return first != np.arange(len(rows)), first
