"""The benchmarks of learning: what they count, and that both run. Nothing here asserts an average precision."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import faster_rcnn, learning
from detr.backbone import BatchNorm
from detr.presets import preset
from detr.synth import write_dataset


def found(boxes, scores, labels):
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


LEFT, NEARLY, RIGHT = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 0.0, 30.0, 10.0]
DETECTIONS = {
    # the second repeats the first, the third is of another class, the fourth is elsewhere, the fifth is not shown
    1: found([LEFT, NEARLY, LEFT, RIGHT, LEFT], [0.9, 0.8, 0.7, 0.6, 0.2], [0, 0, 1, 0, 0]),
    2: found([RIGHT], [0.1], [0]),
}


def test_duplicates_are_equal_boxes_of_a_class_that_are_shown():
    assert learning.duplicates(DETECTIONS, torch.tensor([0.5, 0.5])) == 1 / 4
    assert learning.duplicates(DETECTIONS, torch.tensor([0.15, 0.5])) == 2 / 5
    assert learning.duplicates(DETECTIONS, torch.tensor([2.0, 2.0])) == 0


def test_detections_of_an_object():
    # above 0.3 of the image's best: four of the first, one of the second
    images = [
        SimpleNamespace(image_id=1, boxes=torch.tensor([LEFT, RIGHT])),
        SimpleNamespace(image_id=2, boxes=torch.tensor([LEFT])),
    ]
    assert learning.detections_of_each_object(DETECTIONS, SimpleNamespace(images=images)) == (3 + 1 + 0) / 3


def test_what_suppression_would_leave():
    left = learning.after_nms(DETECTIONS)
    assert left[1]["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6]) and len(left[2]["scores"]) == 1


def test_the_loss_of_the_peer_has_its_boxes_in_pixels():
    image = torch.zeros(3, 20, 40)
    [target] = faster_rcnn.wanted(
        [image], [{"boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0]]), "labels": torch.tensor([1])}]
    )
    assert target["boxes"].tolist() == [[10.0, 0.0, 30.0, 20.0]] and target["labels"].tolist() == [2]
    mask = torch.zeros(1, 32, 64, dtype=torch.bool)
    mask[:, 20:], mask[:, :, 40:] = True, True
    assert faster_rcnn.unpadded(torch.zeros(1, 3, 32, 64), mask)[0].shape == (3, 20, 40)


@pytest.mark.parametrize("body", faster_rcnn.BODIES)
def test_the_peer_is_built(body):
    config = preset("tiny", image_size=64, max_size=128)
    model = faster_rcnn.build(3, config, body).train()
    images = [torch.randn(3, 64, 80), torch.randn(3, 64, 64)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0]])
    losses = model(
        images, [{"boxes": boxes, "labels": torch.tensor([2])}, {"boxes": boxes[:0], "labels": torch.zeros(0).long()}]
    )
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses.values())


def test_blocks():
    for kind, norm, activation in (("batch-relu", BatchNorm, nn.ReLU), ("group-silu", nn.GroupNorm, nn.SiLU)):
        convolution, *rest = learning.block(kind)(3, 16, 2)
        assert [type(layer) for layer in rest] == [norm, activation] and convolution.stride == (2, 2)


def test_both_run(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data", 6, 2, 64, 0, large=True)
    rows = tmp_path / "rows.csv"
    command = ["learning", "--data", str(tmp_path / "data"), "--steps", "2", "--seeds", "0", "1", "--csv", str(rows)]
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", [*command, "--threads", "1", "d_model=32", "n_heads=2", "proposal_nms=0.5", "batch_size=2"]
    )
    learning.main()
    torch.set_num_threads(threads)
    first, second = csv.DictReader(rows.read_text().splitlines())
    assert (first["seed"], second["seed"], first["steps"], first["data"]) == ("0", "1", "2", "data")
    assert first["changes"] == "d_model=32 n_heads=2 proposal_nms=0.5 batch_size=2" and 0 <= float(first["AP"]) <= 1

    command = ["faster_rcnn", "--data", str(tmp_path / "data"), "--steps", "1", "--image-size", "32", "--body", "small"]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", "--csv", str(rows)])
    faster_rcnn.main()
    torch.set_num_threads(threads)
    *_, last = csv.DictReader(rows.read_text().splitlines())
    assert (last["model"], last["data"], last["steps"], last["minutes"]) == ("faster_rcnn small", "data", "1", "")
    assert 0 <= float(last["AP"]) <= 1 and last["AP_train"] == "" and last["torch"] == torch.__version__
    assert "model=faster_rcnn small" in capsys.readouterr().out
