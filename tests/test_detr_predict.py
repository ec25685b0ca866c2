"""Prediction on files: which images, what is written, in pixels of the original image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr.config import preset
from detr.images import DataError
from detr.predict import find_images, predict

CONFIG = preset("tiny", image_size=32, max_size=48)
CATEGORIES = {3: "ant", 90: "zebra"}


class OneBoxAQuarter(nn.Module):
    """Always sees an ant of score 0.8 in the middle and a zebra of score 0.3 in the upper left quarter."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images, mask):
        assert not mask.any()
        self.shapes.append(tuple(images.shape))
        scores = torch.tensor([[[0.8, 0.01], [0.02, 0.3]]])
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]])
        return {"logits": scores.logit(), "boxes": boxes}


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
    touch(tmp_path, "other/a.jpg")
    with pytest.raises(DataError, match=r"other/a\.jpg: .*/a\.jpg has the same name"):
        find_images([str(tmp_path / "a.jpg"), str(tmp_path / "other/a.jpg")])


@pytest.mark.parametrize(("threshold", "names"), [(0.5, ["ant"]), (0.2, ["ant", "zebra"]), (0.9, [])])
def test_predictions_in_numbers(tmp_path, threshold, names):
    touch(tmp_path, "in/sub/a.png", "in/b.jpg")
    model, out = OneBoxAQuarter(), tmp_path / "out"
    images = find_images([str(tmp_path / "in")])
    results, unreadable = predict(model, CONFIG, CATEGORIES, images, out, threshold, torch.device("cpu"))
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
    results, unreadable = predict(
        OneBoxAQuarter(), CONFIG, CATEGORIES, find_images([str(tmp_path)]), tmp_path / "out", 0.5, torch.device("cpu")
    )
    assert [result["file"] for result in results] == [str(tmp_path / "a.png"), str(tmp_path / "c.png")]
    [message] = unreadable
    assert message.startswith(f"{tmp_path / 'b.png'}: not a readable image")
