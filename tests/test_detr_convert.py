"""`detr convert`: what is written reads as what it was made from, and nothing of a user's is lost."""

import json
import shutil
from pathlib import Path

import coco_files
import data_formats
import numpy as np
import pytest
import yaml
from PIL import Image
from user_files import snapshot

from detr.cli import main
from detr.convert import turned
from detr.images import Reading, read_image
from detr.output import MANIFEST
from detr.splits import load_split

NAMES = ["coco", *data_formats.WRITERS]
assert_same = data_formats.assert_same


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return data_formats.write_all(tmp_path_factory.mktemp("formats"))


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["coco", "yolo"])
@pytest.mark.filterwarnings("ignore:superfluous category")
def test_each_format_as_each_other(datasets, tmp_path, name, to, capsys):
    assert convert(datasets / name, tmp_path / "out", "--to", to) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}: 32 images of train, 8 images of val\n")
    for split in ("train", "val"):
        expected, found = load_split(datasets / name, split), load_split(tmp_path / "out", split)
        if to == "coco":  # with every number as it was
            assert found.categories == expected.categories and found.images.ids == expected.images.ids
            assert np.array_equal(found.images.areas, expected.images.areas)
        assert found.names == expected.names and found.class_names == expected.class_names
        assert_same(found, load_split(datasets / "coco", split))
        for ours, theirs in zip(found.images.paths, expected.images.paths, strict=True):
            assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_coco_to_yolo_and_back(datasets, tmp_path):
    assert convert(datasets / "coco", tmp_path / "yolo", "--to", "yolo", "--images", "link") == 0
    assert convert(tmp_path / "yolo", tmp_path / "coco") == 0
    for split in ("train", "val"):
        assert_same(load_split(tmp_path / "coco", split), load_split(datasets / "coco", split))
    text = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    names = {0: "disc", 1: "square", 2: "star", 3: "triangle"}
    assert text == {"train": "images/train", "val": "images/val", "names": names}
    # 17 digits, and an empty file for an image without objects
    lines = (tmp_path / "yolo" / "labels" / "train" / "000001.txt").read_text().splitlines()
    assert (
        all(len(line.split()) == 5 for line in lines)
        and max(len(word) for line in lines for word in line.split()) >= 17
    )
    assert (tmp_path / "yolo" / "labels" / "train" / "000000.txt").read_text() == ""


def test_what_yolo_has_no_word_for(tmp_path, capsys):
    coco_files.write(tmp_path / "coco")
    assert convert(tmp_path / "coco", tmp_path / "yolo", "--to", "yolo") == 0
    said = "train: left out 1 crowds, which YOLO has no word for: their places count as background"
    assert said in capsys.readouterr().out
    found = load_split(tmp_path / "yolo")
    assert found.names == ["a.png", "c.png", "sub/b.png"]  # in the order of their names
    assert found.images[0].boxes.tolist() == [[4, 6, 14, 18], [20.5, 10, 40, 30]]
    assert found.categories == {0: "ant", 1: "owl", 2: "zebra"} and found.images.labels.tolist() == [2, 1, 0]
    # all of it comes back as COCO
    assert convert(tmp_path / "coco", tmp_path / "again") == 0
    again, before = load_split(tmp_path / "again"), load_split(tmp_path / "coco")
    assert again.content() == before.content() and again.categories == before.categories


def as_yolo(root, names):
    """The content of a json whose images have these names, the split after it was written as YOLO, and before."""
    data = coco_files.content()
    for image, name in zip(data["images"], names, strict=True):
        image["file_name"] = name
    coco_files.write(root / "coco", data)
    assert convert(root / "coco", root / "yolo", "--to", "yolo") == 0
    return data, load_split(root / "yolo"), load_split(root / "coco")


def test_names_that_share_a_text_file(tmp_path, capsys):
    data, found, before = as_yolo(tmp_path, ("a.png", "a.bmp", "sub/a.png"))
    assert found.names == ["a.png", "a_2.bmp", "sub/a.png"]
    assert "1 images have other names, by which YOLO finds their boxes" in capsys.readouterr().out
    assert [len(image.labels) for image in found.images] == [2, 1, 0]
    assert found.images.boxes[2:].tolist() == before.images.boxes[3:].tolist()
    (tmp_path / "coco" / "train" / "a.bmp").rename(tmp_path / "coco" / "train" / "a.ppm")
    data["images"][1]["file_name"] = "a.ppm"
    (tmp_path / "coco" / "instances_train.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert convert(tmp_path / "coco", tmp_path / "other", "--to", "yolo") == 1
    message = f"{tmp_path}/coco/train/a.ppm: YOLO knows images by their suffix: expected one of .bmp, "
    assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert convert(tmp_path / "coco", tmp_path / "other") == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pixels_do(tmp_path, orientation):
    """A bright box in a dark image of 40 x 20 stored pixels, in every way that EXIF turns it."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[4:10, 6:26] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "coco" / "train").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "coco" / "train" / "a.png", exif=exif)
    data = {
        "categories": [{"id": 1, "name": "box"}],
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [6, 4, 20, 6]}],
    }
    (tmp_path / "coco" / "instances_train.json").write_text(json.dumps(data))
    # boxes of the stored pixels, by the size or by the flag
    assert convert(tmp_path / "coco", tmp_path / "yolo", "--to", "yolo", "--exif", "ignore") == 0
    split = load_split(tmp_path / "yolo")
    bright = np.asarray(read_image(split.images[0].path)).max(2) > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert split.images[0].boxes.tolist() == [[float(v) for v in expected]]
    assert turned(np.array([[6.0, 4, 26, 10]]), (40, 20), orientation).tolist() == [expected]
    # and back, read by the stored pixels
    assert convert(tmp_path / "yolo", tmp_path / "again") == 0
    again = load_split(tmp_path / "again")
    assert again.images[0].boxes.tolist() == split.images[0].boxes.tolist()
    if orientation >= 5:
        assert load_split(tmp_path / "coco").images.sizes.tolist() == [[40, 20]]
        assert load_split(tmp_path / "coco", reading=Reading("ignore")).images.sizes.tolist() == [[40, 20]]


def test_links(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "yolo", tmp_path / "src")
    before = snapshot(tmp_path / "src")
    out = tmp_path / "out"
    assert convert(tmp_path / "src", out, "--images", "link") == 0
    link = out / "train" / "000000.jpg"
    assert link.is_symlink() and link.resolve() == tmp_path / "src" / "images" / "train" / "000000.jpg"
    # a second time, as links and as copies; and the other way round
    for images in ("link", "copy", "copy", "link"):
        assert convert(tmp_path / "src", out, "--images", images) == 0
        assert link.is_symlink() == (images == "link")
        assert snapshot(tmp_path / "src") == before
        assert_same(load_split(out), load_split(tmp_path / "src"))
    # another dataset of the same names does not write through the links
    shutil.copytree(datasets / "yolo", tmp_path / "other")
    for path in (tmp_path / "other").rglob("*.jpg"):
        path.write_bytes(path.with_name("000003.jpg").read_bytes())
    for images in ("copy", "link", "copy"):
        assert convert(tmp_path / "other", out, "--images", images) == 0
        assert snapshot(tmp_path / "src") == before
    # a link that somebody else made is left as it is
    capsys.readouterr()
    link.unlink()
    link.symlink_to(tmp_path / "src" / "data.yaml")
    assert convert(tmp_path / "src", out, "--images", "link") == 1
    assert f"{link}: is there already, and was changed after `detr convert` wrote it" in capsys.readouterr().err
    assert link.resolve() == tmp_path / "src" / "data.yaml" and snapshot(tmp_path / "src") == before


@pytest.mark.parametrize(("to", "place"), [("coco", "train/z.jpg"), ("yolo", "images/val/sub/z.png")])
def test_other_files_among_the_images_are_named(datasets, tmp_path, to, place, capsys):
    """They would be images of the dataset when it is read."""
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("x")
    assert convert(datasets / "coco", tmp_path / "out", "--to", to) == 1
    assert f"{path}: is there already, and not of this conversion" in capsys.readouterr().err
    assert list(snapshot(tmp_path)) == [f"out/{place}"]


def test_a_smaller_dataset_into_the_same_place(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "coco", tmp_path / "src")
    assert convert(tmp_path / "src", tmp_path / "out") == 0
    data = data_formats.content(tmp_path / "src", "train")
    last = data["images"].pop()
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != last["id"]]
    (tmp_path / "src" / "instances_train.json").write_text(json.dumps(data))
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert convert(tmp_path / "src", tmp_path / "out") == 1
    assert f"{tmp_path}/out/train/{last['file_name']}: is there already" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_into_the_dataset_itself(datasets, tmp_path, capsys):
    for name in NAMES:
        shutil.copytree(datasets / name, tmp_path / name)
        before = snapshot(tmp_path / name)
        assert convert(tmp_path / name, tmp_path / name / "." / "") == 1
        message = f"{tmp_path / name}: expected a folder outside of {tmp_path / name}, which the dataset is read from"
        assert message in capsys.readouterr().err
        assert convert(tmp_path / name, tmp_path / name / "new") == 1
        assert snapshot(tmp_path / name) == before


def test_what_is_wrong_with_a_dataset_stops_a_conversion(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "yolo", tmp_path / "src")
    (tmp_path / "src" / "labels" / "val" / "000001.txt").write_text("0 1 2\n")
    assert convert(tmp_path / "src", tmp_path / "out") == 1
    assert f"error: {tmp_path}/src/labels/val/000001.txt: line 1: expected a class" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(datasets / "voc", tmp_path / "out", "--classes", "star,disc,square,triangle") == 0
    assert load_split(tmp_path / "out").class_names == ["star", "disc", "square", "triangle"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train", "val", "instances_train.json", "instances_val.json", MANIFEST,
    }  # fmt: skip


def test_links_that_a_user_made_are_not_written_through(datasets, tmp_path, capsys):
    """As a tool that looks for copies makes them, of a file or of a whole folder."""
    for name in ("src", "other"):
        shutil.copytree(datasets / "coco", tmp_path / name)
    for path in (tmp_path / "other" / "train").iterdir():
        path.write_bytes(path.with_name("000003.jpg").read_bytes())
    out = tmp_path / "out"
    assert convert(tmp_path / "src", out) == 0
    before = snapshot(tmp_path / "src")
    image = out / "train" / "000000.jpg"
    image.unlink()
    image.symlink_to(tmp_path / "src" / "train" / "000000.jpg")
    capsys.readouterr()
    assert convert(tmp_path / "other", out) == 1
    assert f"{image}: is there already, and not of this conversion" in capsys.readouterr().err
    shutil.rmtree(out / "train")
    (out / "train").symlink_to(tmp_path / "src" / "train")
    assert convert(tmp_path / "other", out) == 1
    assert f"{out / 'train'}: is there already, and not of this conversion" in capsys.readouterr().err
    assert snapshot(tmp_path / "src") == before


@pytest.mark.parametrize("place", ["annotations/instances_train.json", "instances_test.json", "data.yaml", "x/a.xml"])
def test_nothing_else_may_be_read_with_what_is_written(datasets, tmp_path, place, capsys):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert convert(datasets / "voc", tmp_path / "out") == 1
    assert f"{path}: is there already, and not of this conversion" in capsys.readouterr().err
    assert list(snapshot(tmp_path)) == [f"out/{place}"]


def test_a_split_of_an_earlier_conversion(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "coco", tmp_path / "src")
    assert convert(tmp_path / "src", tmp_path / "out") == 0
    (tmp_path / "src" / "instances_val.json").unlink()
    assert convert(tmp_path / "src", tmp_path / "out") == 1
    assert f"{tmp_path}/out/instances_val.json: is there already" in capsys.readouterr().err


def test_names_that_yolo_would_not_find(tmp_path):
    """Below a folder images/, where the text files would be looked for elsewhere; and hidden ones."""
    _, found, before = as_yolo(tmp_path, ("images/a.png", ".b.png", "x/images/images/c.png"))
    assert found.names == ["_.b.png", "images_/a.png", "x/images_/images_/c.png"]
    assert [len(image.labels) for image in found.images] == [1, 2, 0]
    assert found.images[1].boxes.tolist() == before.images[0].boxes[:2].tolist()  # the third is a crowd


def test_splits_that_yolo_does_not_have(tmp_path, capsys):
    data = coco_files.content()
    coco_files.write(tmp_path / "coco", data)
    coco_files.write(tmp_path / "coco", data, "path")
    assert convert(tmp_path / "coco", tmp_path / "yolo", "--to", "yolo") == 1
    assert "split 'path': expected one of train, val, test, which YOLO has" in capsys.readouterr().err
    assert convert(tmp_path / "coco", tmp_path / "again") == 0
    # a json without images is none
    (tmp_path / "coco" / "instances_old.json").write_text(json.dumps(data))
    assert convert(tmp_path / "coco", tmp_path / "third") == 0
    assert "path" in capsys.readouterr().out


def test_names_of_files_that_are_given(tmp_path):
    json_path, folder = coco_files.write(tmp_path / "coco")
    json_path.rename(tmp_path / "coco" / "result.json")
    folder.rename(tmp_path / "coco" / "pictures")
    assert (
        convert(tmp_path / "coco", tmp_path / "out", "--train-json", "result.json", "--train-images", "pictures") == 0
    )
    assert len(load_split(tmp_path / "out").images) == 3


def test_names_of_classes_that_mean_something_in_yaml(tmp_path):
    names = ["no", "1", "null", "~", "a: b", "#x", "a\x85b", "'q' \"r\"", "[", "- a", "猫", "0x1f", "1e3", "<<"]
    data = coco_files.content()
    data["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    data["annotations"] = [a | {"category_id": 7} for a in data["annotations"]]
    coco_files.write(tmp_path / "coco", data)
    assert convert(tmp_path / "coco", tmp_path / "yolo", "--to", "yolo") == 0
    assert load_split(tmp_path / "yolo").class_names == names


def test_pixels_as_they_are_stored(datasets, tmp_path, capsys):
    assert convert(datasets / "yolo", tmp_path / "out", "--exif", "ignore") == 0
    assert (
        "boxes are of the pixels as they are stored: read this dataset with --exif ignore too"
        in capsys.readouterr().out
    )


def test_some_of_the_splits(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "voc", tmp_path / "voc")
    (tmp_path / "voc" / "ImageSets" / "Main" / "test.txt").write_text("not_published\n")
    assert convert(tmp_path / "voc", tmp_path / "out") == 1
    assert "test.txt: line 1: no xml at" in capsys.readouterr().err
    assert convert(tmp_path / "voc", tmp_path / "out", "--splits", "val,train") == 0
    assert capsys.readouterr().out.endswith("32 images of train, 8 images of val\n")
    assert convert(tmp_path / "voc", tmp_path / "new", "--splits", "valid") == 1
    assert "--splits: expected some of train, val, test, got valid" in capsys.readouterr().err


def test_a_place_beside_the_images(datasets, tmp_path, capsys):
    """Where nothing that is written is read with the dataset."""
    shutil.copytree(datasets / "yolo", tmp_path / "data")
    (tmp_path / "my.yaml").write_text("path: data\ntrain: images\nnames: [disc, square, star, triangle]\n")
    for place in ("data/images/out", "data/images/train/out"):
        assert convert(tmp_path / "my.yaml", tmp_path / place) == 1
        assert "expected a folder outside of " in capsys.readouterr().err
    assert convert(tmp_path / "my.yaml", tmp_path / "out") == 0
    assert len(load_split(tmp_path / "out").images) == 40


def test_names_with_a_colon_or_of_windows(tmp_path, capsys):
    data = coco_files.content()
    data["images"][0]["file_name"] = "1:a.png"
    coco_files.write(tmp_path / "coco", data)
    data["images"][1]["file_name"] = "sub\\b.png"
    (tmp_path / "coco" / "instances_train.json").write_text(json.dumps(data))
    assert convert(tmp_path / "coco", tmp_path / "out") == 0
    assert load_split(tmp_path / "out").names == ["1:a.png", "sub/b.png", "c.png"]
    data["images"][1]["file_name"] = "a:b.png"
    for name in ("C:\\a.png", "c:/a.png"):
        data["images"][2]["file_name"] = name
        (tmp_path / "coco" / "instances_train.json").write_text(json.dumps(data))
        assert convert(tmp_path / "coco", tmp_path / "new") == 1
        assert "leads out of the image folder" in capsys.readouterr().err
