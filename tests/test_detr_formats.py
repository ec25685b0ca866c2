"""Every format gives the same split, and so the same training; a folder says which format it is, or is asked about."""

import json
import shutil
import threading
from dataclasses import replace

import coco_files
import data_formats
import numpy as np
import pytest
import torch
from user_files import SMALL

from detr import checkpoint
from detr.cli import main
from detr.config import DATA_FORMATS
from detr.errors import ArgumentError, DataError
from detr.formats import FORMATS, open_dataset
from detr.images import for_each
from detr.splits import divide, load_split, load_to_evaluate, read_parts

NAMES = ["coco", *data_formats.WRITERS]
assert_same = data_formats.assert_same
HELD_OUT = [f"{i:06d}.jpg" for i in [3, 6, 9, 10, 17, 28, 29, 30]]  # by sha256 of "3/name"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return data_formats.write_all(tmp_path_factory.mktemp("formats"))


def test_the_formats_are_those_of_the_flag():
    assert tuple(FORMATS) == DATA_FORMATS


@pytest.mark.parametrize("name", data_formats.WRITERS)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.filterwarnings("ignore:superfluous category")
def test_every_format_gives_the_same_split(datasets, name, split):
    dataset = open_dataset(datasets / name)
    assert dataset.format == name and dataset.splits == ["train", "val"]
    assert_same(load_split(dataset, split), load_split(datasets / "coco", split))


def test_every_format_trains_the_same(datasets, tmp_path, capsys):
    states = {}
    for name in NAMES:
        flags = ["--steps", "20", "--workers", "0", "--set", "eval_steps=20", *SMALL]
        assert main(["train", "--data", str(datasets / name), "--out", str(tmp_path / name), *flags]) == 0
        states[name] = checkpoint.load(tmp_path / name / "checkpoint.pt")
    for name in NAMES[1:]:
        assert states[name]["model"].keys() == states["coco"]["model"].keys()
        for key, tensor in states["coco"]["model"].items():
            assert torch.equal(tensor, states[name]["model"][key]), (name, key)
    assert [states[name]["class_names"] for name in NAMES] == [["disc", "square", "star", "triangle"]] * len(NAMES)
    # what was trained on one is evaluated on another, whatever numbers the classes have there
    scores = []
    for name in NAMES:
        report = tmp_path / f"{name}.json"
        arguments = ["--checkpoint", str(tmp_path / "yolo"), "--out", str(report)]
        assert main(["eval", "--data", str(datasets / name), *arguments]) == 0
        scores.append(
            {key: v for key, v in json.loads(report.read_text()).items() if key not in ("seconds", "per_class")}
        )
    assert scores[1:] == scores[:-1]
    assert "detr eval: error" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["yolo"])
def test_a_run_resumes_on_its_format(datasets, tmp_path, name, capsys):
    data = tmp_path / "data"
    shutil.copytree(datasets / name, data)
    flags = ["--steps", "1", "--workers", "0", "--format", name, *SMALL]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["data"]["format"] == name
    data.rename(tmp_path / "moved")
    assert main(["train", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "moved")]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--format", "coco"]) == 1
    assert "resume: the run goes on as it was: format cannot be changed" in capsys.readouterr().err


def test_two_formats_in_one_folder(datasets, tmp_path, capsys):
    for name in ("coco", "yolo"):
        shutil.copytree(datasets / name, tmp_path, dirs_exist_ok=True)
    assert main(["check-data", str(tmp_path)]) == 1
    assert (
        f"error: {tmp_path}: files of COCO and YOLO: say which with --format coco or yolo\n" in capsys.readouterr().err
    )
    for name, title in (("coco", "COCO"), ("yolo", "YOLO")):
        assert main(["check-data", str(tmp_path), "--format", name]) == 0
        assert f"{tmp_path}: {title}, train, val\n" in capsys.readouterr().out
    assert main(["check-data", str(tmp_path), "--format", "voc"]) == 1
    assert "no dataset: looked for Annotations/*.xml" in capsys.readouterr().err
    # names of files are COCO's
    assert open_dataset(tmp_path, "coco").format == "coco"
    assert main(["check-data", str(tmp_path), "--train-json", "instances_train.json"]) == 0
    assert main(["check-data", str(tmp_path), "--train-json", "x.json", "--format", "yolo"]) == 1
    assert "names of json files and image folders: expected with --format coco, got yolo" in capsys.readouterr().err
    assert main(["check-data", str(tmp_path), "--classes", "a,b", "--format", "yolo"]) == 1
    assert "classes: expected with Pascal VOC, which has no order of classes, got YOLO" in capsys.readouterr().err
    # a broken file of one format beside another is asked about too
    (tmp_path / "data.yaml").write_text("names: [")
    assert main(["check-data", str(tmp_path)]) == 1
    assert "files of COCO and YOLO: say which" in capsys.readouterr().err
    assert main(["check-data", str(tmp_path), "--format", "coco"]) == 0


def test_the_category_that_roboflow_adds(datasets, tmp_path, capsys):
    shutil.copytree(datasets / "roboflow", tmp_path, dirs_exist_ok=True)
    assert main(["check-data", str(tmp_path)]) == 0
    assert 'category 0: "things" has no box in any split, as the group that Roboflow adds: left out' in (
        capsys.readouterr().out
    )
    # one box of it, in any split, and it is a class
    path = tmp_path / "valid" / "_annotations.coco.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(data))
    dataset = open_dataset(tmp_path)
    train = load_split(dataset, "train")
    assert train.class_names == ["things", "disc", "square", "star", "triangle"]
    assert load_split(dataset, "val", train.categories).images.labels[0] == 0
    # a file in COCO's layout is taken as it is
    data = coco_files.content()
    data["categories"].append({"id": 0, "name": "things"})
    assert coco_files.load(coco_files.write(tmp_path / "flat", data)).class_names == ["things", "ant", "owl", "zebra"]


def test_the_same_classes_under_other_numbers(tmp_path):
    """In the same order they are fine; in another order two files may mean different classes."""
    train = coco_files.load(coco_files.write(tmp_path))
    data = coco_files.content()
    new = {3: 0, 17: 1, 90: 2}
    for category in data["categories"]:
        category["id"] = new[category["id"]]
    for annotation in data["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    val = coco_files.load(coco_files.write(tmp_path, data, "val"), train.categories)
    assert val.categories == train.categories and np.array_equal(val.images.labels, train.images.labels)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_validation_split_some_images_are_held_out(datasets, tmp_path, name, capsys):
    shutil.copytree(datasets / name, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*val*"):
        if path.name in ("instances_val.json", "valid", "val.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "yolo":
        text = (tmp_path / "data" / "data.yaml").read_text()
        (tmp_path / "data" / "data.yaml").write_text(text.replace("val: images/val\n", ""))
    flags = ["--steps", "1", "--workers", "0", *SMALL]
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *flags]) == 0
    said = "has no split val: 6 of its 32 images are held out for it (--val-fraction 0.2 --split-seed 0)"
    assert f"{tmp_path / 'data'} {said}" in capsys.readouterr().out
    assert main(["eval", "--data", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "run")]) == 0
    assert said in capsys.readouterr().out
    # the same images, whatever the format
    parts, _ = read_parts(open_dataset(tmp_path / "data"))
    train, val = divide(load_split(datasets / "coco"), 0.2, 0)
    if name == "voc":  # where the images have other names
        train, val = divide(load_split(datasets / "voc"), 0.2, 0)
        assert [parts["train"].split.names, parts["val"].split.names] == [train.names, val.names]
    else:
        assert_same(parts["train"].split, train)
        assert_same(parts["val"].split, val)


def test_which_images_are_held_out(datasets):
    split = load_split(datasets / "coco")
    train, val = divide(split, 0.25, 3)
    assert len(val.images) == 8 and sorted(train.names + val.names) == sorted(split.names)
    assert train.names == [name for name in split.names if name in train.names]  # in their order
    # written down: another version of this package has to hold out the same
    assert val.names == HELD_OUT
    # boxes go with their images
    for part in (train, val):
        for image in part.images:
            [same] = [other for other in split.images if other.path == image.path]
            assert torch.equal(image.boxes, same.boxes) and torch.equal(image.labels, same.labels)
    # neither the order of the images nor more of them move one from a side to the other, but at the border
    again = divide(split.only(list(range(32))[::-1]), 0.25, 3)[1]
    assert sorted(again.names) == sorted(val.names)
    assert divide(split, 0.25, 4)[1].names != val.names
    fewer = divide(split.only(range(28)), 0.25, 3)[1]
    assert len(set(fewer.names) - set(val.names)) <= 2
    assert len(divide(split, 0.001, 0)[1].images) == 1 and len(divide(split, 0.999, 0)[0].images) == 1
    with pytest.raises(DataError, match="expected a split val, or 2 images to hold one of them out, got 1 image"):
        divide(split.only([0]), 0.5, 0)


def test_images_are_looked_at_several_at_a_time():
    """Two that wait for each other would wait for ever, one after the other."""
    barrier = threading.Barrier(2, timeout=20)

    def meet(item):
        barrier.wait()
        if item == 1:
            raise DataError("one")
        return 10 * item

    found = for_each(meet, [0, 1, 2, 3], "meeting")
    assert [str(each) for each in found] == ["0", "one", "20", "30"]


def test_what_is_held_out_is_told_and_checked(datasets, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(datasets / "coco", data)
    assert main(["check-data", str(data), "--val-fraction", "0.5"]) == 1
    assert f"val_fraction and split_seed: {data} has a split val, which is taken" in capsys.readouterr().err
    (data / "instances_val.json").unlink()
    # a class with boxes in one image only is left without one where that is held out
    path = data / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 9, "name": "rare"})
    held = divide(load_split(data), 0.2, 0)[1].images[1]
    content["annotations"].append({"id": 9999, "image_id": held.image_id, "category_id": 9, "bbox": [1, 1, 9, 9]})
    path.write_text(json.dumps(content))
    report = tmp_path / "report.json"
    assert main(["check-data", str(data), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert f"{data} has no split val: 6 of its 32 images are held out for it" in printed
    message = "category 9 (rare): no box is of this class, so it cannot be learned or evaluated"
    assert f"warning class without examples: 1, the first: {path}: {message}" in printed
    found = json.loads(report.read_text())
    assert found["train"]["images"] == 26 and found["val"]["images"] == 6
    [problem] = found["train_problems"]
    assert problem["kind"] == "class without examples" and not problem["fatal"]
    assert found["format"] == "coco" and found["splits"] == ["train"]
    flags = ["--steps", "1", "--workers", "0", "--val-fraction", "0.5", "--split-seed", "7", *SMALL]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    out, _ = capsys.readouterr()
    assert "16 of its 32 images are held out for it (--val-fraction 0.5 --split-seed 7)" in out
    # it is evaluated on the images that it held out, unless others are asked for
    for more, said in ((["--split-seed", "1"], "0.2 --split-seed 1"), ([], "0.5 --split-seed 7")):
        assert main(["eval", "--data", str(data), "--checkpoint", str(tmp_path / "run"), *more]) == 0
        out, error = capsys.readouterr()
        assert f"(--val-fraction {said})" in out
        assert ("did not hold out these images: it may have been trained on some of them" in error) == bool(more)
    # the run remembers, and goes on with the same images
    kept = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["data"]
    assert (kept["val_fraction"], kept["split_seed"]) == (0.5, 7)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--split-seed", "0"]) == 1
    assert "resume: the run goes on as it was: split_seed cannot be changed" in capsys.readouterr().err


def test_a_held_out_part_without_objects(datasets, tmp_path):
    split = load_split(datasets / "coco")
    held = divide(split, 0.03, 0)[1]
    data = data_formats.content(datasets / "coco", "train")
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != held.images.ids[0]]
    shutil.copytree(datasets / "coco" / "train", tmp_path / "train")
    (tmp_path / "instances_train.json").write_text(json.dumps(data))
    parts, _ = read_parts(open_dataset(tmp_path), hold_out=(0.03, 0))
    [problem] = parts["val"].problems
    assert problem.fatal and "expected a box in one of the 1 images, found none" in str(problem)
    assert str(problem).endswith("; another --split-seed or --val-fraction holds other images out")


def test_what_is_evaluated_of_a_dataset_without_a_validation_split(datasets, tmp_path):
    shutil.copytree(datasets / "coco", tmp_path, dirs_exist_ok=True)
    (tmp_path / "instances_val.json").unlink()
    dataset = open_dataset(tmp_path)
    categories = load_split(dataset).categories
    for name, hold_out, count in (
        ("val", None, 6),
        ("val", (0.5, 1), 16),
        ("train", None, 32),
        ("train", (0.5, 1), 16),
    ):
        split, said = load_to_evaluate(dataset, name, categories, hold_out=hold_out)
        assert len(split.images) == count and bool(said) == (count < 32)
    with pytest.raises(DataError, match="no split 'test'"):
        load_to_evaluate(dataset, "test", categories)
    with pytest.raises(ArgumentError, match="val_fraction and split_seed: expected with split train or val, got test"):
        load_to_evaluate(dataset, "test", categories, hold_out=(0.5, 1))


def test_equal_names_in_several_folders_are_held_out_alike(datasets):
    split = load_split(datasets / "coco")
    moved = [replace(image, path=split.image_dir / str(i) / "a.jpg") for i, image in enumerate(split.images)]
    held = divide(replace(split, images=moved), 0.25, 0)[1]
    again = divide(replace(split, images=moved[::-1]), 0.25, 0)[1]
    assert sorted(held.names) == sorted(again.names) and len(held.names) == 8


def test_a_run_goes_on_when_its_dataset_has_grown(datasets, tmp_path, capsys):
    """By a split val, and by another format in the same folder: it goes on with what it began with."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(datasets / "coco", data)
    (data / "instances_val.json").rename(tmp_path / "val.json")
    flags = ["--steps", "1", "--workers", "0", *SMALL]
    assert main(["train", "--data", str(data), "--out", str(run), *flags]) == 0
    (tmp_path / "val.json").rename(data / "instances_val.json")
    shutil.copy(datasets / "yolo" / "data.yaml", data)
    for kind in ("images", "labels"):
        shutil.copytree(datasets / "yolo" / kind, data / kind)
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    out, error = capsys.readouterr()
    assert "6 of its 32 images are held out for it (--val-fraction 0.2 --split-seed 0)" in out
    assert "error" not in error
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "new"), *flags]) == 1
    assert "files of COCO and YOLO: say which" in capsys.readouterr().err
