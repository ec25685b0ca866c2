"""YOLO: a data.yaml that names classes and images, and beside the images a text file for each with its boxes.

A line holds a class and the box as x and y of its centre, width and height, in fractions of the image; or a class and
the corners of a polygon, whose box is taken. Boxes are of the image as its EXIF orientation turns it. An image without
a text file has no objects.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml

from detr.draft import Draft, Words
from detr.errors import DataError
from detr.formats.found import NAMES, Found, Given
from detr.formats.text import class_names, in_order, is_visible_file, lines, number_of, read_text
from detr.images import SUFFIXES, Reading, for_each, read_header
from detr.problems import Problem, cut
from detr.progress import progress
from detr.split import Split

_WORDS = Words("line")
_SMALL = re.compile("[0-9]{1,4}")
_NULL = ("", "~", "null", "Null", "NULL")  # what YAML has for nothing
_ROUNDING = 1e-6  # how far a number may be outside of [0, 1]
# corners are rounded to so many decimals of a pixel: what is at the border of the image stays there
_DECIMALS = 10


class _Loader(yaml.BaseLoader):
    """Every number and word stays a text, for a class may be called no, or 1; a key that is there twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{cut(key.value)} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def find_yolo(root: Path, given: Given) -> Found:
    """A folder with a data.yaml, or another yaml with its keys, or with classes.txt beside its images; or a yaml."""
    path = root if root.is_file() else _yaml_in(root)
    content: Any = _parse(path) if path else {}
    if path is None and os.path.isfile(root / "classes.txt"):
        path, content = root / "classes.txt", _without_yaml(root)
        path = path if "train" in content else None
    keys = {split: next((name for name in NAMES[split] if content.get(name)), None) for split in NAMES}
    test = content.get("test", [])
    names = [test] if isinstance(test, str) else test
    if names and all(isinstance(name, str) and not _found(path, content, name) for name in names):
        warnings.warn(f"{path}: test: left out, for {names[0]} is not there", stacklevel=2)
        keys["test"] = None  # Roboflow names it whether or not it was exported
    readers = {split: partial(_read, path, content, key) for split, key in keys.items() if key}
    if path and not readers and (root.is_file() or "names" in content):  # else it is of something else
        raise DataError(f"{path}: expected train, the folder of its images or a list of them, got {cut(list(content))}")
    return Found(readers, lambda split: f"data.yaml with {split} and names, or classes.txt with images/ and labels/")


def _yaml_in(root: Path) -> Path | None:
    for name in ("data.yaml", "data.yml"):
        if os.path.isfile(root / name):
            return root / name
    found = []
    for path in sorted(filter(is_visible_file, [*root.glob("*.yaml"), *root.glob("*.yml")])):
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
    return content | {"names": class_names(root / "classes.txt")}


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_text(path), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        # a key without a space after its colon is only found at the next one
        early = error.context_mark if "simple key" in (error.context or "") else None
        mark, problem = early or error.problem_mark or error.context_mark, error.problem or error.context
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        hint = " (expected a space after the ':' of a key)" if early else ""
        hint = " (expected spaces, not tabs)" if "\\t" in problem else hint
        raise DataError(f"{path}: {where}not yaml: {problem}{hint}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not yaml: {cut(str(error))}") from None
    except RecursionError:
        raise DataError(f"{path}: not a dataset: its lists are nested too deep") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values (train, val, names), got {cut(content)!r}")
    return {key: value for key, value in content.items() if value not in _NULL or key == "names"}


def _classes(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Class number -> name."""
    names = content.get("names")
    pairs = list(enumerate(names)) if isinstance(names, list) else []
    try:
        pairs = pairs or [(int(key) if key.isascii() else -1, name) for key, name in names.items()]
    except (AttributeError, ValueError, TypeError):
        raise DataError(f"{path}: names: expected a list of names, or number: name, got {cut(names)}") from None
    if not pairs or min(pairs)[0] < 0:
        raise DataError(f"{path}: names: expected a name for each class, numbered from 0, got {cut(names)}")
    taken: dict[str, int] = {}
    classes: dict[int, str] = {}
    for number, name in pairs:
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: names: expected a text for class {number}, got {cut(name)!r}")
        if number in classes:
            raise DataError(f"{path}: names: class {number} is both {classes[number]!r} and {name!r}")
        if taken.setdefault(name, number) != number:
            raise DataError(f"{path}: names: classes {taken[name]} and {number} are both called {name!r}")
        classes[number] = name
    return dict(sorted(classes.items()))


def _keypoints(content: dict[str, Any], path: Path) -> int:
    """How many numbers follow a box, as points of a pose."""
    shape = content.get("kpt_shape", ["0", "0"])
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_SMALL.fullmatch, map(str, shape))):
        raise DataError(f"{path}: kpt_shape: expected two integers, got {cut(shape)}")
    return int(shape[0]) * int(shape[1])


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
    first: dict[Path, Path] = {}  # image of each file with boxes
    pairs = list(zip(images, headers, strict=True))
    for i, (image, header) in enumerate(progress(pairs, desc=f"boxes of {path}", leave=False, delay=2)):
        if isinstance(header, DataError):
            problems.append(Problem(str(image), "image file", "", "", str(header)))
            continue
        file = next(filter(os.path.lexists, _label_files(image)), None)
        draft.image(image, header.size, i + 1, str(file or image))
        if file:
            labelled += 1
            if first.setdefault(file, image) != image:
                message = f"has the boxes of {first[file]} and of {image}"
                problems.append(Problem(str(file), "label file shared", "", "", message, fatal=False))
            _boxes(file, draft, header.size, label_of, path, more)
    if images and not labelled:
        looked_for = " and ".join(map(str, dict.fromkeys(_label_files(images[0]))))
        message = f"none of the {len(images)} images has a file with boxes: looked for {looked_for}, and so on"
        problems.append(Problem(str(path), "empty", "", key, message))
    return draft.finish()


def _images(path: Path, content: dict[str, Any], key: str, problems: list[Problem]) -> Iterator[Path]:
    """The images of a split: of folders, of lists, or of several of these."""
    seen: dict[str, str] = {}
    for entry in content[key] if isinstance(content[key], list) else [content[key]]:
        if not isinstance(entry, str) or not entry:
            raise DataError(f"{path}: {key}: expected the name of a folder or of a list of images, got {cut(entry)!r}")
        place = _place(path, content, entry, key, problems)
        for where, image in _of_folder(place) if place.is_dir() else _of_list(place, path, content, problems):
            name = os.path.join(os.path.realpath(image.parent), image.name)
            if name not in seen:
                yield image
            else:
                message = f"{image} is named by {seen[name]} too: it is taken once"
                problems.append(Problem(str(path), "image twice", "", key, message, fatal=False))
            seen.setdefault(name, where)


def _base(path: Path, content: dict[str, Any]) -> tuple[Path, bool]:
    """The folder that names in a yaml start from, and whether it is what the yaml says.

    They start from its `path`, which starts from the folder of the yaml; else from that folder.
    """
    base = content.get("path")
    if base is not None and not isinstance(base, str):
        raise DataError(f"{path}: path: expected the name of a folder, got {cut(base)}")
    folder = path.parent / os.path.expanduser(base or "")
    return (folder, True) if os.path.exists(folder) else (path.parent, False)


def _places(path: Path, content: dict[str, Any], entry: str) -> list[Path]:
    """Where a folder or list that a yaml names may be, the best place first."""
    names = [os.path.expanduser(entry), entry.replace("\\", "/")]
    # Roboflow writes ../train/images and means train/images
    names = [*(name.removeprefix("../") for name in names), *names]
    return [_base(path, content)[0] / name for name in dict.fromkeys(names)]


def _found(path: Path, content: dict[str, Any], entry: str) -> Path | None:
    """Where it is."""
    there = next(filter(os.path.exists, _places(path, content, entry)), None)
    return there or _without_first_folders(entry, [_base(path, content)[0]])


def _place(path: Path, content: dict[str, Any], entry: str, key: str, problems: list[Problem]) -> Path:
    places, (base, as_said), found = _places(path, content, entry), _base(path, content), _found(path, content, entry)
    if found is None:
        looked_for = entry if entry[1:2] == ":" else " or ".join(dict.fromkeys(map(os.path.normpath, places)))
        hint = "; without a line val: a part of the training images is held out" if key in NAMES["val"] else ""
        raise DataError(f"{path}: {key}: no folder or list of images at {looked_for}{hint}")
    literal = [place for place in places if ".." in place.parts and os.path.exists(place)]
    if found in places and literal and found not in literal:
        other = os.path.normpath(literal[0])
        _warn(problems, path, key, f"{entry} is taken for {found}, although {other} is there too")
    if found not in places:
        _warn(problems, path, key, f"{entry} is not there: {found} is taken")
    if not as_said:
        _warn(problems, path, "path", f"{content['path']} is not there: names start from {base}")
    return Path(os.path.normpath(found))


def _without_first_folders(name: str, bases: list[Path]) -> Path | None:
    """Where a name leads without its first folders, as on another computer: the longest rest that is there."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part != ".."]
    # one name alone would say too little
    places = (base.joinpath(*parts[i:]) for i in range(1, len(parts) - 1) for base in bases)
    return next(filter(os.path.exists, places), None)


def _warn(problems: list[Problem], path: Path, field: str, message: str) -> None:
    problem = Problem(str(path), "path", "", field, message, fatal=False)
    if problem not in problems:
        problems.append(problem)


def _of_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    """The images in a folder and those below it; a folder that is there twice, by a link, is taken once."""
    found: list[Path] = []
    seen: set[str] = set()

    def complain(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: not read: {error.strerror}") from None

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=complain):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]  # Jupyter's copies, for example
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        images = (Path(parent, name) for name in names if Path(name).suffix.lower() in SUFFIXES)
        found += filter(is_visible_file, images)
    for image in sorted(found, key=in_order):
        yield str(folder), image


def _of_list(file: Path, path: Path, content: dict[str, Any], problems: list[Problem]) -> Iterator[tuple[str, Path]]:
    bases = list(dict.fromkeys([file.parent, _base(path, content)[0], path.parent]))
    for number, line in enumerate(lines(read_text(file)), start=1):
        name = line.strip()
        if not name:
            continue
        places = [base / os.path.expanduser(text) for base in bases for text in (name, name.replace("\\", "/"))]
        image = next(filter(os.path.isfile, places), None) or _without_first_folders(name, bases)
        if image is None or not os.path.isfile(image):
            message = f"no image at {cut(os.path.normpath(places[0]), 300)}"
            problems.append(Problem(str(file), "image file", f"line {number}", "", message))
            continue
        if image not in places:
            message = f"{name} is not there: {image} is taken"
            problems.append(Problem(str(file), "path", f"line {number}", "", message, fatal=False))
        yield f"{file}: line {number}", Path(os.path.normpath(image))


def _label_files(image: Path) -> list[Path]:
    """Where the boxes of an image may be: in labels/ in the place of the last images/ of its path, or beside it."""
    file = image.with_suffix(".txt")
    for path in (file, Path(os.path.abspath(file))):
        folders = list(path.parts[:-1])
        if "images" in folders:
            last = len(folders) - 1 - folders[::-1].index("images")
            return [Path(*folders[:last], "labels", *path.parts[last + 1 :]), file]
    return [file]


def _boxes(file: Path, draft: Draft, size: tuple[int, int], label_of: dict[int, int], path: Path, more: int) -> None:
    """Add the boxes of a text file to the last image of a draft."""
    try:
        texts = lines(read_text(file))
    except DataError as error:
        draft.problems.append(Problem(str(file), "label file", "", "", str(error).removeprefix(f"{file}: ")))
        return
    for number, line in enumerate(texts, start=1):
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
        known = cut(", ".join(map(str, label_of))) if max(label_of) >= len(label_of) else f"0 to {max(label_of)}"
        raise DataError(f"class {cut(word)}, and {path} names the classes {known}, counted from 0")
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
    value = number_of(word)
    if not math.isfinite(value):
        raise DataError(f"expected finite numbers, got {cut(word)}")
    return value
