"""Pascal VOC: an xml for each image, with the corner pixels of its boxes, which count from 1 and belong to the box.

Objects that are marked difficult are crowds: neither trained on nor counted. Classes have no numbers there: they come
in the order that the user gives, of classes.txt, or of the alphabet.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from detr.draft import Draft, Words
from detr.errors import DataError
from detr.formats.found import NAMES, Found, Given
from detr.formats.text import class_names, in_order, is_visible_file, lines, number_of, read_text
from detr.images import SUFFIXES, Reading, for_each, read_header
from detr.problems import Problem, cut
from detr.progress import progress
from detr.split import Split

_WORDS = Words("object", "bndbox", first_pixel=1)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DIFFICULT = {"0": False, "false": False, "no": False, "unspecified": False, "1": True, "true": True, "yes": True}
_LISTS = {"train": ("trainval",), "val": ("validation",), "test": ()}  # other names of lists, in any case
_ANNOTATIONS = ("Annotations", "annotations")
_IMAGES = ("JPEGImages", "images", "Images")


class _Object(NamedTuple):
    number: int  # from 1, in its xml
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class _Xml(NamedTuple):
    file_name: str
    size: tuple[int, int] | None  # (width, height), if the xml has it
    objects: list[_Object]
    problems: list[Problem]


class _Place(NamedTuple):
    """The xml files of a split, and the folder of its images."""

    source: Path
    xmls: list[tuple[str, Path]]  # where it is named, and the file
    image_dir: Path


def find_voc(root: Path, given: Given) -> Found:
    """Annotations/ and JPEGImages/, with the lists of ImageSets/Main if there are any; or xml files beside the images,
    in a folder for each split or in one."""
    places = _places(root) if root.is_dir() else {}
    dataset = _Voc(root, given, places)
    return Found({split: partial(dataset.read, split) for split in places}, _looked_for)


def _looked_for(split: str) -> str:
    lists = f"Annotations/*.xml, with ImageSets/Main/{split}.txt if there are lists"
    return f"{lists}, or {split}/*.xml{' or *.xml' if split == 'train' else ''} beside images"


def _places(root: Path) -> dict[str, _Place]:
    whole = next(filter(None, (_place(root, name) for name in _ANNOTATIONS)), None)
    if whole is None:
        folders = [(split, root / name) for split in NAMES for name in NAMES[split]]
        found = [(split, _place(folder, name)) for split, folder in folders for name in (*_ANNOTATIONS, "")]
        places = {split: place for split, place in reversed(found) if place}
        beside = None if places else _place(root, "")
        return {split: places[split] for split in NAMES if split in places} or ({"train": beside} if beside else {})
    lists = {file.stem.lower(): file for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    pairs = [(split, lists.get(name)) for split in NAMES for name in reversed((*NAMES[split], *_LISTS[split]))]
    named = {split: file for split, file in pairs if file}
    folder = whole.xmls[0][1].parent
    return {s: _Place(file, list(_listed(file, folder)), whole.image_dir) for s, file in named.items()} or {
        "train": whole
    }


def _place(folder: Path, name: str) -> _Place | None:
    """The xml files of a folder: in its folder of this name, or for "" beside the images."""
    annotations = folder / name
    xmls = sorted(filter(is_visible_file, annotations.glob("*.xml")), key=in_order)
    if not any(map(_is_voc, xmls[:5])):
        return None
    folders = [folder / images for images in _IMAGES if name] + [folder, annotations]
    return _Place(annotations, [("", xml) for xml in xmls], next(filter(_images, folders), folders[0]))


def _is_voc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return re.search(rb"<annotation[\s>]", file.read(4096)) is not None
    except OSError:
        return False


def _listed(file: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for number, line in enumerate(lines(read_text(file)), start=1):
        name = line.strip()
        if name:
            # a list of one class has 1, 0 or -1 after each name
            names = [name, re.sub(r"\s+-?[01]$", "", name)]
            names += [Path(name).stem] if Path(name).suffix.lower() in SUFFIXES else []
            xmls = [folder / f"{text}.xml" for text in names]
            yield f"{file}: line {number}", next(filter(os.path.isfile, xmls), xmls[0])


class _Voc:
    """A dataset whose xml files are parsed once, for all its splits have the same classes."""

    def __init__(self, root: Path, given: Given, places: dict[str, _Place]) -> None:
        self.root, self.given, self.places = root, given, places
        self._parsed: dict[Path, _Xml] = {}

    def _classes(self) -> tuple[list[str], str]:
        """The names in the order of labels, and where they are from."""
        file = self.root / "classes.txt"
        if self.given.classes:
            return list(self.given.classes), "--classes"
        if file.is_file():
            return class_names(file), str(file)
        xmls = (xml for place in self.places.values() for _, xml in place.xmls if os.path.isfile(xml))
        return sorted({found.name for xml in xmls for found in self._xml(xml).objects}), ""

    def _xml(self, path: Path) -> _Xml:
        if path not in self._parsed:
            self._parsed[path] = _parse(path)
        return self._parsed[path]

    def read(self, split: str, reading: Reading) -> tuple[Split | None, list[Problem]]:
        place, (names, names_from) = self.places[split], self._classes()
        categories = dict(enumerate(names, start=1))
        label_of = {name: label for label, name in enumerate(names)}
        draft = Draft(place.source, place.image_dir, categories, _WORDS, reading, own_ids=False)
        problems, images = draft.problems, _images(place.image_dir)
        xmls: dict[Path, str] = {}
        for where, path in place.xmls:
            if not os.path.isfile(path):
                problems.append(Problem(where, "xml file", "", "", f"no xml at {path}"))
            elif xmls.setdefault(path, where) != where:
                problems.append(Problem(where, "image twice", "", "", f"{path} is named by {xmls[path]} too", False))
        same_stem = {image.stem: image for image in reversed(images.values())}
        pictures = [_picture(path, self._xml(path), images, same_stem) for path in xmls]
        unsized = [image for path, image in zip(xmls, pictures, strict=True) if image and not self._xml(path).size]
        sizes = dict(zip(unsized, for_each(partial(_size, reading=reading), unsized, f"sizes of {split}"), strict=True))
        pairs, first = zip(xmls, pictures, strict=True), {}
        for path, image in progress(pairs, desc=f"boxes of {split}", total=len(xmls), leave=False, delay=2):
            xml = self._xml(path)
            problems += xml.problems
            size = xml.size or sizes.get(image)
            if image is None:
                message = f"no image in {place.image_dir} for it: looked for {path.stem} and {cut(xml.file_name)}"
                problems.append(Problem(str(path), "image file", "", "filename", message))
            elif isinstance(size, DataError):
                problems.append(Problem(str(path), "image file", "", "", f"{image}: {size}"))
            elif image in first:
                message = f"{image} is the image of {first[image]} too"
                problems.append(Problem(str(path), "image", "", "filename", message))
            else:
                first[image] = path
                draft.image(image, size, len(draft) + 1, str(path))
                for found in xml.objects:
                    _add(draft, found, path, label_of, names_from)
        if not any(where for where, _ in place.xmls):  # there is no list of those that are meant
            for image in sorted(set(images.values()) - set(pictures)):
                problems.append(Problem(str(image), "image without xml", "", "", "is left out", fatal=False))
        return draft.finish()


def _add(draft: Draft, found: _Object, path: Path, label_of: dict[str, int], names_from: str) -> None:
    entry = f"object {found.number}"
    if found.name not in label_of:
        message = f"class {cut(found.name)!r} is not one of {names_from}"
        draft.problems.append(Problem(str(path), "class", entry, "name", message))
        return
    if found.difficult:
        message = "is difficult, so it is treated as a crowd: neither trained on nor counted"
        draft.problems.append(Problem(str(path), "difficult", entry, "difficult", message, fatal=False))
    x0, y0, x1, y1 = found.corners
    if 0 <= min(x0, y0) < 1:
        message = f"corners count from 1, so {min(x0, y0):g} is outside: taken for the border of the image"
        draft.problems.append(Problem(str(path), "corner 0", entry, "bndbox", message, fatal=False))
    draft.box((x0 - 1, y0 - 1, x1, y1), label_of[found.name], found.number, crowd=found.difficult)


def _images(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names."""
    if not folder.is_dir():
        return {}
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES)
    return {path.name: path for path in filter(is_visible_file, files)}


def _picture(path: Path, xml: _Xml, images: dict[str, Path], same_stem: dict[str, Path]) -> Path | None:
    """The image of an xml: of its name or, where there is none, the one that it names."""
    named = PurePosixPath(xml.file_name.replace("\\", "/")).name
    if PurePosixPath(named).stem == path.stem and named in images:
        return images[named]
    return same_stem.get(path.stem) or images.get(named)


def _size(image: Path, reading: Reading) -> tuple[int, int]:
    return read_header(image, None, reading).size


def _parse(path: Path) -> _Xml:
    def broken(message: str) -> _Xml:
        # any size: what is not read has to be measured neither
        return _Xml("", (1, 1), [], [Problem(str(path), "xml", "", "", message)])

    try:
        root = fromstring(path.read_bytes())
    except ParseError as error:
        line, column = error.position
        return broken(f"line {line} column {column + 1}: not xml: {str(error).partition(':')[0]}")
    except OSError as error:
        return broken(f"not read: {error.strerror}")
    except DefusedXmlException:
        return broken("refused: it defines entities, by which a small file fills the memory")
    except (ValueError, LookupError, RecursionError) as error:
        return broken(f"not xml: {cut(error)}")
    if root.tag != "annotation":
        return broken(f"expected <annotation>, got <{cut(root.tag)}>")
    problems: list[Problem] = []
    size = _size_of(root, path, problems)
    objects = list(_objects(root, path, problems))
    return _Xml((root.findtext("filename") or "").strip(), size, objects, problems)


def _size_of(root: Element, path: Path, problems: list[Problem]) -> tuple[int, int] | None:
    """(width, height); None where the xml has none, or 0, as some tools write."""
    sides = []
    for name in ("width", "height"):
        text = (root.findtext(f"size/{name}") or "").strip() or "0"
        value = number_of(text)
        if not value.is_integer() or not 0 <= value < 1e9:
            problems.append(Problem(str(path), "size", "size", name, f"expected an integer, pixels, got {cut(text)}"))
            value = 0
        sides.append(int(value))
    return (sides[0], sides[1]) if min(sides) > 0 else None


def _objects(root: Element, path: Path, problems: list[Problem]) -> Iterator[_Object]:
    for number, element in enumerate(root.iterfind("object"), start=1):
        name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
        fault = _fault(element, name, box)
        if fault:
            problems.append(Problem(str(path), "object", f"object {number}", *fault))
            continue
        difficult = _DIFFICULT[_difficult(element)]
        yield _Object(number, name, tuple(_corners(box)), difficult)


def _difficult(element: Element) -> str:
    return (element.findtext("difficult") or "").strip().lower() or "0"


def _fault(element: Element, name: str, box: Element | None) -> tuple[str, str] | None:
    """(field, message) of what is wrong with an object, or None."""
    for field in ("name", "bndbox", "difficult"):
        if (count := len(element.findall(field))) > 1:
            return field, f"expected one, got {count}"
    if _difficult(element) not in _DIFFICULT:
        return "difficult", f"expected 0 or 1, got {cut(_difficult(element))}"
    if not name:
        return "name", "expected a text, got nothing"
    if box is None:
        return "bndbox", "expected a box, got none"
    corners = list(_corners(box))
    if not all(map(math.isfinite, corners)) or max(map(abs, corners)) >= 1e9:
        texts = cut([box.findtext(corner) for corner in _CORNERS])
        return "bndbox", f"expected 4 finite numbers xmin, ymin, xmax, ymax, got {texts}"
    x0, y0, x1, y1 = corners
    if x1 < x0 or y1 < y0:
        got = ", ".join(f"{name} {v:g}" for name, v in zip(_CORNERS, corners, strict=True))
        return "bndbox", f"expected xmin <= xmax and ymin <= ymax, got {got}"
    return None


def _corners(box: Element) -> Iterable[float]:
    return (number_of((box.findtext(corner) or "").strip()) for corner in _CORNERS)
