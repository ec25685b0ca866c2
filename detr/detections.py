"""What a detector found in one image: boxes, scores and classes, and what can be made of them."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from detr.errors import DataError, DetrError, MissingPackageError
from detr.images import DEFAULT_READING, AnyImage, Reading, as_picture, draw_boxes
from detr.labels import drawable_names

_SHOWN = 20  # rows of a text


class Detection(NamedTuple):
    """One object: `xyxy`, its box (x0, y0, x1, y1) in pixels of the image; `score`, 0 to 1; `label`, the number of its
    class, from 0; and `name`, that of its class."""

    xyxy: tuple[float, float, float, float]
    score: float
    label: int
    name: str


class Detections:
    """The objects in one image, best score first; `Detector.predict` makes it.

    `len(found)` is their number N, `found[0]` and a loop give each as a `Detection`, and `found[:5]`,
    `found[found.scores > 0.8]` and `found[[2, 0]]` are Detections again. In a notebook it shows itself as a picture.

    Attributes:
        xyxy: [N, 4] float32 array: x0, y0, x1, y1 in pixels of the image, within it.
        scores: [N] float32 array, 0 to 1.
        labels: [N] int64 array: the number of the class, an index into `classes`.
        names: N names of classes.
        classes: the names of all classes of the detector.
        category_ids: of all classes, the ids that they have in the dataset of the training.
        size: (width, height) of the image in pixels.
        source: the image as it was given to `Detector.predict`: a path, a PIL image, an array or a tensor.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]
    source: Any

    def __init__(
        self,
        xyxy: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        categories: dict[int, str],
        size: tuple[int, int],
        source: Any = None,
        reading: Reading = DEFAULT_READING,
    ) -> None:
        self.xyxy = np.asarray(xyxy, np.float32).reshape(-1, 4)
        self.scores, self.labels = np.asarray(scores, np.float32), np.asarray(labels, np.int64)
        self._categories, self.size, self.source, self._reading = categories, size, source, reading

    @property
    def names(self) -> list[str]:
        return [self.classes[label] for label in self.labels.tolist()]

    @property
    def classes(self) -> list[str]:
        return list(self._categories.values())

    @property
    def category_ids(self) -> list[int]:
        return list(self._categories)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray | list[int]) -> "Detections": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            label = int(self.labels[index])
            return Detection(tuple(self.xyxy[index].tolist()), float(self.scores[index]), label, self.classes[label])
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index if index.size else index.astype(np.int64)  # an empty list is float64 to NumPy
            if index.ndim != 1 or index.dtype.kind not in "biu":
                raise TypeError("index: expected an integer, a slice, or a list of integers or of True and False")
        some = (x[index] for x in (self.xyxy, self.scores, self.labels))
        return Detections(*some, self._categories, self.size, self.source, self._reading)

    def found_in(self, source: Any, reading: Reading) -> "Detections":
        """The same, of an image that was given as `source` and read in a certain way."""
        return Detections(self.xyxy, self.scores, self.labels, self._categories, self.size, source, reading)

    def __repr__(self) -> str:
        width, height = self.size
        lines = [f"{len(self)} object{'' if len(self) == 1 else 's'} in an image of {width} x {height} pixels"]
        for box, score, _, name in self[:_SHOWN]:
            lines.append(f"  {name:<20} {score:.3f}  x0 y0 x1 y1: {' '.join(f'{v:8.2f}' for v in box)}")
        if len(self) > _SHOWN:
            lines.append(f"  and {len(self) - _SHOWN} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Json values, as an entry of the predictions.json of `detr predict`.

        Returns:
            "file" if the image was one, "width" and "height" in pixels, and "detections", a list with "category_id",
            "name", "score" (4 decimals) and "bbox": x, y, width, height in pixels (2 decimals).
        """
        rows = [
            {
                "category_id": self.category_ids[label],
                "name": name,
                "score": round(score, 4),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            }
            for (x0, y0, x1, y1), score, label, name in self
        ]
        file = {"file": str(self.source)} if isinstance(self.source, str) or hasattr(self.source, "__fspath__") else {}
        return file | {"width": self.size[0], "height": self.size[1], "detections": rows}

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections`, with the names as `data["class_name"]`.

        Raises:
            MissingPackageError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            message = "to_supervision: needs the package supervision: pip install supervision"
            raise MissingPackageError(message) from None
        names = np.array(self.names, dtype=str)
        return supervision.Detections(
            xyxy=self.xyxy, confidence=self.scores, class_id=self.labels, data={"class_name": names}
        )

    def draw(self, image: AnyImage | None = None) -> Image.Image:
        """A picture with the boxes, their names and scores, as `detr predict` draws it.

        Args:
            image: what to draw on, of the same size: any kind that `Detector.predict` takes; None is the image itself.

        Raises:
            DataError: it is no image, the file is gone, or it is of another size.
        """
        picture = as_picture(self.source if image is None else image, "image", self._reading)
        if picture.size != self.size:
            expected, got = (f"{width} x {height}" for width, height in (self.size, picture.size))
            raise DataError(f"image: expected {expected} pixels, as the one of these detections, got {got}")
        shown = drawable_names(self._categories)
        labels = self.labels.tolist()
        return draw_boxes(picture, self.xyxy.tolist(), labels, [shown[i] for i in labels], self.scores.tolist())

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; None, which is the text, where the image is not to be had any more."""
        buffer = io.BytesIO()
        try:
            self.draw().save(buffer, "PNG")
        except DetrError:
            return None
        return buffer.getvalue()
