"""A dataset in another format: COCO json or YOLO, from splits of any format."""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from detr.errors import DataError
from detr.images import SUFFIXES, Header, for_each, read_header
from detr.output import WRITTEN_BY, Folder, OutputError
from detr.progress import progress
from detr.split import SPLITS, Split

BY = "detr convert"


def convert(splits: dict[str, Split], out: Path, to: str, images: str) -> list[str]:
    """Write splits to a folder, as `detr.splits` then reads them again.

    Args:
        splits: name -> split; all with the same classes.
        to: "coco", instances_{split}.json beside a folder of images for each split; or "yolo", data.yaml, images/ and
            labels/, where crowds are left out and boxes are of the image as its EXIF orientation turns it.
        images: "copy" the files, or make symbolic links to them ("link").

    Returns:
        Lines that say what the format could not take.

    Raises:
        OutputError: a file is in the way that `detr convert` did not write, or that is not of this dataset. DataError:
        an image cannot be read, or its name is not one that the format knows as an image.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if to == "yolo" and unknown:
        raise DataError(f"split {unknown[0]!r}: expected one of {', '.join(SPLITS)}, which YOLO has")
    names = {split: _names(content, to == "yolo") for split, content in splits.items()}
    folders = {split: f"images/{split}" if to == "yolo" else split for split in splits}
    files: dict[str, bytes] = {}
    for split, content in splits.items():
        files |= (_yolo_labels if to == "yolo" else _coco_json)(split, content, names[split])
    if to == "yolo":
        files["data.yaml"] = _data_yaml(next(iter(splits.values())), folders)
    targets = {
        f"{folders[split]}/{name}": path
        for split, content in splits.items()
        for name, path in zip(names[split], content.images.paths, strict=True)
    }
    folder = Folder(out, BY)
    _look(folder, {*targets, *files})
    for name, path in progress(targets.items(), desc=f"images to {out}", unit="image", leave=False, delay=2):
        if images == "link":
            folder.link(name, os.path.abspath(path))
        else:
            folder.write(name, Path(path).read_bytes())
    for name, content in files.items():  # the one by which the dataset is found comes last
        folder.write(name, content)
    crowds = {split: int(content.images.crowd.sum()) for split, content in splits.items() if to == "yolo"}
    renamed = sum(
        name != kept for split in splits for name, kept in zip(names[split], splits[split].names, strict=True)
    )
    said = [f"{renamed} images have other names, by which YOLO finds their boxes"] if renamed else []
    text = "crowds, which YOLO has no word for: their places count as background"
    return said + [f"{split}: left out {count} {text}" for split, count in crowds.items() if count]


def _look(folder: Folder, names: set[str]) -> None:
    """Make sure that nothing is in the way, and that nothing else would be read with the dataset.

    Raises:
        OutputError: there is a file that is not of this conversion, or a link that would be written through.
    """
    folder.claim(sorted(names))
    for parent, folders, files in os.walk(folder.path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for file in sorted(files) + links:
            name = (Path(parent) / file).relative_to(folder.path).as_posix()
            is_link = (folder.path / name).is_symlink() and not folder.is_own_link(name)
            if is_link or (name not in names and not file.startswith(".")):
                message = "is there already, and not of this conversion: choose another place, or move it away"
                raise OutputError(f"{folder.path / name}: {message}")


def _names(split: Split, yolo: bool) -> list[str]:
    """What the images will be called: as below the image folder; for YOLO each stem once, with a suffix it knows."""
    taken: set[str] = set()
    names = []
    for path in split.images.paths:
        relative = os.path.relpath(path, split.image_dir)
        name = PurePosixPath(Path(path).name if relative.startswith("..") else Path(relative).as_posix())
        if yolo:  # a folder images/ would be taken for that of the labels, and what starts with a dot for no image
            parts = (f"{part}_" if part == "images" else part for part in name.parts[:-1])
            name = PurePosixPath(*(f"_{part}" if part.startswith(".") else part for part in (*parts, name.name)))
        if yolo and name.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{path}: YOLO knows images by their suffix: expected one of {known}")
        free, count = name, 1
        while str(free.with_suffix("") if yolo else free) in taken:
            count += 1
            free = name.with_name(f"{name.stem}_{count}{name.suffix}")
        taken.add(str(free.with_suffix("") if yolo else free))
        names.append(str(free))
    return names


def _coco_json(split: str, content: Split, names: list[str]) -> dict[str, bytes]:
    images, annotations = content.images, []
    entries = [
        {"id": image_id, "file_name": name, "width": width, "height": height}
        for image_id, name, (width, height) in zip(images.ids, names, images.sizes.tolist(), strict=True)
    ]
    columns = (images.image_of_box, images.boxes.astype(float), images.labels, images.areas, images.crowd)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for number, (i, (x0, y0, x1, y1), label, area, crowd) in enumerate(rows, start=1):
        annotations.append(
            {
                "id": number,
                "image_id": images.ids[i],
                "category_id": content.category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": area,
                "iscrowd": int(crowd),
            }
        )
    categories = [{"id": category_id, "name": name} for category_id, name in content.categories.items()]
    data: dict[str, Any] = {"info": {WRITTEN_BY: BY}, "categories": categories, "images": entries}
    return {f"instances_{split}.json": json.dumps(data | {"annotations": annotations}).encode()}


def _data_yaml(split: Split, folders: dict[str, str]) -> bytes:
    content = folders | {"names": dict(enumerate(split.class_names))}
    printable = all(map(str.isprintable, split.class_names))  # YAML has more ends of lines
    return f"# {BY}\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=printable)}".encode()


def _yolo_labels(split: str, content: Split, names: list[str]) -> dict[str, bytes]:
    headers = for_each(
        lambda image: read_header(image.path, (image.width, image.height), content.reading),
        content.images,
        f"orientations of {content.source}",
    )
    files = {}
    for i, (name, header) in enumerate(zip(names, headers, strict=True)):
        if isinstance(header, DataError):
            raise DataError(f"{content.images.paths[i]}: {header}")
        rows = content.images.rows(i)
        kept = ~content.images.crowd[rows]
        lines = list(_lines(content.images.boxes[rows][kept], content.images.labels[rows][kept], header))
        files[f"labels/{split}/{PurePosixPath(name).with_suffix('.txt')}"] = "".join(lines).encode()
    return files


def _lines(boxes: np.ndarray, labels: np.ndarray, header: Header) -> Iterator[str]:
    """A line for each box, with every digit that a float64 has."""
    (width, height), corners = header.size, boxes.astype(float)
    if not header.turn:
        corners = turned(corners, header.size, header.orientation)
        width, height = (height, width) if header.orientation >= 5 else (width, height)
    for (x0, y0, x1, y1), label in zip(corners.tolist(), labels.tolist(), strict=True):
        numbers = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        yield f"{label} {' '.join(map(repr, numbers))}\n"


def turned(corners: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Boxes of stored pixels, in the image as its EXIF orientation turns it.

    Args:
        corners: [T, 4] x0, y0, x1, y1 in pixels. size: (width, height) of the stored pixels. orientation: 1 to 8.
    """
    x, y, (width, height) = corners[:, 0::2], corners[:, 1::2], size
    if orientation in (2, 3, 7, 8):
        x = width - x
    if orientation in (3, 4, 6, 7):
        y = height - y
    if orientation >= 5:
        x, y = y, x
    return np.column_stack([x.min(1), y.min(1), x.max(1), y.max(1)])
