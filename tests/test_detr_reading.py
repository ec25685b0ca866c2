"""`--exif` and `--large-images` in every command that reads images, and what is said of 16-bit grey."""

import json
import re

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from user_files import SMALL

from detr.cli import main
from detr.data import DetectionDataset
from detr.images import Reading

torch.set_num_threads(1)  # test processes share the cores
REFUSED = "million pixels, the limit against decompression bombs: --large-images reads it all the same"
SAID = "grey of 16 or 32 bits: each such image is mapped from its 0.5 and 99.5 percentile to 0..255"


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """The largest image of coco_files has 1200 pixels."""
    monkeypatch.setattr("detr.images.MAX_PIXELS", 1100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # --large-images changes it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The images of coco_files in 16-bit grey, upside down by EXIF."""
    root, exif = tmp_path_factory.mktemp("data"), Image.Exif()
    exif[0x0112] = 3
    for seed, split in enumerate(("train", "val")):
        _, folder = coco_files.write(root, split=split)
        for i, image in enumerate(coco_files.content()["images"]):
            shape = (image["height"], image["width"])
            grey = np.random.default_rng((seed, i)).integers(1000, 5000, shape).astype(np.uint16)
            Image.fromarray(grey).save(folder / image["file_name"], exif=exif)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--exif", "ignore", "--large-images"]
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "1", *SMALL, *flags]) == 0
    return out


@pytest.mark.parametrize(
    ("command", "splits", "images"),
    [
        (["check-data", "DATA"], 2, 3),
        (["train", "--data", "DATA", "--steps", "1", *SMALL, "--out", "OUT"], 2, 3),
        (["eval", "--data", "DATA", "--checkpoint", "RUN/best.pt"], 1, 3),
        (["predict", "DATA/val", "--checkpoint", "RUN/best.pt", "--out", "OUT"], 1, 0),
        (["inspect", "RUN/best.pt", "--image", "DATA/val/a.png", "--out", "OUT.png"], 0, 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_reads_as_it_is_told(data, run, tmp_path, capsys, command, splits, images):
    places = {"DATA": str(data), "RUN": str(run)}

    def output(*flags, code=0):
        places["OUT"] = str(tmp_path / str(len(flags)))
        assert main([re.sub("DATA|RUN|OUT", lambda m: places[m[0]], word) for word in command] + list(flags)) == code
        return "".join(capsys.readouterr())

    assert REFUSED in output(code=1)
    turned = output("--large-images")
    assert turned.count(SAID) == splits
    doubtful = re.findall(r"orientation in doubt: (\d), the first: .*image 5: .*a.png: EXIF orientation 3,", turned)
    assert doubtful == [str(images)] * (splits if images else 0)
    assert "in doubt" not in output("--large-images", "--exif", "ignore")


def test_a_run_goes_on_as_it_began(data, run, capsys):
    kept = json.loads((run / "config.json").read_text())["data"]
    assert (kept["exif"], kept["large_images"]) == ("ignore", True)
    for flags in (["--exif", "turn"], ["--large-images"]):
        assert main(["train", "--resume", str(run), *flags]) == 1
        assert "resume: the run goes on as it was: " in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert "in doubt" not in capsys.readouterr().err


@pytest.mark.parametrize("exif", ["turn", "ignore"])
def test_predictions_are_of_the_pixels_that_were_read(data, run, tmp_path, exif):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg", exif=sideways)
    command = ["predict", str(tmp_path / "a.jpg"), "--checkpoint", str(run / "best.pt"), "--out", str(tmp_path / exif)]
    assert main([*command, "--exif", exif]) == 0
    [found] = json.loads((tmp_path / exif / "predictions.json").read_text())
    size = (20, 30) if exif == "turn" else (30, 20)
    assert (found["width"], found["height"]) == size == Image.open(tmp_path / exif / "a.jpg").size


@pytest.mark.filterwarnings("ignore:orientation in doubt", "ignore:deep grey")
def test_training_sees_the_same_pixels(data):
    files = data / "instances_train.json", data / "train"
    turned, stored = (
        DetectionDataset(coco_files.load(files, reading=Reading(exif, large=True)), lambda *x: x, resize_to)[0][0]
        for exif, resize_to in (("turn", (30, 40)), ("ignore", None))  # kept in memory, and not
    )
    assert turned.shape == (3, 30, 40) and torch.equal(turned, stored.flip(1, 2))
    assert not torch.equal(turned, stored)
