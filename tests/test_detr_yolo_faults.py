"""Faults of YOLO's folders, each named by file and line."""

import os
import re

import pytest
import user_files
from yolo_files import LINE, birds, fatal, image, write

from detr.cli import main
from detr.errors import DataError
from detr.formats import open_dataset
from detr.splits import load_split, read_part


@pytest.fixture
def root(tmp_path):
    return birds(tmp_path)


LINES = {
    "3 numbers": ("0 0.5 0.5", "expected a class and 4 numbers .*; got 3 numbers"),
    "6 numbers": ("0 0.5 0.5 0.25 0.5 0.9", r"expected a class and 4 .*; got 6 numbers: a detection with its score\?"),
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
    "a class without a name": (
        "2 0.5 0.5 0.25 0.5",
        r"class 2, and .*data\.yaml names the classes 0 to 1, counted from 0",
    ),
    "the name of a class": ("ant 0.5 0.5 0.25 0.5", "expected finite numbers, got ant"),
    "far outside": ("0 0.9 0.5 0.5 0.5", r"\[26, 5, 46, 15\] reaches outside its image of 40x20 pixels"),
}


@pytest.mark.parametrize("name", LINES)
def test_each_fault_of_a_line_is_named_by_file_and_line(root, name, capsys):
    line, message = LINES[name]
    file = root / "labels/train/a.txt"
    write(file, f"{LINE}{line}\n1 0.5 0.5 0.5 0.5\n")
    problem = fatal(root)
    assert (problem.file, problem.entry) == (str(file), "line 2") and re.fullmatch(message, problem.message)
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
    "no class": ("train: images/train\nnames: []\n", "names: expected a list of names, or number: name, got .*"),
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


def test_a_key_that_is_there_twice(root):
    """One of the two would be lost without a word."""
    for text, message in (
        ("train: images/train\ntrain: images/val\nnames: [ant]\n", r"line 2 column 1: not yaml: train is there twice"),
        ("train: images/train\nnames: {0: ant, 1: owl, 1: bee}\n", r"line 2 column 25: not yaml: 1 is there twice"),
        ("train: images/train\nnames: {0: ant, 1: owl, 01: bee}\n", "names: class 1 is both 'owl' and 'bee'"),
    ):
        write(root / "data.yaml", text)
        with pytest.raises(DataError, match=rf"data\.yaml: {message}$"):
            load_split(root)


def test_what_is_wrong_with_a_yaml_is_said_where_it_is(root):
    write(root / "data.yaml", "train: images/train\nval:images/val\n\nnames: [ant]\n")
    with pytest.raises(DataError, match=r"line 2 column 1: not yaml: .* \(expected a space after the ':' of a key\)$"):
        open_dataset(root)
    write(root / "data.yaml", "train: images/train\n\tval: images/val\n")
    with pytest.raises(DataError, match=r"line 2 column 1: not yaml: .* \(expected spaces, not tabs\)$"):
        open_dataset(root)


def test_a_yaml_that_names_a_billion_classes_is_refused_at_once(root):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    write(root / "data.yaml", "\n".join([*lines, "train: images/train", "names: *a8"]))
    with pytest.raises(DataError, match="names: expected a text for class 0, got ") as error:
        load_split(root)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("kind", ["folder", "broken link", "loop"])
def test_something_else_in_the_place_of_a_text_file(root, kind):
    path = root / "labels/train/a.txt"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "broken link" else "a.txt")
    problem = fatal(root)
    assert problem.file == str(path) and problem.message.startswith("not read: ")


def test_files_that_nobody_may_read(root):
    with user_files.unreadable(root / "labels/train/a.txt"):
        assert fatal(root).message == "not read: Permission denied"
    (root / "images/train/sub").mkdir()
    message = "images/train/sub: not read: Permission denied"
    with user_files.unreadable(root / "images/train/sub"), pytest.raises(DataError, match=message):
        load_split(root)


def test_stray_files_that_are_not_of_the_dataset(root):
    (root / "data.yaml").rename(root / "birds.yaml")
    (root / "other.yaml").mkdir()
    (root / "third.yaml").symlink_to("nowhere")
    write(root / "._birds.yaml", "train: x\nnames: [x]\n")
    (root / "pom.xml").mkdir()
    (root / "train").mkdir()
    (root / "train/x.xml").symlink_to("x.xml")
    assert len(load_split(root).images) == 2
    os.mkfifo(root / "images/train/pipe.png")  # which would be waited for
    assert len(load_split(root).images) == 2


def test_names_that_are_too_long_for_a_file_system(root):
    write(root / "data.yaml", f"train: {'x' * 300}\nnames: [ant]\n")
    with pytest.raises(DataError, match=r"data\.yaml: train: no folder or list of images at "):
        load_split(root)
    write(root / "train.txt", f"images/train/a.png\n{'x' * 300}.png\n")
    write(root / "data.yaml", "train: train.txt\nnames: [ant]\n")
    problem = fatal(root)
    assert problem.entry == "line 2" and problem.message.startswith("no image at ")


def test_lines_end_as_in_an_editor(root):
    write(root / "labels/train/a.txt", f"{LINE.strip()}\x0c\n0 2 0.5 0.25 0.5\n")
    assert fatal(root).entry == "line 2"
    (root / "labels/train/a.txt").write_bytes(f"{LINE.strip()}\r0 2 0.5 0.25 0.5".encode())
    assert fatal(root).entry == "line 2"


@pytest.mark.parametrize("word", ["0_1", "\u0661", "0x1", "1e", "--1", "1e400"])
def test_numbers_of_python_and_of_other_scripts(root, word):
    write(root / "labels/train/a.txt", f"{word} 0.5 0.5 0.25 0.5\n")
    assert fatal(root).message == f"expected finite numbers, got {word}"


@pytest.mark.parametrize("shape", ["'12'", "[-1, 2]", "[1]", "{1: 2}", "[a, b]", f"[{'1' * 5000}, 1]"])
def test_points_that_cannot_be_meant(root, shape):
    write(root / "data.yaml", f"train: images/train\nnames: [ant]\nkpt_shape: {shape}\n")
    with pytest.raises(DataError, match="kpt_shape: expected two integers, got "):
        load_split(root)


def test_a_class_between_others(root):
    write(root / "data.yaml", "train: images/train\nnames: {0: ant, 7: owl}\n")
    write(root / "labels/train/a.txt", "3 0.5 0.5 0.25 0.5\n")
    assert fatal(root).message == f"class 3, and {root}/data.yaml names the classes 0, 7, counted from 0"


def test_a_split_that_cannot_be_read_beside_one_that_can(root, capsys):
    write(root / "data.yaml", "train: images/train\nval: images/valid\nnames: [ant, owl]\n")
    assert main(["check-data", str(root)]) == 1
    out = capsys.readouterr().out
    assert "images               2, 0 of them without objects" in out
    assert f"error split: 1, the first: {root}/data.yaml: val: no folder or list of images at " in out


@pytest.mark.parametrize("text", ["path: {{ path }}\n", "? {a: b}\n: 1\n", "? [a]\n: 1\n"])
def test_keys_that_are_no_texts(root, text):
    write(root / "template.yaml", text)
    (root / "data.yaml").rename(root / "birds.yaml")
    assert len(load_split(root).images) == 2
    write(root / "data.yaml", text)
    with pytest.raises(DataError, match=r"data\.yaml: line 1 column \d+: not yaml: a key that is no text"):
        open_dataset(root)


def test_pipes_are_not_waited_for(root):
    (root / "labels/train/a.txt").unlink()
    os.mkfifo(root / "labels/train/a.txt")
    assert fatal(root).message == "not read: expected a file"
    os.mkfifo(root / "train.txt")
    write(root / "data.yaml", "train: train.txt\nnames: [ant, owl]\n")
    with pytest.raises(DataError, match=r"train\.txt: not read: expected a file"):
        load_split(root)
