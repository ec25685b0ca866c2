"""YOLO's folders: every way to name images and classes, and every fault by file and line."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from detr.cli import main
from detr.errors import DataError
from detr.formats import open_dataset
from detr.images import Reading
from detr.load import load_split, read_part

LINE = "0 0.5 0.5 0.25 0.5\n"


def image(path, size=(40, 20), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(abs(hash(path.name)) % 100).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path):
    """Two training images and one of val, of 40 x 20 pixels, each with a box in the middle."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        image(tmp_path / "images" / split / f"{name}.png")
        write(tmp_path / "labels" / split / f"{name}.txt", LINE)
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [ant, owl]\n")
    return tmp_path


def fatal(root, name="train"):
    """The only fatal problem."""
    problems = read_part(open_dataset(root), name).problems
    [problem] = [problem for problem in problems if problem.fatal]
    return problem


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
    assert split._names == ["a.png", "b.png", "sub/c.JPG"]
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
    assert split._names == ["a.png", "b.png"] and split.images.ends.tolist() == [1, 1]
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


LINES = {
    "3 numbers": ("0 0.5 0.5", "expected a class and 4 numbers .*; got 3 numbers"),
    "6 numbers": ("0 0.5 0.5 0.25 0.5 0.9", "expected a class and 4 .*; got 6 numbers: a detection with its score"),
    "8 numbers": ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "expected .* the corners of a polygon, 3 or more; got 8 numbers"),
    "a class alone": ("0", "expected a class and 4 numbers .*; got 1 numbers"),
    "above 1": ("0 0.5 0.5 0.25 1.2", r"expected fractions of the image, 0 to 1, got 1\.2"),
    "below 0": ("0 -0.1 0.5 0.25 0.2", r"expected fractions of the image, 0 to 1, got -0\.1"),
    "pixels": ("0 20 10 10 10", "expected fractions of the image, 0 to 1, got 20"),
    "a polygon outside": ("0 0.1 0.2 0.5 1.9 0.3 0.1", r"expected fractions of the image, 0 to 1, got 1\.9"),
    "NaN": ("0 nan 0.5 0.25 0.5", "expected finite numbers, got nan"),
    "infinity": ("0 0.5 inf 0.25 0.5", "expected finite numbers, got inf"),
    "a word": ("0 0.5 0.5 0.25 wide", "expected finite numbers, got wide"),
    "commas": ("0,0.5,0.5,0.25,0.5", r"expected finite numbers, got 0,0\.5,.*"),
    "half a class": ("0.5 0.5 0.5 0.25 0.5", r"expected the number of a class first, got 0\.5"),
    "a class below 0": ("-1 0.5 0.5 0.25 0.5", "expected the number of a class first, got -1"),
    "a class without a name": ("2 0.5 0.5 0.25 0.5", r"class 2, and .*data\.yaml names 2 classes, 0 to 1"),
    "the name of a class": ("ant 0.5 0.5 0.25 0.5", "expected finite numbers, got ant"),
    "far outside": ("0 0.9 0.5 0.5 0.5", r"\[26, 5, 46, 15\] reaches outside its image of 40x20 pixels"),
}


@pytest.mark.parametrize("name", LINES)
def test_each_fault_of_a_line_is_named_by_file_and_line(root, name, capsys):
    line, message = LINES[name]
    file = root / "labels/train/a.txt"
    write(file, f"{LINE}{line}\n1 0.5 0.5 0.5 0.5\n")
    problem = fatal(root)
    assert (problem.file, problem.entry) == (str(file), "line 2") and re.fullmatch(message, problem.message.rstrip("?"))
    assert main(["check-data", str(root)]) == 1
    assert f": 1, the first: {file}: line 2: " in capsys.readouterr().out
    assert main(["train", "--data", str(root), "--out", str(root / "run")]) == 1
    assert f"detr train: error: {file}: line 2: " in capsys.readouterr().err
    # another file is read to its end all the same
    write(root / "labels/train/b.txt", "0 0\n0 0\n")
    assert len([p for p in read_part(open_dataset(root), "train").problems if p.fatal]) == 3


def test_a_class_written_as_a_float_and_numbers_at_the_border(root):
    write(root / "labels/train/a.txt", "1.0 0.5 0.5 1.0000004 1\n0 0.9875 0.5 0.025 1\n")
    split = load_split(root)
    assert split.images[0].boxes.tolist() == [[0, 0, 40, 20], [39, 0, 40, 20]] and split.images.labels[0] == 1


def test_boxes_without_area_and_boxes_twice_are_warned_of(root):
    write(root / "labels/train/a.txt", f"{LINE}0 0.5 0.5 0 0.5\n{LINE}")
    problems = read_part(open_dataset(root), "train").problems
    assert [(p.kind, p.entry, p.fatal) for p in problems] == [
        ("zero area", "line 2", False),
        ("box twice", "line 3", False),
    ]
    assert problems[1].message == "[15, 5, 25, 15] is the box of line 1 too"


YAMLS = {
    "does not parse": ("train: images/train\nnames: [ant\n", r"line \d column 1: not yaml: .*"),
    "a tab": ("train: images/train\n\tnames: [ant]\n", "line 2 column 1: not yaml: .*"),
    "a text": ("hello\n", "expected keys and values .*, got 'hello'"),
    "a list": ("- train\n", "expected keys and values .*"),
    "nothing": ("", "expected keys and values .*, got 'None'"),
    "nested": ("names: " + "[" * 20000, "not a dataset: its lists are nested too deep"),
    "no train": ("names: [ant]\n", r"expected train, the folder of its images or a list of them, got \['names'\]"),
    "no names": ("train: images/train\n", "names: expected a list of names, or number: name, got None"),
    "names of a file": ("train: images/train\nnames: a.txt\n", "names: expected a list of names, .* got a.txt"),
    "no class": ("train: images/train\nnames: []\n", "names: expected a name for each class, numbered from 0, got .*"),
    "names by name": ("train: images/train\nnames: {ant: 0}\n", "names: expected a list of names, or number: name, .*"),
    "negative": ("train: images/train\nnames: {-1: a, 0: b}\n", "names: expected a name for each class, numbered .*"),
    "a name that is a list": ("train: images/train\nnames: [[a], b]\n", "names: expected a text for class 0, got .*"),
    "an empty name": ("train: images/train\nnames: ['', b]\n", "names: expected a text for class 0, got ''"),
    "a name twice": ("train: images/train\nnames: [a, b, a]\n", "names: classes 0 and 2 are both called 'a'"),
    "no such folder": ("train: nowhere\nnames: [a]\n", "train: no folder or list of images at .*/nowhere"),
    "a number": ("train: {a: 1}\nnames: [a]\n", "train: expected the name of a folder or of a list of images, got .*"),
    "no images": ("train: labels\nnames: [a]\n", "train: expected images, found none in labels"),
    "path": ("path: [a]\ntrain: images/train\nnames: [a]\n", "path: expected the name of a folder, got .*"),
    "points": ("train: images/train\nnames: [a]\nkpt_shape: 3\n", "kpt_shape: expected two integers, got 3"),
    "itself": ("train: images/train\nnames: &a [*a]\n", "line 2 column 8: not yaml: .* recursive .*"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_each_fault_of_the_yaml_is_one_line(root, name, capsys):
    text, message = YAMLS[name]
    write(root / "data.yaml", text)
    assert main(["check-data", str(root)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.fullmatch(f"detr check-data: error: {re.escape(str(root / 'data.yaml'))}: {message}\n", line)


def test_text_that_is_no_utf_8(root):
    (root / "data.yaml").write_bytes(b"train: images/train\nnames: [z\xe8bre]\n")
    with pytest.raises(DataError, match=r"data\.yaml: byte 29: expected text in UTF-8: "):
        open_dataset(root)
    (root / "data.yaml").write_bytes("\ufefftrain: images/train\nnames: [zèbre, a]\n".encode())
    (root / "labels/train/a.txt").write_bytes(b"\xff\xfe0")
    problem = fatal(root)
    assert problem.file.endswith("a.txt") and problem.message.startswith("byte 0: expected text in UTF-8")


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
        assert load_split(root)._names == ["a.png", "b.png"]
    write(root / "train.txt", f"{place}/b.png\nimages/train/a.png\n".replace("\\\\", "\\"))
    write(root / "data.yaml", "train: train.txt\nnames: [ant, owl]\n")
    with pytest.warns(UserWarning, match=r"path: 1, .*train\.txt: line 1: .*/b\.png is not there: .*b\.png is taken"):
        assert load_split(root)._names == ["b.png", "a.png"]
    write(root / "data.yaml", f"train: {place}s\nnames: [ant, owl]\n".replace("\\\\", "\\"))
    with pytest.raises(DataError, match=r"data\.yaml: train: no folder or list of images at"):
        load_split(root)


def test_a_data_yaml_of_something_else(root):
    write(root / "data.yaml", "service: {port: 80}\n")
    with pytest.raises(DataError, match=r"no dataset: looked for .*; found data\.yaml, images, labels$"):
        open_dataset(root)


def test_a_list_that_names_images_that_are_not_there(root):
    write(root / "train.txt", "images/train/a.png\nimages/train/z.png\nimages/train/b.png\nimages/train\n")
    write(root / "data.yaml", "train: train.txt\nnames: [ant, owl]\n")
    problems = [p for p in read_part(open_dataset(root), "train").problems if p.fatal]
    assert [(p.file, p.entry) for p in problems] == [(str(root / "train.txt"), f"line {i}") for i in (2, 4)]
    assert problems[0].message == f"no image at {root}/images/train/z.png"


def test_no_boxes_at_all(root):
    (root / "labels").rename(root / "label")
    problem = fatal(root)
    looked_for = f"looked for {root}/labels/train/a.txt and {root}/images/train/a.txt, and so on"
    assert str(problem) == f"{root}/data.yaml: train: none of the 2 images has a file with boxes: {looked_for}"


def test_an_image_that_cannot_be_read(root):
    write(root / "images/train/b.png", "x")
    problem = fatal(root)
    assert problem.file == f"{root}/images/train/b.png" and problem.message.startswith("not a readable image: ")
    (root / "images/train/b.png").unlink()
    image(root / "images/train/b.png")
    data = (root / "images/train/b.png").read_bytes()
    (root / "images/train/b.png").write_bytes(data[:-300])
    assert read_part(open_dataset(root), "train").problems == []
    [problem] = read_part(open_dataset(root), "train", decode=True).problems
    assert (problem.file, problem.kind) == (f"{root}/labels/train/b.txt", "image file")
    assert problem.message.startswith(f"{root}/images/train/b.png: not a readable image")


def test_an_image_in_train_and_val(root, capsys):
    write(root / "val.txt", "images/val/c.png\nimages/train/b.png\n")
    write(root / "data.yaml", "train: images/train\nval: val.txt\nnames: [ant, owl]\n")
    assert main(["check-data", str(root)]) == 0
    message = f"{root}/images/train/b.png is {root}/images/train/b.png, an image of the training"
    assert f"warning seen in training: 1, the first: {root}/labels/train/b.txt: {message}" in capsys.readouterr().out


def test_classes_of_a_validation_in_another_order_are_matched_by_name(root):
    train = load_split(root)
    write(root / "data.yaml", "val: images/val\ntrain: images/val\nnames: [owl, ant]\n")
    assert load_split(root, "val", train.categories).images.labels.tolist() == [1]
    write(root / "data.yaml", "val: images/val\ntrain: images/val\nnames: [cow, ant]\n")
    with pytest.raises(DataError, match=r"c\.txt: class 'cow' is none of the training, which has 'ant', 'owl'"):
        load_split(root, "val", train.categories)
