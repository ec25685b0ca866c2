"""Every fault of a COCO-format dataset that would spoil a training, found before it starts."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from detr.config import Config
from detr.images import DataError, read_image, read_size
from detr.progress import progress
from detr.transforms import resized_size

# boxes that reach beyond the image by rounding only are clipped, not refused
_BORDER = 1.0


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


def check_split(json_path: Path, image_dir: Path, look: str) -> tuple[Any, list[Problem]]:
    """The parsed json of a split and all its faults; the image files are looked at if the json has no fatal one.

    Args:
        look: at all "pixels" of the images, which finds truncated files, at their "headers", or at the "json" only.

    Raises:
        DataError: the json is missing or does not parse.
    """
    data = read_json(json_path)
    problems = check_annotations(data, str(json_path))
    if look != "json" and not any(problem.fatal for problem in problems):
        problems += _check_images(data, image_dir, str(json_path), decode=look == "pixels")
    return data, problems


def check_annotations(data: Any, file: str) -> list[Problem]:
    """Faults of a parsed json `file`, the images themselves left aside. Empty if there is none."""
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
    problems += _check_categories(data, file)
    problems += _check_image_entries(data, file)
    problems += _check_boxes(data, file)
    if not any(problem.fatal for problem in problems):
        problems += _check_objects(data, file)
    return problems


def _check_images(data: dict[str, Any], image_dir: Path, file: str, decode: bool) -> Iterator[Problem]:
    for entry in progress(data["images"], desc=f"checking {file}", leave=False, delay=2):
        path = image_dir / entry["file_name"]
        size = (entry["width"], entry["height"])
        try:
            if decode:
                read_image(path, size)
            else:
                stored = read_size(path)
                if size not in (stored, stored[::-1]):
                    raise DataError(f"the image is {stored[0]}x{stored[1]} pixels, expected {size[0]}x{size[1]}")
        except DataError as error:
            yield Problem(file, "image file", _name("image", entry), "file_name", f"{path}: {error}")


def check_against(data: dict[str, Any], config: Config, file: str) -> list[Problem]:
    """What of a faultless dataset does not go well with a model; none of it is fatal."""
    problems = []
    for category_id, count in _per_class(data).items():
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


def tokens(size: tuple[int, int] | list[int], config: Config) -> int:
    """Tokens of all levels of an image of (height, width) pixels in the model."""
    strides = [8, 16, 16 if config.dilation else 32][-config.n_levels :]
    strides += [strides[-1] * 2 ** (i + 1) for i in range(config.n_levels - 3)]
    return sum(math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in strides)


def _per_class(data: dict[str, Any]) -> dict[int, int]:
    """Boxes of each category id, crowds apart."""
    counts = Counter(a["category_id"] for a in data["annotations"] if not a.get("iscrowd", 0))
    return {category["id"]: counts[category["id"]] for category in data["categories"]}


def summary(data: dict[str, Any], config: Config) -> dict[str, Any]:
    """Counts of a faultless dataset, and its sizes in the model of `config`: see `summary_table`."""
    objects = Counter(a["image_id"] for a in data["annotations"] if not a.get("iscrowd", 0))
    per_class, names = _per_class(data), {category["id"]: category["name"] for category in data["categories"]}
    sizes = {(image["height"], image["width"]) for image in data["images"]}
    resized = [resized_size(*size, config.image_size, config.max_size) for size in sizes]
    return {
        "images": len(data["images"]),
        "images_without_objects": sum(image["id"] not in objects for image in data["images"]),
        "objects": sum(objects.values()),
        "crowds": sum(bool(a.get("iscrowd", 0)) for a in data["annotations"]),
        "most_objects_in_an_image": max(objects.values(), default=0),
        "annotation_id_0": sum(a["id"] == 0 for a in data["annotations"]),
        "objects_per_class": {names[category_id]: count for category_id, count in per_class.items()},
        "shortest_side": [min(min(size) for size in sizes), max(min(size) for size in sizes)],
        "shortest_side_resized": [min(min(size) for size in resized), max(min(size) for size in resized)],
        "tokens": [min(tokens(size, config) for size in resized), max(tokens(size, config) for size in resized)],
        "n_queries": config.n_queries,
    }


def summary_table(counts: dict[str, Any]) -> str:
    """A `summary` for people."""

    def span(name: str) -> str:
        low, high = counts[name]
        return str(low) if low == high else f"{low} to {high}"

    rows = [
        ("images", f"{counts['images']}, {counts['images_without_objects']} of them without objects"),
        ("objects", f"{counts['objects']}, and {counts['crowds']} crowds, which are not trained on"),
        ("most in one image", f"{counts['most_objects_in_an_image']}; the model has {counts['n_queries']} queries"),
        ("shortest side", f"{span('shortest_side')} pixels; {span('shortest_side_resized')} in the model"),
        ("tokens", f"{span('tokens')} of an image in the model"),
    ]
    if counts["annotation_id_0"]:
        rows.append(("annotation id 0", "is renumbered here; pycocotools alone would take it for a miss"))
    most, total = max(counts["objects_per_class"].values()), max(1, counts["objects"])
    for name, count in counts["objects_per_class"].items():
        rows.append((name, f"{count:>7} {100 * count / total:5.1f} %  {'#' * round(30 * count / max(1, most))}"))
    return "\n".join(f"  {name:<20} {text}" for name, text in rows)


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
    ids = set()
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
                yield Problem(file, "image", entry, field, f"expected a positive number of pixels, got {got}")
        if not isinstance(file_name, str) or not file_name:
            yield Problem(file, "image", entry, "file_name", f"expected a text, got {_short(file_name)}")
        elif _climbs_out(file_name):
            yield Problem(file, "image", entry, "file_name", f"{file_name!r} leads out of the image folder")


def _check_boxes(data: dict[str, Any], file: str) -> Iterator[Problem]:
    categories = {_hashable(category.get("id")) for category in data["categories"]}
    images = {_hashable(image.get("id")): image for image in data["images"]}
    ids = set()
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
            if _hashable(value) not in known:
                declared = f"none of the {len(known)} that the file declares"
                yield Problem(file, field, entry, field, f"{_short(value)} is {declared}")
        if annotation.get("iscrowd", 0) not in (0, 1):
            got = _short(annotation["iscrowd"])
            yield Problem(file, "annotation", entry, "iscrowd", f"expected 0 or 1, got {got}")
        area = annotation.get("area", 0)
        if not _is_number(area) or area < 0:
            yield Problem(file, "annotation", entry, "area", f"expected square pixels, got {_short(area)}")
        yield from _check_box(annotation.get("bbox"), images.get(_hashable(annotation.get("image_id"))), file, entry)


def _check_box(box: Any, image: dict[str, Any] | None, file: str, entry: str) -> Iterator[Problem]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        yield Problem(file, "box", entry, "bbox", f"expected 4 finite numbers x, y, width, height, got {_short(box)}")
        return
    x, y, width, height = box
    if width < 0 or height < 0:
        yield Problem(file, "box", entry, "bbox", f"expected a width and height of at least 0, got {box}")
    elif width == 0 or height == 0:
        yield Problem(file, "zero area", entry, "bbox", f"a box of zero area, {box}", fatal=False)
    elif image is not None and _is_int(image.get("width")) and _is_int(image.get("height")):
        right, bottom = image["width"] + _BORDER, image["height"] + _BORDER
        if x < -_BORDER or y < -_BORDER or x + width > right or y + height > bottom:
            size = f"{image['width']}x{image['height']}"
            yield Problem(file, "box", entry, "bbox", f"{box} reaches outside its image of {size} pixels")
        elif not _has_area(box, image):
            yield Problem(file, "zero area", entry, "bbox", f"nothing of {box} is inside its image", fatal=False)


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
    # as detr.data makes corners of it: a width may be too small to count beside x
    x, y, width, height = map(float, box)
    columns = min(x + width, image["width"]) - max(x, 0)
    rows = min(y + height, image["height"]) - max(y, 0)
    return columns > 0 and rows > 0


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
