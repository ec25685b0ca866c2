"""COCO's json: the layouts of COCO 2017, the flat one, and the exports of Roboflow."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from detr.draft import Draft, Words
from detr.errors import DataError
from detr.formats.found import NAMES, Found, Given
from detr.images import Reading
from detr.problems import Problem, any_fatal
from detr.split import LARGEST_AREA, SPLITS, Split

# (json, image folder) of COCO 2017's layout, of Ultralytics', and of the flat one
LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}2017.json", "images/{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("instances_{split}.json", "{split}"),
)
ROBOFLOW = "_annotations.coco.json"
_MOST_PIXELS = 10**9  # of a side
_WORDS = Words("annotation", "bbox", corners=False)
_INTEGERS = {
    "categories": ("id",),
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
}


def find_coco(root: Path, given: Given) -> Found:
    """A folder in one of `LAYOUTS`, or with the names of files that the user gave."""
    readers = {}
    for split, name in (_splits(root) | {split: split for split in (*given.json, *given.images)}).items():
        jsons = [path for path, _ in _names(root, name, given)]
        found = next((root / path for path in jsons if (root / path).is_file()), None)
        if found:
            readers[split] = partial(_read, root, name, found, given)
        else:
            raise DataError(f"{root}: no COCO json of the split {split!r}: looked for {_or(jsons)}")
    return Found(readers, lambda split: _or(path for path, _ in _names(root, split, given)))


def _splits(root: Path) -> dict[str, str]:
    """Split -> its name there, of those whose json has one of COCO's names; of unusual splits those with images."""
    called = set()
    for name, _ in LAYOUTS:
        before, after = name.split("{split}")
        pattern = root / before
        for path in filter(Path.is_file, pattern.parent.glob(f"{pattern.name}*{after}")):
            split = path.name[len(pattern.name) : -len(after)]
            folders = (root / images.format(split=split) for _, images in LAYOUTS)
            if split in SPLITS or (split and not split.endswith("2017") and any(map(Path.is_dir, folders))):
                called.add(split)
    usual = {split: name for split in SPLITS for name in reversed(NAMES[split]) if name in called}
    return usual | {name: name for name in sorted(called - set(usual.values()))}


def _names(root: Path, split: str, given: Given) -> list[tuple[Path, Path]]:
    """(json, image folder) of a split by the names that the user gave or, where none are given, by the layouts."""
    names = [(json.format(split=split), images.format(split=split)) for json, images in LAYOUTS]
    return [(given.json.get(split, Path(json)), given.images.get(split, Path(images))) for json, images in names]


def _or(names: Iterable[object]) -> str:
    return " or ".join(dict.fromkeys(map(str, names)))


def _read(
    root: Path, split: str, json_path: Path, given: Given, reading: Reading
) -> tuple[Split | None, list[Problem]]:
    folders = [folder for _, folder in _names(root, split, given)]
    found = next((root / folder for folder in folders if (root / folder).is_dir()), None)
    if found is None:
        raise DataError(f"{root}: no image folder of the split {split!r}: looked for {_or(folders)}")
    return read_coco(json_path, found, reading)


def find_roboflow(root: Path, given: Given) -> Found:
    """Folders of splits that each hold their images and a json."""
    folders = {
        split: next((root / name for name in NAMES[split] if (root / name / ROBOFLOW).is_file()), None)
        for split in NAMES
    }
    folders = {split: folder for split, folder in folders.items() if folder}
    jsons = [folder / ROBOFLOW for folder in folders.values()]
    unused = cache(lambda: _is_unused(jsons))
    readers = {
        split: partial(read_coco, folder / ROBOFLOW, folder, superfluous=unused) for split, folder in folders.items()
    }
    return Found(readers, lambda split: _or(f"{name}/{ROBOFLOW}" for name in NAMES.get(split, (split,))))


def _is_unused(jsons: list[Path]) -> bool:
    """Whether no box of these files is of the category 0, which Roboflow adds as the group of all others."""
    for path in jsons:
        data = read_json(path)
        annotations = data.get("annotations") if isinstance(data, dict) else None
        for annotation in annotations if isinstance(annotations, list) else ():
            if isinstance(annotation, dict) and annotation.get("category_id") == 0:
                return False
    return True


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


def read_coco(
    json_path: Path, image_dir: Path, reading: Reading, superfluous: Callable[[], bool] = lambda: False
) -> tuple[Split | None, list[Problem]]:
    """The split of a json, and all faults that show without its images; None if it has not the structure of one.

    Integers may be written as floats (64.0), and optional fields may be null. Boxes are x, y, width, height in pixels.

    Args:
        superfluous: whether a category 0 is to be left out.

    Raises:
        DataError: the json is missing or does not parse.
    """
    data, file = read_json(json_path), str(json_path)
    problems = _check_structure(data, file)
    if any(problem.kind == "structure" for problem in problems):
        return None, problems
    _tidy(data)
    group = [c for c in data["categories"] if c.get("id") == 0 and _is_int(c["id"])]
    if group and len(group) < len(data["categories"]) and superfluous():
        data["categories"] = [category for category in data["categories"] if category not in group]
        message = f"{_short(group[0].get('name'))} has no box in any split, as the group that Roboflow adds: left out"
        problems.append(Problem(file, "superfluous category", "category 0", "", message, fatal=False))
    problems += [*_check_categories(data, file), *_check_image_entries(data, file), *_check_entries(data, file)]
    named = [c for c in data["categories"] if _is_int(c.get("id")) and isinstance(c.get("name"), str)]
    categories = dict(sorted((c["id"], c["name"]) for c in named))
    draft = Draft(json_path, image_dir, categories, _WORDS, reading)
    draft.problems = problems
    label_of = {category_id: label for label, category_id in enumerate(categories)}
    per_image = defaultdict(list)
    for i, annotation in enumerate(data["annotations"]):
        per_image[_hashable(annotation.get("image_id"))].append((i, annotation))
    whole = not any_fatal(problems)
    for image in data["images"]:
        if not whole and not _is_image(image):
            continue
        path = image_dir / image["file_name"]
        if "\\" in image["file_name"] and not path.exists():  # of Windows
            path = image_dir / image["file_name"].replace("\\", "/")
        draft.image(path, (image["width"], image["height"]), image["id"])
        for i, annotation in per_image[image["id"]]:
            if whole or (_is_box(annotation.get("bbox")) and _hashable(annotation.get("category_id")) in label_of):
                _add(draft, annotation, label_of, i)
    return draft.finish()


def _add(draft: Draft, annotation: dict[str, Any], label_of: dict[int, int], position: int) -> None:
    x, y, width, height = map(float, annotation["bbox"])
    area = annotation.get("area", 0)
    area = float(area) if _is_area(area) and area <= LARGEST_AREA else 0.0
    crowd = annotation.get("iscrowd", 0) == 1
    corners = (x, y, x + width, y + height)
    number = annotation["id"] if _is_int(annotation.get("id")) else f"at position {position}"
    draft.box(corners, label_of[annotation["category_id"]], number, area, crowd)


def _check_structure(data: Any, file: str) -> list[Problem]:
    if not isinstance(data, dict):
        return [Problem(file, "structure", "", "", f"expected a json object, got {_short(data)}")]
    problems = []
    for field in ("categories", "images", "annotations"):
        entries = data.get(field)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            message = f"expected a list of objects, got {_short(entries)}"
            problems.append(Problem(file, "structure", "", field, message))
        elif not entries:
            problems.append(Problem(file, "empty", "", field, "the dataset is empty: expected at least one entry"))
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


def _check_id(kind: str, entry: str, value: Any, ids: set[Any], file: str) -> Iterator[Problem]:
    """Whether an id is an integer, and none of `ids`, those before it, to which it is added."""
    if not _is_int(value):
        yield Problem(file, kind, entry, "id", f"expected an integer, got {_short(value)}")
    elif value in ids:
        yield Problem(file, kind, entry, "id", f"another {kind} has the same id")
    ids.add(_hashable(value))


def _check_categories(data: dict[str, Any], file: str) -> Iterator[Problem]:
    ids, names = set(), set()
    for i, category in enumerate(data["categories"]):
        entry = _name("category", category, i)
        category_id, name = category.get("id"), category.get("name")
        yield from _check_id("category", entry, category_id, ids, file)
        if not isinstance(name, str) or not name:
            yield Problem(file, "category", entry, "name", f"expected a text, got {_short(name)}")
        elif name in names:
            yield Problem(file, "category", entry, "name", f"another category is called {name!r} too")
        names.add(_hashable(name))


def _check_image_entries(data: dict[str, Any], file: str) -> Iterator[Problem]:
    ids, files = set(), {}
    for i, image in enumerate(data["images"]):
        entry = _name("image", image, i)
        file_name = image.get("file_name")
        yield from _check_id("image", entry, image.get("id"), ids, file)
        for field in ("width", "height"):
            if not _is_int(image.get(field)) or not 1 <= image[field] < _MOST_PIXELS:
                got = _short(image.get(field))
                yield Problem(file, "image", entry, field, f"expected a positive integer, pixels, got {got}")
        if not isinstance(file_name, str) or not file_name:
            yield Problem(file, "image", entry, "file_name", f"expected a text, got {_short(file_name)}")
        elif _climbs_out(file_name):
            yield Problem(file, "image", entry, "file_name", f"{file_name!r} leads out of the image folder")
        elif (first := files.setdefault(PurePosixPath(file_name), entry)) != entry:
            yield Problem(file, "image", entry, "file_name", f"{file_name!r} is the file of {first} too")


def _check_entries(data: dict[str, Any], file: str) -> Iterator[Problem]:
    categories = {_hashable(category.get("id")) for category in data["categories"]}
    images = {_hashable(image.get("id")) for image in data["images"]}
    ids = set()
    for i, annotation in enumerate(data["annotations"]):
        entry = _name("annotation", annotation, i)
        yield from _check_id("annotation", entry, annotation.get("id"), ids, file)
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
        area, box = annotation.get("area", 0), annotation.get("bbox")
        if not _is_area(area):
            yield Problem(file, "annotation", entry, "area", f"expected square pixels, got {_short(area)}")
        elif area > LARGEST_AREA:
            message = f"{_short(area)} square pixels is beyond COCO's largest area, 1e10: that of the box is taken"
            yield Problem(file, "area", entry, "area", message, fatal=False)
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            message = f"expected 4 finite numbers x, y, width, height, got {_short(box)}"
            yield Problem(file, "box", entry, "bbox", message)
        elif min(box[2:]) < 0:
            yield Problem(file, "box", entry, "bbox", f"expected a width and height of at least 0, got {box}")


def _is_image(image: dict[str, Any]) -> bool:
    numbers = all(_is_int(image.get(name)) for name in ("id", "width", "height"))
    size = (image.get("width"), image.get("height"))
    return numbers and all(1 <= side < _MOST_PIXELS for side in size) and isinstance(image.get("file_name"), str)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0


def _is_area(area: Any) -> bool:
    return isinstance(area, int | float) and not isinstance(area, bool) and 0 <= area < math.inf


def _climbs_out(file_name: str) -> bool:
    path = PurePosixPath(file_name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:[\\/]", file_name) is not None


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
