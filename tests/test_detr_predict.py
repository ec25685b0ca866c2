"""Prediction on files: which images, what is written, in pixels of the original image."""

import json
import os

import numpy as np
import pytest
import torch
from one_box import OneBoxAQuarter, detector_of
from PIL import Image

from detr.errors import DataError, OutputError
from detr.model import build_model
from detr.predict import find_images, write_predictions
from detr.presets import preset

DETECTOR = detector_of(OneBoxAQuarter())


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 80, 3), 60, np.uint8)).save(path)


def test_find_images(tmp_path):
    touch(tmp_path, "a.jpg", "deep/b.PNG", "deep/c.webp")
    (tmp_path / "notes.txt").touch()
    assert find_images([str(tmp_path)]) == [
        (tmp_path / name, tmp_path.__class__(name)) for name in ("a.jpg", "deep/b.PNG", "deep/c.webp")
    ]
    pairs = find_images([str(tmp_path / "deep" / "*.webp"), str(tmp_path / "a.jpg")])
    assert [(source.name, str(target)) for source, target in pairs] == [("c.webp", "c.webp"), ("a.jpg", "a.jpg")]
    (tmp_path / "empty").mkdir()
    for nothing in ("none.jpg", "empty", "*.gif"):
        with pytest.raises(DataError, match="expected an image, a folder of images or a pattern, found no image"):
            find_images([str(tmp_path / nothing)])
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'deep'}\n\n{tmp_path / 'a.jpg'}\n")
    pairs = find_images([str(tmp_path / "list.txt")])
    assert [source.name for source, _ in pairs] == ["b.PNG", "c.webp", "a.jpg"]
    touch(tmp_path, "other/a.jpg")
    with pytest.raises(DataError, match=r"other/a\.jpg: .*/a\.jpg has the same name"):
        find_images([str(tmp_path / "a.jpg"), str(tmp_path / "other/a.jpg")])


@pytest.mark.parametrize(
    ("encoded", "names"),
    [
        (lambda text: text.encode(), ["d é/a.png", "猫.png"]),
        (lambda text: b"\xef\xbb\xbf" + text.encode(), ["d é/a.png", "猫.png"]),
        (lambda text: text.encode("utf-16"), ["d é/a.png", "猫.png"]),
        (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), ["d é/a.png", "猫.png"]),
        (lambda text: text.encode("latin-1"), ["d é/a.png", "b.png"]),
    ],
    ids=["utf-8", "utf-8-bom", "utf-16-le", "utf-16-be", "latin-1"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_every_encoding(tmp_path, monkeypatch, encoded, names, end):
    """Blank lines and spaces around a line do not count; a line starts from here, or from the folder of its list."""
    touch(tmp_path, "lists/d é/a.png", "lists/b.png", "猫.png")
    monkeypatch.chdir(tmp_path)
    lines = ["", f"  {names[0]}\t", " ", names[1]]
    (tmp_path / "lists" / "list.TXT").write_bytes(encoded(end.join(lines) + end))
    expected = ["lists/d é/a.png", "猫.png" if names[1] == "猫.png" else "lists/b.png"]
    assert [str(source) for source, _ in find_images(["lists/list.TXT"])] == expected


def test_lists_of_names_in_no_encoding_of_patterns_and_of_lists(tmp_path):
    touch(tmp_path, "[1]/a.png", "[1]/b.png")
    raw = os.fsdecode(b"\xe9.png")  # as old systems named it
    (tmp_path / "[1]" / "a.png").rename(tmp_path / "[1]" / raw)
    (tmp_path / "[1]" / "list.txt").write_bytes(b"\xe9.png\nb.*")
    (tmp_path / "[1]" / "lists.txt").write_text("list.txt\nlist.txt")
    assert [source.name for source, _ in find_images([str(tmp_path / "[1]" / "lists.txt")])] == [raw, "b.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"b.png\n\nnone.png", r"list\.txt: line 3: none\.png: expected an image, a folder of images or a pattern"),
        (b"\xe9.png", r"list\.txt: line 1: é\.png: expected an image"),
        (b"b.png\nlist.txt", r"line 2: .*list\.txt: a list that names itself"),
        (b"other.txt", r"other\.txt: line 1: .*list\.txt: a list that names itself"),
        (b"0.txt", r"9\.txt: a list that names itself, or stands in 10 others"),
        (b"\n \n", r"list\.txt: expected an image, a folder or a pattern on each line, found none"),
        (b"\xff\xfea", r"list\.txt: byte 2: not UTF-16: truncated data"),
        (b"\xff\xfe\x00\xd8", r"list\.txt: byte 2: not UTF-16: unexpected end of data"),
        ("b.png".encode("utf-16-le"), r"list\.txt: expected text in UTF-8, in UTF-16 with a byte order mark, or in"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, content, message):
    touch(tmp_path, "b.png")
    (tmp_path / "list.txt").write_bytes(content)
    (tmp_path / "other.txt").write_text("list.txt")
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i + 1}.txt" if i < 19 else "b.png")
    with pytest.raises(DataError, match=message):
        find_images([str(tmp_path / "list.txt")])


@pytest.mark.parametrize("name", ["photo", "photo.jpg_large", "photo.png~", "scan.heic", "scan.psd", "a.gif", ".png"])
def test_the_picture_gets_a_suffix_that_can_be_written(tmp_path, name):
    touch(tmp_path, "a.JPG")
    Image.new("RGB", (80, 40)).save(tmp_path / name, "PNG")
    inputs = [str(tmp_path / each) for each in ("a.JPG", name)]
    results, failed = write_predictions(DETECTOR, find_images(inputs), tmp_path / "out", 0.5)
    assert failed == [] and [result["file"] for result in results] == inputs
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".json", ".jsonl")} == {
        *("a.JPG", f"{name}.png")
    }
    assert Image.open(tmp_path / "out" / f"{name}.png").format == "PNG"


def test_a_suffix_is_added_to_no_name_that_is_taken(tmp_path):
    touch(tmp_path, "a.png", "b.gif.png")
    for name in ("a", "a.gif", "b.gif"):
        (tmp_path / name).touch()
    pairs = find_images([str(tmp_path / "*")])
    assert {source.name: target.name for source, target in pairs} == {
        **{"a": "a.png.png", "a.png": "a.png", "a.gif": "a.gif.png"},
        **{"b.gif": "b.gif.png.png", "b.gif.png": "b.gif.png"},
    }


def test_the_json_comes_before_the_pictures(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b.png")

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("detr.predict.picture_of", fails)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(DETECTOR, find_images([str(tmp_path)]), tmp_path / "out", 0.5)
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [len(result["detections"]) for result in results] == [1, 1]


def test_no_picture_of_an_earlier_call_stays_beside_the_new_json(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b.png", "c.png")
    images = find_images([str(tmp_path)])
    assert write_predictions(DETECTOR, images, tmp_path / "out", 0.5)[1] == []
    (tmp_path / "b.png").write_text("no image")
    Image.new("RGB", (66000, 1)).save(tmp_path / "c.png")
    images[2] = (tmp_path / "c.png", images[2][1].with_suffix(".jpg"))  # of at most 65500 pixels
    results, failed = write_predictions(DETECTOR, images, tmp_path / "out", 0.5)
    assert [result["file"] for result in results] == [str(tmp_path / name) for name in ("a.png", "c.png")]
    assert failed[0].startswith(f"{tmp_path / 'b.png'}: not a readable image")
    assert failed[1].startswith(f"{tmp_path / 'c.png'}: no picture of it: 66000x1 pixels, which Pillow does not write")
    assert not (tmp_path / "out" / "b.png").exists() and not (tmp_path / "out" / "c.jpg").exists()
    # what somebody put there is not removed
    (tmp_path / "out" / "b.png").write_text("mine")
    with pytest.raises(OutputError, match=r"out/b\.png: is there already"):
        write_predictions(DETECTOR, images, tmp_path / "out", 0.5)
    assert (tmp_path / "out" / "b.png").read_text() == "mine"


@pytest.mark.parametrize(("threshold", "names"), [(0.5, ["ant"]), (0.2, ["ant", "zebra"]), (0.9, [])])
def test_predictions_in_numbers(tmp_path, threshold, names):
    touch(tmp_path, "in/sub/a.png", "in/b.jpg")
    model, out = OneBoxAQuarter(), tmp_path / "out"
    images = find_images([str(tmp_path / "in")])
    results, unreadable = write_predictions(detector_of(model), images, out, threshold)
    assert unreadable == []
    assert model.shapes == [(1, 3, 24, 48)] * 2  # 80x40 pixels: the long side decides
    assert json.loads((out / "predictions.json").read_text()) == results
    expected = [
        {"category_id": 3, "name": "ant", "score": 0.8, "bbox": [20, 10, 40, 20]},
        {"category_id": 90, "name": "zebra", "score": 0.3, "bbox": [0, 0, 40, 20]},
    ]
    for result, (source, target) in zip(results, images, strict=True):
        assert (result["file"], result["width"], result["height"]) == (str(source), 80, 40)
        assert result["detections"] == [row for row in expected if row["name"] in names]
        drawn = np.asarray(Image.open(out / target)).astype(int)
        assert drawn.shape == (40, 80, 3)
        assert (np.abs(drawn - 60).max() > 50) == bool(names)


def test_an_unreadable_file_does_not_stop_the_others(tmp_path):
    touch(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_text("no image")
    results, unreadable = write_predictions(DETECTOR, find_images([str(tmp_path)]), tmp_path / "out", 0.5)
    assert [result["file"] for result in results] == [str(tmp_path / "a.png"), str(tmp_path / "c.png")]
    [message] = unreadable
    assert message.startswith(f"{tmp_path / 'b.png'}: not a readable image")


def test_batches_hold_images_of_one_size_and_results_keep_their_order(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((40, 80 if i != 2 else 60, 3), 60, np.uint8)).save(tmp_path / f"{i}.png")
    model = OneBoxAQuarter()
    images = find_images([str(tmp_path)])
    results, _ = write_predictions(detector_of(model), images, tmp_path / "out", 0.5, batch_size=3)
    assert model.shapes == [(3, 3, 24, 48), (1, 3, 32, 48), (1, 3, 24, 48)] or model.shapes == [
        (3, 3, 24, 48),
        (1, 3, 24, 48),
        (1, 3, 32, 48),
    ]
    assert [result["file"] for result in results] == [str(tmp_path / f"{i}.png") for i in range(5)]
    assert results[2]["detections"][0]["bbox"] == [15, 10, 30, 20]


@pytest.mark.parametrize("name", ["tiny", "deformable_detr_r50_refine", "detr_r50_dc5"])
def test_a_batch_gives_what_each_image_gives_alone(tmp_path, name):
    size = {"image_size": 48, "max_size": 80}
    small = size | {"enc_layers": 1, "dec_layers": 2, "d_model": 64, "n_heads": 2, "ffn_dim": 32, "n_queries": 8}
    config = preset(name, **small, pretrained_backbone=False)
    torch.manual_seed(0)
    model = build_model(config, 2).eval()
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "backbone" not in name_:
                parameter += 0.05 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 80), (60, 40), (40, 80), (48, 48), (40, 80)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    images = find_images([str(tmp_path)])
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append((len(args[0]), output)))
    found = [
        write_predictions(detector_of(model, config), images, tmp_path / "out", 0.0, batch_size)[0]
        for batch_size in (1, 4)
    ]
    assert sorted(n for n, _ in outputs) == [1] * 7 + [3]
    for alone, batched in zip(*found, strict=True):
        assert alone["file"] == batched["file"]
        scores = [[row["score"] for row in result["detections"]] for result in (alone, batched)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1.01e-4)  # rounded to four digits
    singles = torch.cat([output["logits"] for n, output in outputs[:5]])[[0, 2, 4]]
    [together] = [output["logits"] for n, output in outputs if n == 3]
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-4)
    assert (singles[0] - singles[1]).abs().max() > 1e-3  # the image matters
