"""Detection on image files: a picture with boxes for each, and one json."""

import codecs
import glob
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from detr import run_folder
from detr.detections import Detections
from detr.detector import Detector
from detr.errors import DataError, OutputError
from detr.images import DEEP, DEFAULT_READING, SUFFIXES, Reading, read_header, read_image
from detr.output import Folder, Written, picture_of
from detr.progress import progress

BY = "detr predict"
RESULTS = "predictions.json"
_DEPTH = 10  # of lists that name lists


def find_images(inputs: list[str]) -> list[tuple[Path, Path]]:
    """The image files that `inputs` name, each with a relative path to write it to.

    An input is an image, a folder, a glob pattern, or a text file (.txt) with one of these on each line: from the
    current folder or, where nothing is there, from the folder of the text file. It is in UTF-8, in UTF-16 with a byte
    order mark, or in Latin-1. In folders and patterns the pictures that `detr predict` and `detr train` wrote are left
    out, with a warning. The path to write to is that of the image, with .png after a suffix that is not in SUFFIXES.

    Raises:
        DataError: an input names nothing, a text file itself, or two images would be written to one file.
    """
    found: dict[Path, Path] = {}
    written = Written()
    for where, text in _without_lists([("", text) for text in inputs]):
        path, own = Path(text), []
        if path.exists() and not path.is_dir():
            pairs = [(path, Path(path.name))]
        else:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
                pairs = [(p, p.relative_to(path)) for p in inside]
            else:
                pairs = [(Path(name), Path(Path(name).name)) for name in sorted(glob.glob(text, recursive=True))]
            own = [source for source, _ in pairs if written.by(source) in (BY, run_folder.BY)]
            left_out = set(own)
            pairs = [pair for pair in pairs if pair[0] not in left_out]
        if own:
            warnings.warn(f"{text}: left out {len(own)} pictures that detr wrote, the first: {own[0]}", stacklevel=2)
        if not pairs:
            raise DataError(f"{where}{text}: expected an image, a folder of images or a pattern, found no image")
        for source, target in pairs:
            if found.setdefault(target, source) != source:
                raise DataError(f"{source}: {found[target]} has the same name; predict them one after the other")
    return [(source, _writable(target, found)) for target, source in found.items()]


def _writable(target: Path, taken: dict[Path, Path]) -> Path:
    path = target
    while path.suffix.lower() not in SUFFIXES or (path != target and path in taken):
        path = path.with_name(f"{path.name}.png")
    return path


def _without_lists(inputs: list[tuple[str, str]], above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(where it stands, input), with the lines of a text file in its place. `above`: the files that they stand in."""
    for where, text in inputs:
        path = Path(text)
        if path.suffix.lower() == ".txt" and path.is_file():
            if os.path.realpath(path) in above or len(above) == _DEPTH:
                raise DataError(f"{where}{text}: a list that names itself, or stands in {_DEPTH} others")
            lines = _lines(path)
            if not lines:
                raise DataError(f"{where}{text}: expected an image, a folder or a pattern on each line, found none")
            yield from _without_lists(lines, (*above, os.path.realpath(path)))
        else:
            yield where, text


def _lines(path: Path) -> list[tuple[str, str]]:
    """Where it stands, and what it names, of each line that is not empty."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start}: not UTF-16: {error.reason}") from None
    if b"\0" in content:
        raise DataError(f"{path}: expected text in UTF-8, in UTF-16 with a byte order mark, or in Latin-1")
    lines = enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1)
    return [(f"{path}: line {i}: ", _name(line.strip(), str(path.parent))) for i, line in lines if line.strip()]


def _name(line: bytes, folder: str) -> str:
    """The path or pattern that a line means: the first reading of it that names something, else the last."""
    try:
        names = (line.decode(),)
    except UnicodeDecodeError:  # the bytes of a file's name as they are, or Latin-1
        names = (line.decode(errors="surrogateescape"), line.decode("latin-1"))
    for name in names:
        for place in (name, os.path.join(folder, name), os.path.join(glob.escape(folder), name)):
            if os.path.lexists(place) or glob.glob(place, recursive=True):
                return place
    return names[-1]


def write_predictions(
    detector: Detector,
    images: list[tuple[Path, Path]],
    out: Path,
    threshold: float | None = None,
    batch_size: int = 1,
    reading: Reading = DEFAULT_READING,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write `out`/predictions.json with the detections of all images, then `out`/<picture with boxes> for each.

    Args:
        images: as from `find_images`. threshold, batch_size: as of `Detector.predict`.

    Returns:
        The content of the json: `Detections.to_dict` of each image file, as many objects as the model has queries at
        most. And one message for each file that could not be read or drawn; a picture that an earlier call drew of it
        is removed.

    Raises:
        OutputError: before the first image, if a file is in the way that `detr predict` did not write. DataError: an
        image has the name of the json.
        NotFiniteError: the model gives no numbers.
    """
    folder = Folder(out, BY)
    taken = next((source for source, target in images if target.parts[0] == RESULTS), None)
    if taken:
        raise DataError(f"{taken}: its picture would be in the place of {out / RESULTS}")
    folder.claim([RESULTS, *(target.as_posix() for _, target in images)])
    failed, deep = {}, False

    def readable() -> Iterator[tuple[Path, Image.Image]]:
        nonlocal deep
        for source, target in progress(images, desc="detecting", unit="image", delay=2):
            try:
                header, picture = read_header(source, None, reading), read_image(source, None, reading)
            except DataError as error:
                failed[target] = f"{source}: {error}"
                continue
            if header.deep and not deep:
                warnings.warn(f"{source}: {DEEP}", stacklevel=2)
            deep |= header.deep
            yield source, picture

    found: dict[Path, Detections] = dict(detector.stream(readable(), threshold, batch_size))
    results = [found[source].to_dict() for source, _ in images if source in found]
    lines = ",\n".join(json.dumps(result) for result in results)
    folder.remove(target.as_posix() for target in failed)
    folder.write(RESULTS, f"[\n{lines}\n]\n".encode())
    for source, target in progress(images, desc="drawing", unit="image", delay=2):
        if target in failed:
            continue
        try:
            drawn = found[source].draw(read_image(source, None, reading))
            picture = picture_of(drawn, target.suffix, BY)
        except (DataError, OutputError) as error:
            failed[target] = f"{source}: no picture of it: {error}"
            folder.remove([target.as_posix()])
        else:
            folder.write(target.as_posix(), picture)
    return results, list(failed.values())
