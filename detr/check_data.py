"""Every fault of a COCO-format dataset that would spoil a training, found before it starts."""

import filecmp
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from detr.config import Config
from detr.errors import DataError
from detr.images import DEEP, DEFAULT_READING, Reading, read_header, read_image
from detr.progress import progress
from detr.split import LARGEST_AREA, Split
from detr.summary import boxes_per_class, tokens
from detr.transforms import resized_size

# boxes that reach beyond the image by rounding only are clipped, not refused
_BORDER = 1.0
_INTEGERS = {
    "categories": ("id",),
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
}


@dataclass(frozen=True)
class Problem:
    """One fault: `kind` groups, `entry` and `field` say where; a fatal one stops a training before it starts."""

    file: str
    kind: str
    entry: str
    field: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.entry, self.field, self.message) if part)


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        DataError: the file is missing or does not parse; names line and column.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except RecursionError:
        raise DataError(f"{path}: not a dataset: its lists are nested too deep") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno} column {error.colno}: not json: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: not json: {error.reason}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{path}: not a dataset: {error}") from None


def check_split(
    json_path: Path,
    image_dir: Path,
    look: str,
    categories: dict[int, str] | None = None,
    config: Config | None = None,
    reading: Reading = DEFAULT_READING,
) -> tuple[Any, list[Problem]]:
    """The parsed json of a split and all its faults; the image files are looked at if the json has no fatal one.

    Args:
        look: at all "pixels" of the images, which finds truncated files, at their "headers", or at the "json" only.
        categories: those of the training, id -> name, which the split has to keep to; None for the training itself.
        config: of the model; also says what does not go well with it.

    Raises:
        DataError: the json is missing or does not parse.
    """
    data, file = read_json(json_path), str(json_path)
    checks = [
        lambda: check_annotations(data, file),
        lambda: _check_classes(data, categories, file),
        lambda: _check_images(data, image_dir, file, look == "pixels", reading) if look != "json" else (),
        lambda: check_against(data, config, file) if config else (),
    ]
    problems: list[Problem] = []
    for check in checks:
        if not any(problem.fatal for problem in problems):
            problems += check()
    return data, problems


def check_pair(train: Split, val: Split) -> list[Problem]:
    """Images of `val` that are images of `train` too, byte for byte; none of it is fatal."""
    in_train = defaultdict(list)  # other files may have the same digest
    for digest, path in zip(train.file_digests, train.images.paths, strict=True):
        in_train[digest].append(path)
    problems = []
    for digest, image_id, path in zip(val.file_digests, val.images.ids, val.images.paths, strict=True):
        others = in_train.get(digest, ())
        other = next((x for x in others if os.path.samefile(path, x) or filecmp.cmp(path, x, shallow=False)), None)
        if other is not None:
            message = f"{path} is {other}, an image of the training: what is measured on it says nothing of new images"
            entry = f"image {image_id}"
            problems.append(Problem(str(val.json_path), "seen in training", entry, "file_name", message, False))
    return problems


def check_annotations(data: Any, file: str) -> list[Problem]:
    """Faults of a parsed json `file`, the images themselves left aside. Empty if there is none.

    In `data` integers that were written as floats (64.0) become integers, and an optional field that is null is left
    out.
    """
    if not isinstance(data, dict):
        return [Problem(file, "structure", "", "", f"expected a json object, got {_short(data)}")]
    problems = []
    for field in ("categories", "images", "annotations"):
        entries = data.get(field)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            problems.append(
                Problem(file, "structure", "", field, f"expected a list of objects, got {_short(data.get(field))}")
            )
        elif not entries:
            problems.append(Problem(file, "empty", "", field, "the dataset is empty: expected at least one entry"))
    if any(problem.kind == "structure" for problem in problems):
        return problems
    _tidy(data)
    problems += _check_categories(data, file)
    problems += _check_image_entries(data, file)
    problems += _check_boxes(data, file)
    if not any(problem.fatal for problem in problems):
        problems += _check_units(data, file)
        problems += _check_objects(data, file)
    return problems


def _tidy(data: dict[str, Any]) -> None:
    for part, fields in _INTEGERS.items():
        for entry in data[part]:
            for field in fields:
                value = entry.get(field)
                if isinstance(value, float) and value.is_integer():
                    entry[field] = int(value)
    for annotation in data["annotations"]:
        for field in ("area", "iscrowd"):
            if annotation.get(field, 0) is None:
                del annotation[field]


def _check_classes(data: dict[str, Any], categories: dict[int, str] | None, file: str) -> Iterator[Problem]:
    if categories is None:
        return
    id_of = {name: category_id for category_id, name in categories.items()}
    for category in data["categories"]:
        category_id, name = category["id"], category["name"]
        if categories.get(category_id) != name:
            expected = f"{categories[category_id]!r}" if category_id in categories else "no such category"
            there = f" (category {id_of[name]} there)" if name in id_of else ""
            message = f"expected {expected}, got {name!r}{there}: classes must be those of the training"
            yield Problem(file, "class", f"category {category_id}", "name", message)


def _check_images(
    data: dict[str, Any], image_dir: Path, file: str, decode: bool, reading: Reading
) -> Iterator[Problem]:
    for image in progress(data["images"], desc=f"checking {file}", leave=False, delay=2):
        path, entry = image_dir / image["file_name"], _name("image", image)
        size = (image["width"], image["height"])
        try:
            header = read_header(path, size, reading)
            if decode:
                read_image(path, size, reading)
        except DataError as error:
            yield Problem(file, "image file", entry, "file_name", f"{path}: {error}")
            continue
        if header.doubtful:
            message = (
                f"{path}: EXIF orientation {header.orientation}, and width and height fit the turned pixels as well as "
                "the stored ones: boxes are taken to be of the turned; if they are not, --exif ignore"
            )
            yield Problem(file, "orientation in doubt", entry, "file_name", message, False)
        if header.deep:
            yield Problem(file, "deep grey", entry, "file_name", f"{path}: {DEEP}", False)


def check_against(data: dict[str, Any], config: Config, file: str) -> list[Problem]:
    """What of a faultless dataset does not go well with a model; none of it is fatal."""
    problems = []
    for category_id, count in boxes_per_class(data).items():
        if not count:
            message = "no box is of this class, so it cannot be learned or evaluated"
            problems.append(Problem(file, "class without examples", f"category {category_id}", "", message, False))
    objects = Counter(a["image_id"] for a in data["annotations"] if not a.get("iscrowd", 0))
    for image in data["images"]:
        entry, count = _name("image", image), objects[image["id"]]
        if count > config.n_queries:
            message = f"{count} objects, and only n_queries = {config.n_queries} can be found"
            problems.append(Problem(file, "too many objects", entry, "", message, False))
        size = resized_size(image["height"], image["width"], config.image_size, config.max_size)
        if config.two_stage and tokens(size, config) < config.n_queries:
            message = (
                f"resized to {size[1]}x{size[0]} pixels it has {tokens(size, config)} tokens, so no more than as many "
                f"of the n_queries = {config.n_queries}"
            )
            problems.append(Problem(file, "few tokens", entry, "", message, False))
    return problems


def by_kind(problems: list[Problem]) -> list[str]:
    """One line for each kind of problem: whether it is fatal, how many there are, and the first."""
    lines = []
    for (kind, fatal), count in Counter((problem.kind, problem.fatal) for problem in problems).items():
        first = next(problem for problem in problems if (problem.kind, problem.fatal) == (kind, fatal))
        lines.append(f"{'error' if fatal else 'warning'} {kind}: {count}, the first: {first}")
    return lines


def _check_categories(data: dict[str, Any], file: str) -> Iterator[Problem]:
    ids, names = set(), set()
    for i, category in enumerate(data["categories"]):
        entry = _name("category", category, i)
        category_id, name = category.get("id"), category.get("name")
        if not _is_int(category_id):
            yield Problem(file, "category", entry, "id", f"expected an integer, got {_short(category_id)}")
        elif category_id in ids:
            yield Problem(file, "category", entry, "id", "another category has the same id")
        if not isinstance(name, str) or not name:
            yield Problem(file, "category", entry, "name", f"expected a text, got {_short(name)}")
        elif name in names:
            yield Problem(file, "category", entry, "name", f"another category is called {name!r} too")
        ids.add(_hashable(category_id))
        names.add(_hashable(name))


def _check_image_entries(data: dict[str, Any], file: str) -> Iterator[Problem]:
    ids, files = set(), {}
    for i, image in enumerate(data["images"]):
        entry = _name("image", image, i)
        image_id, file_name = image.get("id"), image.get("file_name")
        if not _is_int(image_id):
            yield Problem(file, "image", entry, "id", f"expected an integer, got {_short(image_id)}")
        elif image_id in ids:
            yield Problem(file, "image", entry, "id", "another image has the same id")
        ids.add(_hashable(image_id))
        for field in ("width", "height"):
            if not _is_int(image.get(field)) or image[field] < 1:
                got = _short(image.get(field))
                yield Problem(file, "image", entry, field, f"expected a positive integer, pixels, got {got}")
        if not isinstance(file_name, str) or not file_name:
            yield Problem(file, "image", entry, "file_name", f"expected a text, got {_short(file_name)}")
        elif _climbs_out(file_name):
            yield Problem(file, "image", entry, "file_name", f"{file_name!r} leads out of the image folder")
        elif (first := files.setdefault(PurePosixPath(file_name), entry)) != entry:
            yield Problem(file, "image", entry, "file_name", f"{file_name!r} is the file of {first} too")


def _check_boxes(data: dict[str, Any], file: str) -> Iterator[Problem]:
    categories = {_hashable(category.get("id")) for category in data["categories"]}
    images = {_hashable(image.get("id")): image for image in data["images"]}
    ids, seen = set(), {}
    for i, annotation in enumerate(data["annotations"]):
        entry = _name("annotation", annotation, i)
        annotation_id = annotation.get("id")
        if not _is_int(annotation_id):
            yield Problem(file, "annotation", entry, "id", f"expected an integer, got {_short(annotation_id)}")
        elif annotation_id in ids:
            yield Problem(file, "annotation", entry, "id", "another annotation has the same id")
        ids.add(_hashable(annotation_id))
        for field, known in (("image_id", images), ("category_id", categories)):
            value = annotation.get(field)
            if not _is_int(value):
                yield Problem(file, field, entry, field, f"expected an integer, got {_short(value)}")
            elif value not in known:
                declared = f"none of the {len(known)} that the file declares"
                yield Problem(file, field, entry, field, f"{_short(value)} is {declared}")
        if annotation.get("iscrowd", 0) not in (0, 1):
            got = _short(annotation["iscrowd"])
            yield Problem(file, "annotation", entry, "iscrowd", f"expected 0 or 1, got {got}")
        area = annotation.get("area", 0)
        if not isinstance(area, int | float) or isinstance(area, bool) or not 0 <= area < math.inf:
            yield Problem(file, "annotation", entry, "area", f"expected square pixels, got {_short(area)}")
        elif area > LARGEST_AREA:
            message = f"{_short(area)} square pixels is beyond COCO's largest area, 1e10: that of the box is taken"
            yield Problem(file, "area", entry, "area", message, fatal=False)
        box, image = annotation.get("bbox"), images.get(_hashable(annotation.get("image_id")))
        problem = _box_problem(box, image, file, entry)
        if problem:
            yield problem
        elif image and (first := seen.setdefault((image["id"], annotation.get("category_id"), *box), entry)) != entry:
            yield Problem(file, "box twice", entry, "bbox", f"{box} is the box of {first} too", fatal=False)


def _box_problem(box: Any, image: dict[str, Any] | None, file: str, entry: str) -> Problem | None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        message = f"expected 4 finite numbers x, y, width, height, got {_short(box)}"
        return Problem(file, "box", entry, "bbox", message)
    x, y, width, height = box
    if width < 0 or height < 0:
        return Problem(file, "box", entry, "bbox", f"expected a width and height of at least 0, got {box}")
    if width == 0 or height == 0:
        return Problem(file, "zero area", entry, "bbox", f"a box of zero area, {box}, is left out", fatal=False)
    if image is None or not _is_int(image.get("width")) or not _is_int(image.get("height")):
        return None
    right, bottom = image["width"] + _BORDER, image["height"] + _BORDER
    if x < -_BORDER or y < -_BORDER or x + width > right or y + height > bottom:
        corners = x < width <= right and y < height <= bottom
        hint = ", as corners x0, y0, x1, y1 would not: expected x, y, width, height" if corners else ""
        message = f"{box} reaches outside its image of {image['width']}x{image['height']} pixels{hint}"
        return Problem(file, "box", entry, "bbox", message)
    if not _has_area(box, image):
        return Problem(file, "zero area", entry, "bbox", f"nothing of {box} is inside its image", fatal=False)
    return None


def _check_units(data: dict[str, Any], file: str) -> Iterator[Problem]:
    """Boxes in fractions of the image: fatal if all are, because some may be slivers in a corner."""
    images = {image["id"]: image for image in data["images"]}
    boxes = [a for a in data["annotations"] if all(side > 0 for side in a["bbox"][2:])]
    within = [a for a in boxes if all(-0.1 <= value <= 1.1 for value in a["bbox"])]
    for annotation in within:
        width, height = (images[annotation["image_id"]][side] for side in ("width", "height"))
        if min(width, height) > 2:
            message = (
                f"{annotation['bbox']} in an image of {width}x{height}: expected x, y, width, height in pixels, and "
                "this looks like fractions of the image, as in YOLO's files"
            )
            yield Problem(
                file, "fractions", _name("annotation", annotation), "bbox", message, len(within) == len(boxes)
            )


def _check_objects(data: dict[str, Any], file: str) -> Iterator[Problem]:
    """Without a box that counts there is nothing to learn, and no average precision."""
    images = {image["id"]: image for image in data["images"]}
    crowds = sum(bool(a.get("iscrowd", 0)) for a in data["annotations"])
    if all(a.get("iscrowd", 0) or not _has_area(a["bbox"], images[a["image_id"]]) for a in data["annotations"]):
        total = len(data["annotations"])
        message = (
            f"the dataset is empty: of {total} boxes {crowds} are crowds (iscrowd 1), which are neither learned nor "
            f"counted, and {total - crowds} have no area"
        )
        yield Problem(file, "empty", "", "annotations", message)


def _has_area(box: list[float], image: dict[str, Any]) -> bool:
    # as detr.data makes float32 corners of it: a width may be too small to count beside x
    x, y, width, height = map(float, box)
    left, right = np.float32(max(x, 0)), np.float32(min(x + width, image["width"]))
    top, bottom = np.float32(max(y, 0)), np.float32(min(y + height, image["height"]))
    return bool(right > left and bottom > top)


def _climbs_out(file_name: str) -> bool:
    path = PurePosixPath(file_name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or file_name[1:2] == ":"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # json has NaN, infinities and integers of any length
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _hashable(value: Any) -> Any:
    """The value itself if it can be an id or a name, else None, which is neither."""
    return value if isinstance(value, str) or _is_int(value) else None


def _name(kind: str, entry: dict[str, Any], position: int | None = None) -> str:
    """'image 17', by its id; by its position in the list where it has none."""
    return f"{kind} {entry['id']}" if _is_int(entry.get("id")) else f"{kind} at position {position}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
