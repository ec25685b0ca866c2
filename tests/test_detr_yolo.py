"""YOLO's folders: every way to name images and classes."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from yolo_files import LINE, birds, fatal, image, write

from detr.cli import main
from detr.errors import DataError
from detr.formats import open_dataset
from detr.images import Reading
from detr.splits import load_split, read_part


@pytest.fixture
def root(tmp_path):
    return birds(tmp_path)


def test_boxes_in_numbers(root):
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.25 0.5\n\n  0 .25 0.25 0.5 0.5  \r\n")
    split = load_split(root)
    assert split.categories == {0: "ant", 1: "owl"}
    first, second = split.images
    assert (first.path, first.width, first.height, first.image_id) == (root / "images/train/a.png", 40, 20, 1)
    assert first.boxes.tolist() == [[15, 5, 25, 15], [0, 0, 20, 10]] and first.labels.tolist() == [1, 0]
    assert first.areas.tolist() == [100, 200] and first.crowd.tolist() == [False, False]
    assert second.boxes.tolist() == [[15, 5, 25, 15]] and second.path.name == "b.png"


def test_polygons_become_their_boxes(root):
    # a triangle, and the four corners of a turned box
    write(root / "labels/train/a.txt", "0 0.1 0.2 0.5 0.9 0.3 0.1\n1 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n")
    np.testing.assert_allclose(load_split(root).images[0].boxes, [[4, 2, 20, 18], [10, 5, 30, 15]], rtol=1e-6)


def test_the_points_of_a_pose_are_no_polygon(root):
    text = (root / "data.yaml").read_text()
    write(root / "data.yaml", f"{text}kpt_shape: [2, 3]\n")
    for name in "ab":
        write(root / f"labels/train/{name}.txt", "0 0.5 0.5 0.25 0.5 0.9 0.9 2 0 0 0\n")
    assert load_split(root).images[0].boxes.tolist() == [[15, 5, 25, 15]]
    write(root / "labels/train/a.txt", LINE)
    assert fatal(root).message == "expected a class, a box of 4 numbers, and 6 numbers of points; got 5 numbers"


def test_an_image_without_a_text_file_has_no_objects(root):
    (root / "labels/train/a.txt").unlink()
    write(root / "labels/train/b.txt", LINE)
    image(root / "images/train/sub/c.JPG")
    write(root / "labels/train/sub/c.txt", "")
    # what macOS leaves is no image, and neither is a text
    write(root / "images/train/._a.png", "x")
    write(root / "images/train/notes.md", "x")
    split = load_split(root)
    assert split.names == ["a.png", "b.png", "sub/c.JPG"]
    assert split.images.ends.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[no, yes]", {0: "no", 1: "yes"}),  # YAML has truth values of these names
        ("[1, 2.50]", {0: "1", 1: "2.50"}),
        ("{0: ant, 1: owl}", {0: "ant", 1: "owl"}),
        ("{1: owl, 0: ant}", {0: "ant", 1: "owl"}),
        ("\n  - zèbre\n  - 猫", {0: "zèbre", 1: "猫"}),
        ("{0: ant, 7: owl}", {0: "ant", 7: "owl"}),
    ],
)
def test_names(root, names, expected):
    write(root / "data.yaml", f"train: images/train\nval: images/val\nnames: {names}\n")
    write(root / "labels/train/a.txt", f"{max(expected)} 0.5 0.5 0.25 0.5\n")
    split = load_split(root)
    assert split.categories == expected and split.images.labels.tolist() == [1, 0]


LAYOUTS = {
    "a folder": ("images/train", {}),
    "an absolute folder": ("ROOT/images/train", {}),
    "below a path": ("train", {"path": "images"}),
    "below an absolute path": ("images/train", {"path": "ROOT"}),
    "several folders": (["images/train", "images/more"], {}),
    "a list": ("lists/train.txt", {}),
    "several lists": (["lists/train.txt", "images/more"], {}),
    "as Roboflow writes it": ("../images/train", {}),
    "with backslashes": ("images\\train", {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_places_of_images(root, name):
    train, more = LAYOUTS[name]
    image(root / "images/more/d.png")
    write(root / "labels/more/d.txt", LINE)
    write(
        root / "lists/train.txt", f"../images/train/b.png\n\n{root}/images/train/a.png\nimages/train/../more/d.png\r\n"
    )
    text = yaml.safe_dump({"train": train, "names": ["ant", "owl"], **more}).replace("ROOT", str(root))
    write(root / "data.yaml", text)
    names = [image.path.name for image in load_split(root).images] if name != "several lists" else None
    if name == "several lists":
        with pytest.warns(UserWarning, match=r"image twice: 1, the first: .*data.yaml: train: .*d\.png is named by .*"):
            names = [image.path.name for image in load_split(root).images]
    expected = {
        "a list": ["b.png", "a.png", "d.png"],
        "several lists": ["b.png", "a.png", "d.png"],
        "several folders": ["a.png", "b.png", "d.png"],
    }
    assert names == expected.get(name, ["a.png", "b.png"])


def test_the_yaml_itself_and_other_names_of_it(root, capsys):
    assert main(["check-data", str(root / "data.yaml")]) == 0
    assert f"{root}/data.yaml: YOLO, train, val\n" in capsys.readouterr().out
    (root / "data.yaml").rename(root / "birds.yml")
    write(root / "conf.yaml", "lr: 1\n")
    write(root / "broken.yaml", "lr: [")
    assert len(load_split(root).images) == 2
    write(root / "more.yaml", "train: images/val\nnames: [ant]\n")
    with pytest.raises(DataError, match=r"several files name classes and images: give one of .*birds\.yml"):
        open_dataset(root)
    assert len(load_split(root / "birds.yml").images) == 2
    with pytest.raises(DataError, match=r"conf\.yaml: expected train, the folder of its images or a list of them, got"):
        open_dataset(root / "conf.yaml")


@pytest.mark.parametrize("parts", [True, False])
def test_classes_in_a_text_and_no_yaml(root, parts):
    """As Label Studio and labelImg write it."""
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "ant\nowl\n\n")
    if not parts:
        for kind in ("images", "labels"):
            for path in sorted((root / kind).rglob("*.*")):
                path.rename(root / kind / path.name)
            for name in ("train", "val"):
                (root / kind / name).rmdir()
    dataset = open_dataset(root)
    assert dataset.splits == (["train", "val"] if parts else ["train"])
    split = load_split(dataset)
    assert split.categories == {0: "ant", 1: "owl"} and split.images.ends.tolist() == ([1, 2] if parts else [1, 2, 3])


def test_all_in_one_folder(tmp_path):
    """As labelImg writes it."""
    for name in "ab":
        image(tmp_path / f"{name}.png")
    write(tmp_path / "a.txt", LINE)
    write(tmp_path / "classes.txt", "ant\n")
    split = load_split(tmp_path)
    assert split.names == ["a.png", "b.png"] and split.images.ends.tolist() == [1, 1]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"no dataset: looked for .*; found a\.png, b\.png, classes\.txt$"):
        open_dataset(tmp_path)


def test_text_files_beside_the_images(tmp_path):
    image(tmp_path / "pictures/a.png")
    write(tmp_path / "pictures/a.txt", LINE)
    write(tmp_path / "data.yaml", "train: pictures\nnames: [ant]\n")
    assert load_split(tmp_path).images[0].boxes.tolist() == [[15, 5, 25, 15]]


def test_the_last_folder_called_images_counts(tmp_path):
    image(tmp_path / "images/set/images/a.png")
    write(tmp_path / "images/set/labels/a.txt", LINE)
    write(tmp_path / "labels/set/images/a.txt", "0 0.5 0.5 1 1\n")
    write(tmp_path / "data.yaml", "train: images\nnames: [ant]\n")
    assert load_split(tmp_path).images[0].boxes.tolist() == [[15, 5, 25, 15]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_of_the_turned_image(root, orientation):
    for name in "ab":
        image(root / f"images/train/{name}.jpg", (40, 20), orientation)
        (root / f"images/train/{name}.png").unlink()
    write(root / "labels/train/a.txt", "0 0.25 0.25 0.5 0.5\n")
    split = load_split(root)
    size = (20, 40) if orientation >= 5 else (40, 20)
    assert split.images.sizes.tolist() == [list(size)] * 2
    assert split.images[0].boxes.tolist() == [[0, 0, size[0] / 2, size[1] / 2]]
    # no doubt, as there is with sizes that fit both
    assert read_part(open_dataset(root), "train").problems == []
    ignored = load_split(root, reading=Reading("ignore"))
    assert ignored.images.sizes.tolist() == [[40, 20]] * 2


def test_names_and_their_count(root):
    text = (root / "data.yaml").read_text()
    write(root / "data.yaml", f"{text}nc: 3\n")
    with pytest.warns(UserWarning, match=r"number of classes: 1, .*data.yaml: nc: is 3, and there are 2 names, which"):
        load_split(root)
    write(root / "data.yaml", f"{text}nc: 2\n")
    assert read_part(open_dataset(root), "train").problems == []


def test_a_path_of_another_computer(root):
    text = (root / "data.yaml").read_text()
    write(root / "data.yaml", f"path: /home/somebody/birds\n{text}")
    with pytest.warns(
        UserWarning, match=f"path: 1, .*path: /home/somebody/birds is not there: names start from {root}"
    ):
        assert len(load_split(root).images) == 2


@pytest.mark.parametrize("place", ["/home/somebody/birds/images/train", "D:\\\\birds\\\\images/train", "/images/train"])
def test_absolute_names_of_another_computer(root, place):
    write(root / "data.yaml", f"train: {place}\nnames: [ant, owl]\n".replace("\\\\", "\\"))
    with pytest.warns(UserWarning, match=r"path: 1, .*data\.yaml: train: .* is not there: .*/images/train is taken"):
        assert load_split(root).names == ["a.png", "b.png"]
    write(root / "train.txt", f"{place}/b.png\nimages/train/a.png\n".replace("\\\\", "\\"))
    write(root / "data.yaml", "train: train.txt\nnames: [ant, owl]\n")
    with pytest.warns(UserWarning, match=r"path: 1, .*train\.txt: line 1: .*/b\.png is not there: .*b\.png is taken"):
        assert load_split(root).names == ["b.png", "a.png"]
    write(root / "data.yaml", f"train: {place}s\nnames: [ant, owl]\n".replace("\\\\", "\\"))
    with pytest.raises(DataError, match=r"data\.yaml: train: no folder or list of images at"):
        load_split(root)


def test_classes_of_a_validation_in_another_order_are_matched_by_name(root):
    train = load_split(root)
    write(root / "data.yaml", "val: images/val\ntrain: images/val\nnames: [owl, ant]\n")
    assert load_split(root, "val", train.categories).images.labels.tolist() == [1]
    write(root / "data.yaml", "val: images/val\ntrain: images/val\nnames: [cow, ant]\n")
    with pytest.raises(DataError, match=r"c\.txt: class 'cow' is none of the training, which has 'ant', 'owl'"):
        load_split(root, "val", train.categories)


@pytest.mark.parametrize("null", ["", "~", "null"])
def test_keys_without_a_value(root, null):
    write(
        root / "data.yaml", f"train: images/train\nval: {null}\ntest: {null}\npath: {null}\nnc: {null}\nnames: [ant]\n"
    )
    dataset = open_dataset(root)
    assert dataset.splits == ["train"] and read_part(dataset, "train").problems == []


def test_a_test_split_that_was_not_exported(root):
    text = (root / "data.yaml").read_text()
    write(root / "data.yaml", f"{text}test: ../test/images\n")
    with pytest.warns(UserWarning, match=r"data\.yaml: test: left out, for \.\./test/images is not there"):
        assert open_dataset(root).splits == ["train", "val"]
    write(root / "data.yaml", text.replace("images/val", "images/valid"))
    with pytest.raises(DataError, match=r"val: no folder .*/images/valid; without a line val: a part of the training"):
        load_split(root, "val")


def test_images_that_are_named_twice_are_taken_once(root):
    for train in ("[images/train, ./images/train/]", "[images/train, images/train]"):
        write(root / "data.yaml", f"train: {train}\nnames: [ant, owl]\n")
        problems = read_part(open_dataset(root), "train").problems
        assert [problem.kind for problem in problems] == ["image twice"] * 2
        assert not any(problem.fatal for problem in problems)


def test_links_between_folders(root):
    (root / "images/train/loop").symlink_to(root / "images/train")
    (root / "images/train/sub").mkdir()
    (root / "images/train/again").symlink_to("sub")
    image(root / "images/train/sub/d.png")
    assert load_split(root).names == ["a.png", "b.png", "sub/d.png"]
    # a folder of images elsewhere is followed
    image(root / "elsewhere/e.png")
    (root / "images/train/more").symlink_to(root / "elsewhere")
    assert load_split(root).names == ["a.png", "b.png", "more/e.png", "sub/d.png"]


def test_a_path_below_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    write(root / "data.yaml", f"path: ~/{root.name}\ntrain: images/train\nnames: [ant, owl]\n")
    assert read_part(open_dataset(root), "train").problems == []


def test_a_sibling_that_roboflow_did_not_mean(root):
    for name in ("a", "b", "c"):
        image(root / f"train/images/{name}.png")
        write(root / f"one/labels/{name}.txt", LINE)
    image(root / "one/train/images/x.png")
    write(root / "one/train/labels/x.txt", LINE)
    write(root / "one/data.yaml", "train: ../train/images\nnames: [ant]\n")
    with pytest.warns(
        UserWarning, match=r"\.\./train/images is taken for .*one/train/images, although .* is there too"
    ):
        assert load_split(root / "one").names == ["x.png"]


def test_a_path_that_is_there_is_the_only_one(root):
    image(root / "sub/images/train/x.png")
    write(root / "sub/labels/train/x.txt", LINE)
    write(root / "data.yaml", "path: sub\ntrain: images/train\nval: images/val\nnames: [ant]\n")
    assert load_split(root).names == ["x.png"]
    with pytest.raises(DataError, match=r"val: no folder or list of images at .*/sub/images/val; without a line"):
        load_split(root, "val")


def test_two_images_with_one_text_file(root):
    image(root / "images/train/a.bmp")
    with pytest.warns(
        UserWarning, match=r"label file shared: 1, .*labels/train/a\.txt: has the boxes of .* and of .*a\.png"
    ):
        assert load_split(root).images.ends.tolist() == [1, 2, 3]


def test_a_folder_that_is_named_from_within(root, monkeypatch):
    for name in "ab":
        (root / f"images/train/{name}.txt").write_text("1 0.5 0.5 1 1\n")
    write(root / "images/train/data.yaml", "train: .\nnames: [ant, owl]\n")
    monkeypatch.chdir(root / "images/train")
    expected = load_split(root / "images/train")
    assert load_split(Path(".")).images.boxes.tolist() == expected.images.boxes.tolist() == [[15, 5, 25, 15]] * 2


def test_the_working_directory_does_not_decide(root, monkeypatch):
    """Another copy of the dataset, or another dataset, may lie there."""
    for folder in (root / "work", root / "work/datasets/birds"):
        image(folder / "images/train/x.png")
        image(folder / "images/val/x.png")
        write(folder / "labels/train/x.txt", LINE)
    monkeypatch.chdir(root / "work")
    write(root / "data.yaml", "path: datasets/birds\ntrain: images/train\nval: images/val\nnames: [ant, owl]\n")
    with pytest.warns(UserWarning, match="path: 1, .* datasets/birds is not there: names start from"):
        assert load_split(root).names == ["a.png", "b.png"]
    write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/none\nnames: [ant, owl]\n")
    (root / "work/images/none").mkdir()
    with pytest.raises(DataError, match=r"val: no folder or list of images at"):
        load_split(root, "val")


def test_hidden_folders_are_not_read(root):
    image(root / "images/train/.ipynb_checkpoints/a-checkpoint.png")
    assert load_split(root).names == ["a.png", "b.png"]


def test_a_folder_by_its_name_and_by_a_link(root):
    (root / "images/again").symlink_to("train")
    (root / "labels/again").symlink_to("train")
    write(root / "data.yaml", "train: [images/train, images/again]\nnames: [ant, owl]\n")
    problems = read_part(open_dataset(root), "train").problems
    assert [(problem.kind, problem.fatal) for problem in problems] == [("image twice", False)] * 2
    # two names for one file are two images: each has its own boxes
    (root / "images/train/c.png").symlink_to("a.png")
    write(root / "data.yaml", "train: images/train\nnames: [ant, owl]\n")
    assert load_split(root).names == ["a.png", "b.png", "c.png"]


def test_a_yaml_that_names_its_own_folder(tmp_path):
    """As some exports of Roboflow do; and lists with a folder before that is not there, as of Datumaro."""
    birds(tmp_path / "Hat-1")
    text = "train: Hat-1/images/train\nval: Hat-1/images/val\ntest: /content/Hat-1/images/val\nnames: [ant, owl]\n"
    write(tmp_path / "Hat-1/data.yaml", text)
    dataset = open_dataset(tmp_path / "Hat-1")
    assert dataset.splits == ["train", "val", "test"]
    for split in dataset.splits:
        with pytest.warns(UserWarning, match=r"path: 1, .*Hat-1/images/.* is not there: .*/Hat-1/images/.* is taken"):
            load_split(dataset, split)
    write(tmp_path / "Hat-1/train.txt", "data/images/train/b.png\n")
    write(tmp_path / "Hat-1/data.yaml", "train: train.txt\nnames: [ant, owl]\n")
    with pytest.warns(UserWarning, match=r"path: 1, .*train\.txt: line 1: data/images/train/b.png is not there"):
        assert load_split(tmp_path / "Hat-1").names == ["b.png"]


def test_an_xml_of_cvat_beside_it(root):
    write(root / "annotations.xml", "<?xml version='1.0'?><annotations><version>1.1</version></annotations>")
    assert open_dataset(root).format == "yolo"
