"""The synthetic dataset: deterministic, as described, and annotated exactly."""

import json

import numpy as np
import pytest
from PIL import Image

from detr.formats import open_dataset
from detr.splits import read_part
from detr.synth import CLASSES, draw_image, draw_large, write_dataset


def drawings(count, size=128):
    return [draw_image(np.random.default_rng((3, 0, i)), size) for i in range(count)]


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name, n_train, seed in (("a", 4, 5), ("b", 6, 5), ("c", 4, 6)):
        write_dataset(tmp_path / name, n_train, 2, 64, seed)
    jsons = {name: json.loads((tmp_path / name / "instances_train.json").read_text()) for name in "abc"}
    # more images leave the first ones as they are
    for key in ("images", "annotations"):
        assert jsons["a"][key] == jsons["b"][key][: len(jsons["a"][key])]
    for i in range(4):
        first, same, other = ((tmp_path / name / "train" / f"{i:06d}.jpg").read_bytes() for name in "abc")
        assert first == same != other
    assert (tmp_path / "a/train/000000.jpg").read_bytes() != (tmp_path / "a/val/000000.jpg").read_bytes()


def test_a_written_dataset_has_no_fault(tmp_path):
    write_dataset(tmp_path, 12, 3, 96, 0)
    for split, count in (("train", 12), ("val", 3)):
        part = read_part(open_dataset(tmp_path), split, decode=True)
        assert part.problems == []
        assert len(part.split.images) == count
        assert part.split.class_names == list(CLASSES)
        assert Image.open(tmp_path / split / "000000.jpg").format == "JPEG"


def test_objects_are_as_described():
    images = drawings(150)
    boxes = np.array([box for _, found, _, _ in images for box in found])
    labels = np.array([label for _, _, found, _ in images for label in found])
    areas = np.array([area for _, _, _, found in images for area in found])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= 0).all() and (boxes <= 128).all()
    assert (areas <= sides.prod(1)).all() and (areas > 10).all()
    # hidden parts make boxes smaller, nothing makes them larger than 60 px and the quarter pixel on either side
    assert 55 < sides.max() <= 60.5
    assert np.quantile(sides.max(1), 0.02) > 9.5
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert counts.min() > 0.7 * counts.mean()
    per_image = np.bincount([len(found) for _, found, _, _ in images])
    assert per_image[0] == 0 and len(per_image) == 6 and per_image[1:].min() > 5
    overlapping = 0
    for _, found, _, _ in images:
        for i, a in enumerate(found):
            overlapping += any(
                min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
                for b in found[:i] + found[i + 1 :]
            )
    assert 0.2 < overlapping / len(boxes) < 0.8


def test_backgrounds_are_textured():
    for pixels, boxes, _, _ in drawings(20):
        outside = np.ones((128, 128), bool)
        for x0, y0, x1, y1 in boxes:
            outside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = False
        assert pixels[outside].std(0).max() > 4


def test_boxes_enclose_what_is_visible(monkeypatch):
    # white objects on black: the picture itself says where they are
    monkeypatch.setattr("detr.synth._background", lambda rng, size: np.zeros((size, size, 3)))
    monkeypatch.setattr("detr.synth._fill", lambda rng, size, background: np.full((size, size, 3), 255.0))
    monkeypatch.setattr("detr.synth.MAX_OBJECTS", 1)
    for pixels, [box], _, [area] in drawings(40, 64):
        shape = pixels[..., 0] / 255
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # pixels that are covered in part count as a whole in the picture
        assert np.abs(np.array(box) - extent).max() < 1
        assert shape.sum() == pytest.approx(area, rel=0.01)
        assert 4.5 <= max(box[2] - box[0], box[3] - box[1]) <= 30.5


def test_large_animals_are_as_described():
    images = [draw_large(np.random.default_rng((3, 0, i)), 96) for i in range(80)]
    again = draw_large(np.random.default_rng((3, 0, 7)), 96)
    assert np.array_equal(images[7][0], again[0]) and images[7][1:] == again[1:]
    boxes = np.array([box for _, found, _, _ in images for box in found])
    areas = np.array([area for _, _, _, found in images for area in found])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1) / 96
    assert (boxes >= 0).all() and (boxes <= 96).all()
    assert (areas <= (boxes[:, 2:] - boxes[:, :2]).prod(1)).all()
    # from a fifth of the image, where something stands before them, to the whole of it
    assert sides.min() > 0.15 and sides.max() == 1 and 0.7 < np.median(sides) < 0.9
    assert {label for _, _, found, _ in images for label in found} == {0}
    counts = np.bincount([len(found) for _, found, _, _ in images])
    assert counts[1] > 0.7 * len(images) and counts[0] < 0.1 * len(images) and len(counts) <= 4


def test_a_written_large_dataset_has_no_fault(tmp_path):
    write_dataset(tmp_path, 6, 3, 64, 0, large=True)
    part = read_part(open_dataset(tmp_path), "train", decode=True)
    assert part.problems == [] and len(part.split.images) == 6
    assert part.split.class_names == ["animal"]
