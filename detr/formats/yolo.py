"""YOLO: a data.yaml that names classes and images, and beside the images a text file for each with its boxes.

A line holds a class and the box as x and y of its centre, width and height, in fractions of the image; or a class and
the corners of a polygon, whose box is taken. Boxes are of the image as its EXIF orientation turns it. An image without
a text file has no objects.
"""

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from detr.draft import Draft, Words
from detr.errors import DataError
from detr.formats.found import NAMES, Found, Given, read_text
from detr.images import SUFFIXES, Reading, for_each, read_header
from detr.problems import Problem, cut
from detr.progress import progress
from detr.split import Split

_WORDS = Words("line")
_ROUNDING = 1e-6  # how far a number may be outside of [0, 1]
# corners are rounded to so many decimals of a pixel: what is at the border of the image stays there
_DECIMALS = 10


def find_yolo(root: Path, given: Given) -> Found:
    """A folder with a data.yaml, or another yaml with its keys, or with classes.txt beside its images; or a yaml."""
    path = root if root.is_file() else _yaml_in(root)
    content: Any = _parse(path) if path else {}
    if path is None and (root / "classes.txt").is_file():
        path, content = root / "classes.txt", _without_yaml(root)
        path = path if "train" in content else None
    keys = {split: next((name for name in NAMES[split] if content.get(name)), None) for split in NAMES}
    readers = {split: partial(_read, path, content, key) for split, key in keys.items() if key}
    if path and not readers and (root.is_file() or "names" in content):  # else it is of something else
        raise DataError(f"{path}: expected train, the folder of its images or a list of them, got {cut(list(content))}")
    return Found(readers, lambda split: f"data.yaml with {split} and names")


def _yaml_in(root: Path) -> Path | None:
    for name in ("data.yaml", "data.yml"):
        if (root / name).is_file():
            return root / name
    found = []
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content = _parse(path)
        except DataError:
            continue  # of something else
        if "names" in content and "train" in content:
            found.append(path)
    if len(found) > 1:
        raise DataError(f"{root}: several files name classes and images: give one of {', '.join(map(str, found))}")
    return found[0] if found else None


def _without_yaml(root: Path) -> dict[str, Any]:
    """What a data.yaml would say of a folder with classes.txt, or nothing if there are no boxes of YOLO.

    Label Studio writes images/ and labels/, which may have train/ and val/ in them; labelImg has one folder for all.
    """
    if (root / "labels").is_dir() and (root / "images").is_dir():
        places = [(split, name) for split in NAMES for name in NAMES[split] if (root / "images" / name).is_dir()]
        content: dict[str, Any] = {split: f"images/{name}" for split, name in places} or {"train": "images"}
    elif any(path.suffix.lower() in SUFFIXES and path.with_suffix(".txt").is_file() for path in root.iterdir()):
        content = {"train": "."}
    else:
        return {}
    return content | {"names": [line.strip() for line in read_text(root / "classes.txt").splitlines() if line.strip()]}


def _parse(path: Path) -> dict[str, Any]:
    """The content of a yaml, in which every number and word stays a text: a class may be called no, or 1."""
    try:
        content = yaml.load(read_text(path), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        raise DataError(f"{path}: {where}not yaml: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not yaml: {cut(error)}") from None
    except RecursionError:
        raise DataError(f"{path}: not a dataset: its lists are nested too deep") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values (train, val, names), got {cut(content)!r}")
    return content


def _classes(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Class number -> name."""
    names = content.get("names")
    try:
        classes = dict(enumerate(names)) if isinstance(names, list) else {int(k): name for k, name in names.items()}
    except (AttributeError, ValueError, TypeError):
        raise DataError(f"{path}: names: expected a list of names, or number: name, got {cut(names)}") from None
    if not classes or min(classes) < 0:
        raise DataError(f"{path}: names: expected a name for each class, numbered from 0, got {cut(names)}")
    for number, name in classes.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: names: expected a text for class {number}, got {cut(name)!r}")
        first = next(k for k, other in classes.items() if other == name)
        if first != number:
            raise DataError(f"{path}: names: classes {first} and {number} are both called {name!r}")
    return dict(sorted(classes.items()))


def _keypoints(content: dict[str, Any], path: Path) -> int:
    """How many numbers follow a box, as points of a pose."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    try:
        points, numbers = map(int, shape)
        return points * numbers
    except (TypeError, ValueError):
        raise DataError(f"{path}: kpt_shape: expected two integers, got {cut(shape)}") from None


def _read(path: Path, content: dict[str, Any], key: str, reading: Reading) -> tuple[Split, list[Problem]]:
    classes, more = _classes(content, path), _keypoints(content, path)
    problems: list[Problem] = []
    if content.get("nc", str(len(classes))) != str(len(classes)):
        message = f"is {cut(content['nc'])}, and there are {len(classes)} names, which count"
        problems.append(Problem(str(path), "number of classes", "", "nc", message, fatal=False))
    images = list(_images(path, content, key, problems))
    if not images and not problems:
        raise DataError(f"{path}: {key}: expected images, found none in {cut(content[key])}")
    folder = Path(os.path.commonpath([os.path.abspath(image.parent) for image in images]) if images else path.parent)
    draft = Draft(path, folder, classes, _WORDS, reading, own_ids=False, own_sizes=False)
    draft.problems = problems
    headers = for_each(lambda image: read_header(image, None, reading), images, f"sizes of the images of {path}")
    label_of, labelled = {number: label for label, number in enumerate(classes)}, 0
    pairs = zip(images, headers, strict=True)
    for i, (image, header) in enumerate(
        progress(pairs, desc=f"boxes of {path}", total=len(images), leave=False, delay=2)
    ):
        if isinstance(header, DataError):
            problems.append(Problem(str(image), "image file", "", "", str(header)))
            continue
        file = next((file for file in label_files(image) if file.is_file()), None)
        draft.image(image, header.size, i + 1, str(file or image))
        if file:
            labelled += 1
            _boxes(file, draft, header.size, label_of, path, more)
    if images and not labelled:
        looked_for = " and ".join(map(str, dict.fromkeys(label_files(images[0]))))
        message = f"none of the {len(images)} images has a file with boxes: looked for {looked_for}, and so on"
        problems.append(Problem(str(path), "empty", "", key, message))
    return draft.finish()


def _images(path: Path, content: dict[str, Any], key: str, problems: list[Problem]) -> Iterator[Path]:
    """The images of a split: of folders, of lists, or of several of these."""
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    seen: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise DataError(f"{path}: {key}: expected the name of a folder or of a list of images, got {cut(entry)!r}")
        place = _place(path, content, entry, key, problems)
        for where, image in _of_folder(place) if place.is_dir() else _of_list(place, path, content, problems):
            first = seen.setdefault(os.path.abspath(image), where)
            if first == where:
                yield image
            else:
                message = f"{image} is named by {first} too: it is taken once"
                problems.append(Problem(str(path), "image twice", "", key, message, fatal=False))


def _bases(path: Path, content: dict[str, Any]) -> list[Path]:
    """The folders that names in a yaml start from: its `path`, and where the yaml is."""
    base = content.get("path")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{path}: path: expected the name of a folder, got {cut(base)}")
    bases = [path.parent / os.path.expanduser(base), Path.cwd() / os.path.expanduser(base)] if base else []
    return [*bases, path.parent]


def _place(path: Path, content: dict[str, Any], entry: str, key: str, problems: list[Problem]) -> Path:
    bases = _bases(path, content)
    names = [os.path.expanduser(entry), entry.replace("\\", "/")]
    # Roboflow writes ../train/images and means train/images
    names += [name.removeprefix("../") for name in names]
    places = [base / name for name in dict.fromkeys(names) for base in bases]
    found = next((place for place in places if place.exists()), None)
    if found is not None and content.get("path") and not any(base.exists() for base in bases[:-1]):
        _warn(problems, path, "path", f"{content['path']} is not there: names start from {path.parent}")
    if found is None and (found := _of_another_computer(entry, bases)):
        _warn(problems, path, key, f"{entry} is not there: {found} is taken")
    if found is None:
        looked_for = " or ".join(dict.fromkeys(map(os.path.normpath, places)))
        raise DataError(f"{path}: {key}: no folder or list of images at {looked_for}")
    return Path(os.path.normpath(found))


def _of_another_computer(name: str, bases: list[Path]) -> Path | None:
    """Where an absolute path of Linux or Windows leads without its first folders: the longest rest that is there."""
    text = name.replace("\\", "/")
    if not text.startswith("/") and text[1:2] != ":":
        return None
    parts = PurePosixPath(text).parts[1:]
    places = (base.joinpath(*parts[i:]) for i in range(len(parts)) for base in bases)
    return next((place for place in places if place.exists()), None)


def _warn(problems: list[Problem], path: Path, field: str, message: str) -> None:
    problem = Problem(str(path), "path", "", field, message, fatal=False)
    if problem not in problems:
        problems.append(problem)


def _of_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in seen]
        seen |= {os.path.realpath(os.path.join(parent, name)) for name in folders}
        # macOS leaves files ._a.jpg that are no images
        found += [Path(parent, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    for image in sorted(found):
        yield str(folder), image


def _of_list(file: Path, path: Path, content: dict[str, Any], problems: list[Problem]) -> Iterator[tuple[str, Path]]:
    bases = [file.parent, *_bases(path, content)]
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        places = [base / os.path.expanduser(text) for base in bases for text in (name, name.replace("\\", "/"))]
        image = next((place for place in places if place.is_file()), None)
        if image is None and (image := _of_another_computer(name, bases)) and not image.is_file():
            image = None
        if image is None:
            message = f"no image at {os.path.normpath(places[0])}"
            problems.append(Problem(str(file), "image file", f"line {number}", "", message))
            continue
        if image not in places:
            message = f"{name} is not there: {image} is taken"
            problems.append(Problem(str(file), "path", f"line {number}", "", message, fatal=False))
        yield f"{file}: line {number}", Path(os.path.normpath(image))


def label_files(image: Path) -> list[Path]:
    """Where the boxes of an image may be: in labels/ in the place of the last images/ of its path, or beside it."""
    parts, file = list(image.parts), image.with_suffix(".txt")
    if "images" not in parts[:-1]:
        return [file]
    last = len(parts) - 2 - parts[:-1][::-1].index("images")
    return [Path(*parts[:last], "labels", *file.parts[last + 1 :]), file]


def _boxes(file: Path, draft: Draft, size: tuple[int, int], label_of: dict[int, int], path: Path, more: int) -> None:
    """Add the boxes of a text file to the last image of a draft."""
    try:
        lines = read_text(file).splitlines()
    except DataError as error:
        draft.problems.append(Problem(str(file), "label file", "", "", str(error).removeprefix(f"{file}: ")))
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            label = _label(words[0], label_of, path)
            corners = _corners(words[1:], size, more)
        except DataError as error:
            draft.problems.append(Problem(str(file), "label line", f"line {number}", "", str(error)))
        else:
            draft.box(corners, label, number)


def _label(word: str, label_of: dict[int, int], path: Path) -> int:
    value = _number(word)
    if not value.is_integer() or value < 0:
        raise DataError(f"expected the number of a class first, got {cut(word)}")
    if int(value) not in label_of:
        known = f"{min(label_of)} to {max(label_of)}" if len(label_of) > 1 else f"only {min(label_of)}"
        raise DataError(f"class {int(value)}, and {path} names {len(label_of)} classes, {known}")
    return label_of[int(value)]


def _corners(words: list[str], size: tuple[int, int], more: int) -> tuple[float, ...]:
    """x0, y0, x1, y1 in pixels, of a box or of a polygon of at least three corners."""
    count = len(words)
    polygon = not more and count >= 6 and count % 2 == 0
    if count != 4 + more and not polygon:
        expected = (
            "a class and 4 numbers (centre x, y, width, height), or a class and the corners of a polygon, 3 or more"
        )
        if more:
            expected = f"a class, a box of 4 numbers, and {more} numbers of points"
        hint = ": a detection with its score?" if count == 5 and not more else ""
        raise DataError(f"expected {expected}; got {count + 1} numbers{hint}")
    values = [_number(word) for word in words[: 4 if more else count]]
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        wrong = next(w for w, value in zip(words, values, strict=False) if not -_ROUNDING <= value <= 1 + _ROUNDING)
        raise DataError(f"expected fractions of the image, 0 to 1, got {cut(wrong)}")
    if polygon:
        low, high = (min(values[::2]), min(values[1::2])), (max(values[::2]), max(values[1::2]))
    else:
        x, y, width, height = values
        low, high = (x - width / 2, y - height / 2), (x + width / 2, y + height / 2)
    return tuple(round(v * side, _DECIMALS) for v, side in zip((*low, *high), (*size, *size), strict=True))


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"expected finite numbers, got {cut(word)}")
    return value
