"""Prediction on files: which images, what is written, in pixels of the original image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr.config import preset
from detr.images import DataError
from detr.model import build_model
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
        scores = torch.tensor([[[0.8, 0.01], [0.02, 0.3]]]).repeat(len(images), 1, 1)
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]]).repeat(len(images), 1, 1)
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
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'deep'}\n\n{tmp_path / 'a.jpg'}\n")
    pairs = find_images([str(tmp_path / "list.txt")])
    assert [source.name for source, _ in pairs] == ["b.PNG", "c.webp", "a.jpg"]
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


def test_batches_hold_images_of_one_size_and_results_keep_their_order(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((40, 80 if i != 2 else 60, 3), 60, np.uint8)).save(tmp_path / f"{i}.png")
    model = OneBoxAQuarter()
    images = find_images([str(tmp_path)])
    results, _ = predict(model, CONFIG, CATEGORIES, images, tmp_path / "out", 0.5, torch.device("cpu"), batch_size=3)
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
        predict(model, config, CATEGORIES, images, tmp_path / "out", 0.0, torch.device("cpu"), batch_size)[0]
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
