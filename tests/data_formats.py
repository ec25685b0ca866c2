"""One dataset written in each format that `detr` reads, from a COCO json: independent of `detr.convert`."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from PIL import Image

from detr.split import Split
from detr.synth import write_dataset

SPLITS = {"train": "train", "val": "valid"}  # and what Roboflow calls them


def content(root: Path, split: str) -> dict:
    return json.loads((root / f"instances_{split}.json").read_text())


def _boxes(data: dict) -> dict[int, list[dict]]:
    boxes = defaultdict(list)
    for annotation in data["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    return boxes


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def write_roboflow(source: Path, out: Path) -> None:
    """With the category 0 that Roboflow adds."""
    for split, name in SPLITS.items():
        data = content(source, split)
        group = {"id": 0, "name": "things", "supercategory": "none"}
        data["categories"] = [group, *(dict(c, supercategory="things") for c in data["categories"])]
        for image in data["images"]:
            _copy(source / split / image["file_name"], out / name / image["file_name"])
        (out / name / "_annotations.coco.json").write_text(json.dumps(data))


def write_yolo(source: Path, out: Path, digits: int = 17) -> None:
    for split in SPLITS:
        data = content(source, split)
        boxes, number = _boxes(data), {c["id"]: k for k, c in enumerate(data["categories"])}
        for image in data["images"]:
            name, width, height = image["file_name"], image["width"], image["height"]
            _copy(source / split / name, out / "images" / split / name)
            lines = []
            for annotation in boxes[image["id"]]:
                x, y, w, h = annotation["bbox"]
                numbers = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                lines.append(" ".join([str(number[annotation["category_id"]]), *(f"{v:.{digits}g}" for v in numbers)]))
            if lines:  # an image without objects has no file
                path = (out / "labels" / split / name).with_suffix(".txt")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines) + "\n")
    names = dict(enumerate(c["name"] for c in data["categories"]))
    (out / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": names}))


def write_voc(source: Path, out: Path) -> None:
    for split in SPLITS:
        data = content(source, split)
        boxes, names = _boxes(data), {c["id"]: c["name"] for c in data["categories"]}
        stems = []
        for image in data["images"]:
            # both splits have images of the same name: in VOC they are in one folder
            path = Path(f"{split}_{image['file_name']}")
            _copy(source / split / image["file_name"], out / "JPEGImages" / path)
            stems.append(path.stem)
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            objects = ""
            for annotation in boxes[image["id"]]:
                (x, y, w, h), name = annotation["bbox"], escape(names[annotation["category_id"]])
                corners = f"<xmin>{x + 1!r}</xmin><ymin>{y + 1!r}</ymin><xmax>{x + w!r}</xmax><ymax>{y + h!r}</ymax>"
                difficult = f"<difficult>{annotation.get('iscrowd', 0)}</difficult>"
                objects += f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox></object>"
            xml = out / "Annotations" / f"{path.stem}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(f"<annotation><filename>{path}</filename>{size}{objects}</annotation>")
        lists = out / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")


WRITERS = {"roboflow": write_roboflow, "yolo": write_yolo, "voc": write_voc}


def write_all(root: Path) -> Path:
    """A dataset of 40 images as COCO, some of them without objects, and the same in the other formats."""
    write_dataset(root / "coco", 32, 8, 60, 0)  # by which few fractions are exact
    for split in ("train", "val"):
        data = content(root / "coco", split)
        empty = {data["images"][i]["id"] for i in (0, 5)}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in empty]
        for annotation in data["annotations"]:
            del annotation["area"]  # which the others do not have
        # VOC has no order: that of the alphabet
        names = sorted(category["name"] for category in data["categories"])
        new = {c["id"]: names.index(c["name"]) + 1 for c in data["categories"]}
        for annotation in data["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]]
        data["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        (root / "coco" / f"instances_{split}.json").write_text(json.dumps(data))
    for name, write in WRITERS.items():
        write(root / "coco", root / name)
    return root


def assert_same(split: Split, expected: Split) -> None:
    """Equal images in the same order, with equal sizes, boxes, labels and names of classes."""
    assert split.class_names == expected.class_names
    assert [path.removeprefix("train_").removeprefix("val_") for path in split.names] == expected.names
    for path, other in zip(split.images.paths, expected.images.paths, strict=True):
        assert np.array_equal(Image.open(path), Image.open(other))
    for name in ("sizes", "ends", "boxes", "labels", "crowd"):
        ours, theirs = getattr(split.images, name), getattr(expected.images, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
    np.testing.assert_allclose(split.images.areas, expected.images.areas, rtol=1e-12)
