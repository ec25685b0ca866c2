"""The Detector in a program: every kind of image, its detections, and one clear error for what is none of them."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from one_box import CATEGORIES, OneBoxAQuarter, detector_of
from PIL import Image

import detr
from detr import ArgumentError, CheckpointError, DataError, Detection, Detections, OutputError
from detr.detector import load_pixels
from detr.model import build_model
from detr.presets import preset

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 80, 3), dtype=np.uint8)
BOXES = {"ant": (20.0, 10.0, 60.0, 30.0), "zebra": (0.0, 0.0, 40.0, 20.0)}


@pytest.fixture
def model():
    return OneBoxAQuarter()


@pytest.fixture
def detector(model):
    return detector_of(model)


def test_what_is_found(detector):
    found = detector.predict(PIXELS, threshold=0.2)
    assert (len(found), found.names, found.classes) == (2, ["ant", "zebra"], ["ant", "zebra"])
    assert found.category_ids == [3, 90] and found.size == (80, 40)
    assert (found.xyxy.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    np.testing.assert_allclose(found.xyxy, [BOXES["ant"], BOXES["zebra"]], atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.8, 0.3], atol=1e-6)
    assert found.labels.tolist() == [0, 1]
    # without a threshold it is 0.5
    assert detector.predict(PIXELS).names == ["ant"] and detector.predict(PIXELS, 0.9).names == []
    assert detector.predict(PIXELS, found.scores[1], np.int64(2)).names == ["ant", "zebra"]


def test_every_kind_of_image_is_seen_as_the_same(detector, model, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    kinds = [
        *(tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), PIXELS, chw, chw / 255),
        *(chw.double() / 255, PIXELS[::-1][::-1], chw.requires_grad_(False), PIXELS.copy(order="F")),
    ]
    for kind in kinds:
        found = detector.predict(kind)
        assert isinstance(found, Detections) and found.source is kind
    expected = load_pixels(Image.fromarray(PIXELS), detector.config)
    assert len(model.seen) == len(kinds) and all(torch.equal(images[0], expected) for images in model.seen)


def test_grey_images_and_those_with_transparency(detector, model, tmp_path):
    grey = PIXELS[..., 0]
    expected = load_pixels(Image.fromarray(grey).convert("RGB"), detector.config)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for image in (grey, grey[..., None], Image.fromarray(grey), tmp_path / "grey.png", torch.from_numpy(grey)[None]):
        detector.predict(image)
    assert all(torch.equal(images[0], expected) for images in model.seen)
    model.seen.clear()
    rgba = np.concatenate([PIXELS, RNG.integers(0, 256, (40, 80, 1), dtype=np.uint8)], 2)
    for image in (
        rgba,
        Image.fromarray(rgba),
        torch.from_numpy(rgba).permute(2, 0, 1),
        Image.fromarray(rgba).convert("P"),
    ):
        detector.predict(image)
    expected = load_pixels(Image.fromarray(PIXELS), detector.config)
    assert len(model.seen) == 4 and all(torch.equal(images[0], expected) for images in model.seen[:3])


def test_pil_images_are_turned_as_files_are(detector, model, tmp_path):
    for suffix, orientation in ((".jpg", 6), (".tif", 6), (".png", 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a{suffix}"
        Image.fromarray(PIXELS).save(path, exif=exif)
        image = Image.open(path)
        sizes = [detector.predict(each).size for each in (path, image, image)]
        assert sizes == [(40, 80) if orientation == 6 else (80, 40)] * 3
        of_file, *others = model.seen[-3:]
        assert all(torch.equal(of_file, each) for each in others) and image.filename == str(path)


def test_other_ways_of_reading(detector, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setenv("HOME", str(tmp_path))
    for image in ("~/a.jpg", Image.open(tmp_path / "a.jpg")):
        stored = detector.predict(image, exif="ignore")
        assert stored.size == stored[:1].draw().size == (80, 40) and stored._repr_png_()
        assert detector.predict(image).size == detector.predict(image).draw().size == (40, 80)
    monkeypatch.setattr("detr.images.MAX_PIXELS", 3000)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="the limit against decompression bombs: --large-images reads it all the same"):
        detector.predict(tmp_path / "a.jpg")
    assert detector.predict(tmp_path / "a.jpg", large_images=True).size == (40, 80)
    assert Image.MAX_IMAGE_PIXELS == limit is not None


def test_another_default_dtype(real, tmp_path):
    path = real.save(tmp_path / "a.pt")
    expected = real.predict(PIXELS, 0.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = detr.load(path, "cpu").predict([PIXELS, PIXELS], 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    for each in found:
        np.testing.assert_allclose(each.scores, expected.scores, atol=1e-6)
        np.testing.assert_allclose(each.xyxy, expected.xyxy, atol=1e-3)


def test_a_single_pixel(detector):
    found = detector.predict(np.full((1, 1, 3), 7, np.uint8))
    assert found.size == (1, 1) and found[0].xyxy == (0.25, 0.25, 0.75, 0.75)


def test_lists_keep_their_order(detector, model):
    assert detector.predict([]) == [] and detector.predict(()) == []
    images = [PIXELS, PIXELS[:, :60], PIXELS, Image.fromarray(PIXELS)]
    found = detector.predict(images, batch_size=3)
    assert [each.size for each in found] == [(80, 40), (60, 40), (80, 40), (80, 40)]
    assert all(each.source is image for each, image in zip(found, images, strict=True))
    assert sorted(shape[0] for shape in model.shapes) == [1, 3]  # none is padded
    streamed = dict(detector.stream(((name, Image.fromarray(PIXELS)) for name in "abc"), 0.2))
    assert list(streamed) == ["a", "b", "c"] and streamed["b"].source == "b" and len(streamed["b"]) == 2
    with pytest.raises(DataError, match=r"image 7: expected a uint8 array"):
        list(detector.stream([(7, PIXELS[..., :2])]))
    with pytest.raises(ArgumentError, match="pictures: expected pairs of a key and an image, got a ndarray"):
        list(detector.stream([PIXELS]))


def test_few_images_wait_for_others_of_their_size(detector):
    """With a batch size of 2 never more than 16, of however many sizes."""
    taken = []
    found = detector.stream(((i, taken.append(i) or PIXELS[:, : 20 + i]) for i in range(40)), batch_size=2)
    assert next(found)[1].size[1] == 40 and len(taken) <= 16
    assert len(list(found)) == 39 and len(taken) == 40


def test_numbers_from_0_to_1_are_the_nearest_of_256(detector, model):
    """x / 255 * 255 is below x for some of them."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        detector.predict([levels, (levels.double() / 255).to(dtype)])
        assert torch.equal(model.seen[-1], model.seen[-2])


CHW = torch.zeros(3, 5, 6)


def closed_image():
    with Image.open(io.BytesIO(png_of(PIXELS))) as image:
        return image


def png_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(float) / 255, "image: expected a uint8 array [H, W, 3], red, green and blue, got float64 of"),
        (PIXELS.astype(np.uint16), "image: expected a uint8 array [H, W, 3], red, green and blue, got uint16"),
        (np.moveaxis(PIXELS, 2, 0), "got shape [3, 40, 80]: channels come last in an array"),
        (PIXELS[None], "got shape [1, 40, 80, 3]: several images are a list"),
        (PIXELS[:0], "got shape [0, 80, 3]"),
        (PIXELS[..., :2], "got shape [40, 80, 2]"),
        (np.zeros(3, np.uint8), "got shape [3]"),
        (CHW - 0.5, "image: expected a tensor [3, H, W] of uint8 or of floats from 0 to 1, got numbers from -0.5"),
        (CHW + 255.0, "got numbers from 255 to 255"),
        (CHW * float("nan"), "got numbers from nan to nan"),
        (CHW.long(), "got strided int64 of shape [3, 5, 6]"),
        (CHW.permute(1, 2, 0), "got shape [5, 6, 3]: channels come first in a tensor"),
        (CHW[None], "got shape [1, 3, 5, 6]: several images are a list"),
        (Image.new("RGB", (0, 5)), "image: expected at least one pixel, got 0 x 5"),
        (7, "image: expected a path, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W], got 7"),
        (None, "image: expected a path, .*, got None"),
        ("", "image: expected the name of a file or folder, got ''"),
        (torch.quantize_per_tensor(CHW, 1.0, 0, torch.quint8), "image: expected a tensor .*, got strided quint8"),
        (CHW.to_sparse(), "image: expected a tensor .*, got sparse_coo float32 of shape [3, 5, 6]"),
        (CHW.to("meta"), "image: expected a tensor .*, got strided float32 of shape"),
        (CHW.bool(), "image: expected a tensor .*, got strided bool"),
        (closed_image(), "image: not a readable image: "),
        ("nothing/here.jpg", "nothing/here.jpg: the image file is missing"),
        (".", ".: expected an image file"),
        ([PIXELS, "nothing.jpg"], "nothing.jpg: the image file is missing"),
        ([PIXELS, PIXELS[..., :2]], "images[1]: expected a uint8 array"),
        ({"a": 1}, "image: expected a path, .*, got a dict"),
    ],
)  # fmt: skip
def test_what_is_no_image(detector, image, message):
    with pytest.raises((DataError, ArgumentError)) as error:
        detector.predict(image)
    beginning, _, end = message.partition(".*")
    assert beginning in str(error.value) and end in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 2}, "threshold: expected a number from 0 to 1, got 2"),
        ({"threshold": -0.1}, "threshold: expected a number from 0 to 1, got -0.1"),
        ({"threshold": float("nan")}, "threshold: expected a number from 0 to 1, got nan"),
        ({"threshold": "high"}, "threshold: expected a number from 0 to 1, got 'high'"),
        ({"threshold": True}, "threshold: expected a number from 0 to 1, got True"),
        ({"threshold": np.float32(1.5)}, "threshold: expected a number from 0 to 1, got a float32"),
        ({"batch_size": 0}, "batch_size: expected an integer from 1 to 16384, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer from 1 to 16384, got 1.5"),
    ],
)
def test_bad_arguments_of_predict(detector, arguments, message):
    for images in (PIXELS, []):
        with pytest.raises(ArgumentError) as error:
            detector.predict(images, **arguments)
        assert str(error.value) == message


def test_detections_as_a_sequence(detector):
    found = detector.predict(PIXELS, 0.0)
    assert [(one.name, one.label) for one in found] == [("ant", 0), ("zebra", 1), ("zebra", 1), ("ant", 0)][
        : len(found)
    ]
    first = found[0]
    assert (
        isinstance(first, Detection) and first.xyxy == pytest.approx(BOXES["ant"]) and first.score == pytest.approx(0.8)
    )
    assert all(type(value) is float for value in (*first.xyxy, first.score)) and type(first.label) is int
    assert found[-1] == found[len(found) - 1] == found[np.int64(len(found) - 1)]
    for part in (found[:1], found[found.scores > 0.5], found[[0]]):
        assert isinstance(part, Detections) and part.names == ["ant"] and part.size == (80, 40)
    assert len(found[[]]) == len(found[5:]) == 0 and found[[1, 0]].names == ["zebra", "ant"]
    with pytest.raises(IndexError):
        found[len(found)]
    for index in (None, 1.5, True, np.array(0), np.True_, [[0]], ["a"]):
        with pytest.raises(TypeError, match="index: expected an integer, a slice, or a list of integers"):
            found[index]


def test_detections_as_text_and_json(detector, tmp_path):
    text = repr(detector.predict(PIXELS, 0.2))
    assert text.splitlines() == [
        "2 objects in an image of 80 x 40 pixels",
        "  ant                  0.800  x0 y0 x1 y1:    20.00    10.00    60.00    30.00",
        "  zebra                0.300  x0 y0 x1 y1:     0.00     0.00    40.00    20.00",
    ]
    assert repr(detector.predict(PIXELS)).startswith("1 object in")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    rows = [
        {"category_id": 3, "name": "ant", "score": 0.8, "bbox": [20.0, 10.0, 40.0, 20.0]},
        {"category_id": 90, "name": "zebra", "score": 0.3, "bbox": [0.0, 0.0, 40.0, 20.0]},
    ]
    found = detector.predict([tmp_path / "a.png", PIXELS], 0.2)
    expected = {"width": 80, "height": 40, "detections": rows}
    assert json.loads(json.dumps(found[0].to_dict())) == {"file": str(tmp_path / "a.png")} | expected
    assert json.loads(json.dumps(found[1].to_dict())) == expected


def test_pictures(detector, tmp_path):
    grey = np.full((40, 80, 3), 60, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    found = detector.predict(tmp_path / "a.png")
    drawn = np.asarray(found.draw()).astype(int)
    assert drawn.shape == (40, 80, 3) and np.abs(drawn - 60).max() > 50
    assert (drawn[10:30, 20] != 60).any(1).all() and (drawn[35:, 70:] == 60).all()  # the left side of the box
    np.testing.assert_array_equal(found.draw(grey), drawn)
    np.testing.assert_array_equal(found[:0].draw(), grey)
    assert np.array_equal(Image.fromarray(grey), grey)  # not drawn on itself
    png = found._repr_png_()
    assert png.startswith(b"\x89PNG")
    with pytest.raises(DataError, match="image: expected 80 x 40 pixels, as the one of these detections, got 60 x 40"):
        found.draw(grey[:, :60])
    (tmp_path / "a.png").unlink()
    assert found._repr_png_() is None
    with pytest.raises(DataError, match=r"a\.png: the image file is missing"):
        found.draw()


def test_supervision(detector, monkeypatch):
    found = detector.predict(PIXELS, 0.2)
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=dict))
    given = found.to_supervision()
    assert given["xyxy"] is found.xyxy and given["confidence"] is found.scores and given["class_id"] is found.labels
    assert given["data"]["class_name"].tolist() == ["ant", "zebra"]
    assert found[:0].to_supervision()["data"]["class_name"].shape == (0,)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(detr.MissingPackageError, match="to_supervision: needs the package supervision: pip install"):
        found.to_supervision()


@pytest.fixture(scope="module")
def real():
    torch.manual_seed(0)
    config = preset("tiny", d_model=32, n_heads=2, ffn_dim=32, n_queries=8, image_size=64, max_size=96)
    return detr.Detector(build_model(config, 2), config, CATEGORIES, None, {"metrics": {"AP": 0.25}, "steps_done": 7})


def test_saved_and_loaded(real, tmp_path):
    path = real.save(tmp_path / "deep" / "mine.pt")
    again = detr.load(path, "cpu")
    assert again.classes == ["ant", "zebra"] and again.category_ids == [3, 90] and again.config == real.config
    assert again.metrics == {"AP": 0.25} and again.path == path and not again.model.training and not again.stopped
    assert str(again.device) == "cpu" and "tiny, 2 classes: ant, zebra" in repr(again)
    before, after = (each.predict(PIXELS, 0.0) for each in (real, again))
    assert len(before) == 8 and np.array_equal(before.xyxy, after.xyxy) and np.array_equal(before.scores, after.scores)
    # what it wrote itself it writes again, and nothing else
    with torch.no_grad():
        real.model.class_embed[2].bias += 1  # of the last decoder layer
    real.save(path)
    assert not np.array_equal(detr.load(path).predict(PIXELS, 0.0).scores, before.scores)
    for content in (b"mine", b"{}"):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(OutputError, match=r"other\.pt: is there already"):
            real.save(tmp_path / "other.pt")
        assert (tmp_path / "other.pt").read_bytes() == content
    with pytest.raises(OutputError, match="expected a file to write, found a folder"):
        real.save(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.pt", r"nothing\.pt: the file is missing"),
        ("folder", r"folder: a folder, expected a file, or a run with best\.pt or checkpoint\.pt in it"),
        ("other.pt", r"other\.pt: config: not in the file: no checkpoint of `detr train`"),
        ("tensor.pt", r"tensor\.pt: no checkpoint of `detr train`: expected a dict, got Tensor"),
        ("text.pt", r"text\.pt: refused: damaged, or of another program"),
        ("empty.pt", r"empty\.pt: not readable: the file is empty"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=message):
        detr.load(tmp_path / name)


def test_arguments_of_load(real, tmp_path):
    path = real.save(tmp_path / "a.pt")
    for place in (None, 7, ""):
        with pytest.raises(ArgumentError, match="path: expected the name of a file or folder, got"):
            detr.load(place)
    for device in ("cuda:99", "abacus", 3):
        with pytest.raises(ArgumentError, match="device: expected one of cpu"):
            detr.load(path, device)
    assert str(detr.load(path, torch.device("cpu")).device) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "tflite"}, "to: expected one of official, hf, onnx, torch-export, aoti, got 'tflite'"),
        ({"to": "onnx"}, r"path: expected a name that ends in \.onnx for to='onnx'"),
        ({"to": "torch-export", "size": 64}, r"size: expected \(H, W\), got 64"),
        ({"to": "torch-export", "size": ()}, r"size: expected \(H, W\), got a tuple"),
        ({"to": "torch-export", "size": (None, 64)}, r"size: expected \(H, W\), got a tuple"),
        ({"to": "torch-export", "size": (64, 8)}, "size: expected an integer from 32 to 10000, got 8"),
        ({"to": "torch-export", "attention": "tensorrt"}, "attention: 'tensorrt' is for ONNX only"),
        ({"to": "hf"}, "to: hf has no model with backbone small"),
    ],
)
def test_bad_arguments_of_export(real, tmp_path, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        real.export(tmp_path / "b.pt2", **arguments)
    assert not (tmp_path / "b.pt2").exists()


def test_exported_weights_are_the_models(tmp_path):
    """The other kinds are in tests/test_export.py and tests/test_detr_weights.py, by the command, which calls this."""
    small = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "enc_layers": 1, "dec_layers": 1}
    config = preset("deformable_detr_r50", backbone="resnet18", **small)
    detector = detr.Detector(build_model(config, 2), config, CATEGORIES, None, {})
    assert detector.export(tmp_path / "a.pth", "official") == tmp_path / "a.pth"
    weights = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    ours = detector.model.state_dict()
    assert torch.equal(weights["class_embed.0.bias"], ours["class_embed.0.bias"])
    assert torch.equal(weights["backbone.0.body.conv1.weight"], ours["backbone.body.conv1.weight"])
