"""Every fault of a dataset is found before training, in one line that names file, id and field."""

import json
import re
from dataclasses import replace

import coco_files
import pytest
import torch

from detr.check_data import check_against, check_pair
from detr.cli import main
from detr.errors import DataError
from detr.formats import open_dataset
from detr.formats.coco import read_coco
from detr.images import DEFAULT_READING
from detr.model import build_model
from detr.presets import PRESETS, preset
from detr.splits import load_split
from detr.summary import summary, summary_table, tokens


def edit(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


FAULTS = {
    "unknown category": (("annotations", 1, "category_id"), 4, "annotation 11: category_id: 4 is none of the 3"),
    "unknown image": (("annotations", 1, "image_id"), 6, "annotation 11: image_id: 6 is none of the 3"),
    "text for an id": (("annotations", 1, "image_id"), "2", 'annotation 11: image_id: expected an integer, got "2"'),
    "negative width": (
        ("annotations", 2, "bbox", 2),
        -3,
        "annotation 7: bbox: expected a width and height of at least 0",
    ),
    "outside at the right": (("annotations", 2, "bbox", 2), 22, "annotation 7: bbox: .* outside its image of 40x30"),
    "outside at the top": (("annotations", 1, "bbox", 1), -2, "annotation 11: bbox: .* outside its image of 20x50"),
    "nan": (("annotations", 0, "bbox", 1), float("nan"), "annotation 0: bbox: expected 4 finite numbers .* NaN"),
    "huge": (("annotations", 0, "bbox", 1), 10**400, "annotation 0: bbox: expected 4 finite numbers"),
    "three numbers": (("annotations", 0, "bbox"), [1, 2, 3], r"annotation 0: bbox: expected 4 .* got \[1, 2, 3\]"),
    "text for a number": (("annotations", 0, "bbox", 0), "4", "annotation 0: bbox: expected 4 finite numbers"),
    "annotation id twice": (("annotations", 1, "id"), 7, "annotation 7: id: another annotation has the same id"),
    "annotation without id": (
        ("annotations", 3, "id"),
        None,
        "annotation at position 3: id: expected an integer, got null",
    ),
    "crowd": (("annotations", 3, "iscrowd"), 2, "annotation 8: iscrowd: expected 0 or 1, got 2"),
    "area": (("annotations", 0, "area"), -1, "annotation 0: area: expected square pixels, got -1"),
    "image id twice": (("images", 1, "id"), 9, "image 9: id: another image has the same id"),
    "half a pixel": (("images", 1, "width"), 20.5, "image 2: width: expected a positive integer, pixels, got 20.5"),
    "file twice": (("images", 1, "file_name"), "./a.png", "image 2: file_name: './a.png' is the file of image 5 too"),
    "infinite area": (("annotations", 0, "area"), float("inf"), "annotation 0: area: expected square pixels, got Inf"),
    "corners": (
        ("annotations", 2, "bbox"),
        [20.5, 10, 40, 30],
        "annotation 7: bbox: .* outside its image of 40x30 pixels, as corners x0, y0, x1, y1 would not: expected x, y",
    ),
    "image without id": (("images", 1, "id"), 2.5, "image at position 1: id: expected an integer, got 2.5"),
    "no width": (("images", 1, "width"), None, "image 2: width: expected a positive integer, pixels, got null"),
    "a huge width": (("images", 1, "width"), 1e30, "image 2: width: expected a positive integer, pixels, got 1000"),
    "no height": (("images", 1, "height"), 0, "image 2: height: expected a positive integer, pixels, got 0"),
    "climbing out": (("images", 1, "file_name"), "a/../../b.png", "image 2: file_name: 'a/../../b.png' leads out"),
    "absolute": (("images", 1, "file_name"), "/etc/passwd", "image 2: file_name: '/etc/passwd' leads out"),
    "drive": (("images", 1, "file_name"), "C:\\b.png", "image 2: file_name: .* leads out"),
    "no file name": (("images", 1, "file_name"), "", 'image 2: file_name: expected a text, got ""'),
    "category id twice": (("categories", 1, "id"), 17, "category 17: id: another category has the same id"),
    "category id": (("categories", 1, "id"), True, "category at position 1: id: expected an integer, got true"),
    "category name": (("categories", 1, "name"), 5, "category 3: name: expected a text, got 5"),
    "category name twice": (
        ("categories", 1, "name"),
        "owl",
        "category 17: name: another category is called 'owl' too",
    ),
    "no annotations": (("annotations",), [], "annotations: the dataset is empty"),
    "no images": (("images",), [], "images: the dataset is empty"),
    "no categories": (("categories",), None, "categories: expected a list of objects, got null"),
    "a list of numbers": (("images",), [1, 2], r"images: expected a list of objects, got \[1, 2\]"),
    "other size": (
        ("images", 2, "width"),
        17,
        "image 9: file_name: .*c.png: the image is 16x16 pixels, expected 17x16",
    ),
    "missing file": (("images", 2, "file_name"), "d.png", "image 9: file_name: .*d.png: the image file is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_stops_the_loading_in_one_line(tmp_path, fault):
    path, value, message = FAULTS[fault]
    json_path, image_dir = coco_files.write(tmp_path)
    coco_files.load((json_path, image_dir))  # the same data without the fault is fine
    data = coco_files.content()
    edit(data, path, value)
    json_path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=f"{re.escape(str(json_path))}: {message}") as error:
        coco_files.load((json_path, image_dir))
    assert "\n" not in str(error.value)


def test_the_whole_json_is_checked_and_further_faults_are_counted(tmp_path):
    json_path, image_dir = coco_files.write(tmp_path)
    data = coco_files.content()
    data["annotations"][0]["category_id"] = 1
    data["annotations"][2]["bbox"] = [0, 0, -1, 2]
    data["images"][2]["width"] = 0
    json_path.write_text(json.dumps(data))
    assert [(p.kind, p.entry, p.field) for p in coco_files.problems((json_path, image_dir))] == [
        ("image", "image 9", "width"),
        ("category_id", "annotation 0", "category_id"),
        ("box", "annotation 7", "bbox"),
    ]
    with pytest.raises(DataError, match=r"\(and 2 more; `detr check-data` lists them\)"):
        coco_files.load((json_path, image_dir))


@pytest.mark.parametrize("text", ['{"images": [', "", "\xff", "[1]"])
def test_a_file_that_is_no_coco_json(tmp_path, text):
    json_path, image_dir = coco_files.write(tmp_path)
    json_path.write_bytes(text.encode("latin-1"))
    message = "expected a json object, got" if text == "[1]" else "not json"
    with pytest.raises(DataError, match=f"{re.escape(str(json_path))}: .*{message}"):
        coco_files.load((json_path, image_dir))


def test_truncated_images_are_found_by_decoding(tmp_path):
    json_path, image_dir = coco_files.write(tmp_path)
    data = (image_dir / "c.png").read_bytes()
    (image_dir / "c.png").write_bytes(data[:-200])
    assert coco_files.problems((json_path, image_dir)) == []
    [problem] = coco_files.problems((json_path, image_dir), decode=True)
    assert problem.fatal and problem.entry == "image 9" and "c.png: not a readable image" in str(problem)


def test_boxes_without_area_are_dropped_with_one_warning(tmp_path):
    data = coco_files.content()
    for i, box in enumerate(([5, 5, 0, 0], [5, 5, 0, 3], [5, 5, 3, 0], [40.5, 5, 0.2, 3])):
        data["annotations"].append({"id": 100 + i, "image_id": 5, "category_id": 3, "bbox": box})
    json_path, image_dir = coco_files.write(tmp_path, data)
    with pytest.warns(
        UserWarning, match=r"zero area: 4, the first: .*annotation 100: bbox: .*0, 0\], is left out"
    ) as found:
        split = coco_files.load((json_path, image_dir))
    assert len(found) == 1
    assert [len(image.boxes) for image in split.images] == [3, 1, 0]
    assert all((image.boxes[:, 2:] > image.boxes[:, :2]).all() for image in split.images)


@pytest.mark.parametrize(
    ("box", "crowds"),
    [
        ([1, 1, 0, 0], 0),
        ([40.5, 1, 0.25, 9], 0),
        ([10, 10, 1e-20, 5], 0),
        ([10, 10, 1e-7, 5], 0),  # in float32
        ([1, 1, 9, 9], 1),
    ],
)
def test_a_dataset_without_a_box_that_counts(tmp_path, box, crowds):
    data = coco_files.content()
    data["annotations"] = [{"id": 1, "image_id": 5, "category_id": 3, "bbox": box, "iscrowd": crowds}]
    json_path, image_dir = coco_files.write(tmp_path, data)
    message = "expected a box in one of the 3 images, found none that has an area and counts"
    with pytest.raises(DataError, match=f"{json_path}: the dataset is empty: {message}; {crowds} are crowds, which"):
        coco_files.load((json_path, image_dir))
    # one box that counts is enough
    data["annotations"].append({"id": 2, "image_id": 5, "category_id": 3, "bbox": [1, 1, 9, 9]})
    json_path.write_text(json.dumps(data))
    assert not any(problem.fatal for problem in coco_files.problems((json_path, image_dir)))


def test_a_json_that_is_nested_deeply(tmp_path):
    (tmp_path / "a.json").write_text('{"images": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: not a dataset: its lists are nested too deep"):
        read_coco(tmp_path / "a.json", tmp_path, DEFAULT_READING)


def test_summary(tmp_path):
    config = preset("tiny", image_size=32, max_size=64, n_queries=2)
    counts = summary(coco_files.load(coco_files.write(tmp_path)), config)
    assert counts == {
        "images": 3,
        "images_without_objects": 1,
        "objects": 3,
        "crowds": 1,
        "most_objects_in_an_image": 2,
        "objects_per_class": {"ant": 1, "owl": 1, "zebra": 1},
        "shortest_side": [16, 30],
        "shortest_side_resized": [26, 32],
        # 32x32 pixels at strides 8, 16, 32; 32x43
        "tokens": [16 + 4 + 1, 4 * 8 + 2 * 4 + 1 * 2],
        "n_queries": 2,
    }
    table = summary_table(counts).splitlines()
    assert [line.split()[0] for line in table[-4:]] == ["tokens", "ant", "owl", "zebra"]
    assert table[0].split() == ["images", "3,", "1", "of", "them", "without", "objects"]
    assert table[-1].split() == ["zebra", "1", "33.3", "%", "#" * 30]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # the strides of the paper: the standard image has 22223 tokens
        ("deformable_detr_r50", (800, 1333), 22223),
        ("deformable_detr_r50_single_scale", (800, 1333), 25 * 42),
        ("deformable_detr_r50_single_scale_dc5", (800, 1333), 50 * 84),
        ("tiny", (96, 96), 189),
    ],
)
def test_tokens(name, size, expected):
    config = replace(PRESETS[name], pretrained_backbone=False)
    assert tokens(size, config) == expected
    if size == (96, 96):
        memory = build_model(config, 2)._pyramid(torch.zeros(1, 3, *size))
        assert sum(level.shape[2] * level.shape[3] for level in memory) == expected


def test_what_does_not_go_well_with_the_model(tmp_path):
    data = coco_files.content()
    data["categories"].append({"id": 1, "name": "ghost"})
    files = coco_files.write(tmp_path, data)
    split = coco_files.load(files)
    config = preset("tiny", image_size=32, max_size=64, n_queries=1)
    found = [(p.kind, p.entry, p.fatal) for p in check_against(split, config)]
    assert found == [("class without examples", "category 1 (ghost)", False), ("too many objects", "image 5", False)]
    config = preset("tiny", image_size=32, max_size=64, n_queries=22)
    found = [(p.kind, p.entry) for p in check_against(split, config)]
    assert found == [("class without examples", "category 1 (ghost)"), ("few tokens", "image 9")]
    with pytest.warns(UserWarning) as caught:
        coco_files.load(files, config=config)
    texts = [str(warning.message) for warning in caught]
    assert texts[0].startswith("class without examples: 1, the first: ")
    assert texts[1].endswith("resized to 32x32 pixels it has 21 tokens, so no more than as many of the n_queries = 22")


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: expected a folder with a dataset, or a data\.yaml, found none"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"no dataset: looked for annotations/instances_train2017\.json or .* \(COCO\); "
    ):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"no dataset: looked for data\.yaml with train .* \(YOLO\); found nothing$"):
        open_dataset(tmp_path, "yolo")
    (tmp_path / "instances_train.json").write_text("{}")
    with pytest.raises(
        DataError, match="no image folder of the split 'train': looked for train2017 or images/train2017 or train or im"
    ):
        load_split(tmp_path, "train")
    with pytest.raises(
        DataError, match=r"no split 'val': this COCO dataset has train; looked for .*instances_val\.json"
    ):
        load_split(tmp_path, "val")


def test_numbers_that_say_the_same_in_another_way(tmp_path):
    data = coco_files.content()
    expected = coco_files.load(coco_files.write(tmp_path, data)).content()
    for image in data["images"]:
        image |= {name: float(image[name]) for name in ("id", "width", "height")}
    for category in data["categories"]:
        category["id"] = float(category["id"])
    for annotation in data["annotations"]:
        annotation |= {name: float(annotation[name]) for name in ("id", "image_id", "category_id")}
    data["annotations"][0]["iscrowd"] = 0.0
    data["annotations"][1] |= {"iscrowd": None, "area": None}
    (tmp_path / "instances_train.json").write_text(json.dumps(data))
    split = load_split(tmp_path, "train")
    assert split.content() == expected
    assert split.images.ids == [5, 2, 9] and all(type(i) is int for i in split.images.ids)
    assert list(map(type, split.categories)) == [int] * 3


def test_an_area_beyond_coco_s_largest_is_that_of_the_box(tmp_path):
    data = coco_files.content()
    data["annotations"][0]["area"] = 5e11
    data["annotations"][2]["area"] = 10**400
    files = coco_files.write(tmp_path, data)
    with pytest.warns(UserWarning, match=r"area: 2, the first: .*annotation 0: area: 5000000.* that of the box is"):
        split = coco_files.load(files)
    assert split.images[0].areas.tolist() == [120, 390, 600]


def fractions(data, annotations):
    for annotation in annotations:
        image = next(image for image in data["images"] if image["id"] == annotation["image_id"])
        x, y, width, height = annotation["bbox"]
        horizontal, vertical = image["width"], image["height"]
        annotation["bbox"] = [x / horizontal, y / vertical, width / horizontal, height / vertical]


def test_boxes_in_fractions_of_the_image(tmp_path):
    data = coco_files.content()
    fractions(data, data["annotations"][:1])
    files = coco_files.write(tmp_path, data)
    message = r"annotation 0: bbox: \[0.1, 0.2, 0.25, 0.4\] in an image of 40x30: expected .* in pixels, .* YOLO"
    with pytest.warns(UserWarning, match=f"fractions: 1, the first: .*{message}"):
        coco_files.load(files)  # one may be a sliver in the corner
    fractions(data, data["annotations"][1:])
    files[0].write_text(json.dumps(data))
    with pytest.raises(DataError, match=rf"{files[0]}: {message}.*\(and 3 more"):
        coco_files.load(files)


def test_a_box_twice(tmp_path):
    data = coco_files.content()
    other_class = data["annotations"][0] | {"id": 21, "category_id": 3}
    data["annotations"] += [dict(a, id=100 + a["id"]) for a in data["annotations"]] + [other_class]
    files = coco_files.write(tmp_path, data)
    problems = coco_files.problems(files)
    assert [(p.kind, p.entry, p.fatal) for p in problems] == [
        ("box twice", f"annotation {i}", False) for i in (100, 107, 108, 111)
    ]
    assert str(problems[0]) == f"{files[0]}: annotation 100: bbox: [4, 6, 10, 12] is the box of annotation 0 too"
    # every box is kept: only the user knows what is meant
    with pytest.warns(UserWarning, match="box twice: 4"):
        assert len(coco_files.load(files).images.labels) == 9


@pytest.mark.parametrize(
    ("edits", "entry", "message"),
    [
        ({"id": 17, "name": "Owl"}, "category 17", "expected 'owl', got 'Owl': classes must be those of the training"),
        (
            {"id": 99, "name": "owl"},
            "category 99",
            r"expected no such category, got 'owl' \(category 17 there\): classes",
        ),
    ],
)
def test_classes_of_the_validation(tmp_path, edits, entry, message):
    train = coco_files.load(coco_files.write(tmp_path))
    data = coco_files.content()
    data["annotations"] = data["annotations"][:2]
    data["categories"] = [*coco_files.content()["categories"][:2], edits]
    files = coco_files.write(tmp_path, data, "val")
    [problem] = coco_files.problems(files, train.categories)
    assert problem.fatal and problem.entry == entry and re.search(message, problem.message)
    with pytest.raises(DataError, match=re.escape(str(problem))):
        coco_files.load(files, train.categories)


def test_images_of_the_validation_that_are_trained_on(tmp_path):
    data = coco_files.content()
    for image, name in zip(data["images"], ("same.bmp", "head.bmp", "tail.bmp"), strict=True):
        image |= {"file_name": name, "width": 64, "height": 64}
    train, val = (coco_files.load(coco_files.write(tmp_path, data, name)) for name in ("train", "val"))
    for image, position in zip(val.images[1:], (100, -1), strict=True):  # one byte of 12 kB
        content = bytearray(image.path.read_bytes())
        content[position] ^= 1
        image.path.write_bytes(content)
    # head.bmp of the training, which has the tail of same.bmp, comes after it
    [problem] = check_pair(train, val)
    assert (problem.kind, problem.entry, problem.fatal) == ("seen in training", "image 5", False)
    assert problem.message.startswith(f"{tmp_path}/val/same.bmp is {tmp_path}/train/same.bmp, an image of the training")
    assert [problem.entry for problem in check_pair(train, train)] == ["image 5", "image 2", "image 9"]


def test_an_image_of_the_training_beside_another_with_the_same_end(tmp_path):
    data = coco_files.content()
    for image, name in zip(data["images"], ("first.bmp", "second.bmp", "third.bmp"), strict=True):
        image |= {"file_name": name, "width": 64, "height": 64}
    train, val = (coco_files.load(coco_files.write(tmp_path, data, name)) for name in ("train", "val"))
    content = val.images[0].path.read_bytes()
    for i, image in enumerate(train.images):
        image.path.write_bytes(content[:100] + bytes([content[100] ^ i]) + content[101:])
    for image in val.images[1:]:
        image.path.write_bytes(content[:-1])
    [problem] = check_pair(train, val)
    assert problem.message.startswith(f"{val.images[0].path} is {train.images[0].path}, an image of the training")


def test_check_data_and_train_say_the_same(tmp_path, capsys):
    data = coco_files.content()
    coco_files.write(tmp_path, data)
    data["categories"][0]["name"] = "Zebra"
    coco_files.write(tmp_path, data, "val")
    error = f"{tmp_path}/instances_val.json: category 90: name: expected 'zebra', got 'Zebra'"
    assert main(["check-data", str(tmp_path), "--image-size", "64"]) == 1
    assert error in capsys.readouterr().out
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert error in capsys.readouterr().err
