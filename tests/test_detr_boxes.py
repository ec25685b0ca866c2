"""Boxes and position encodings against torchvision and against the formulas written out."""

import math

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou, nms

from detr.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, suppressed
from detr.position import sine_embedding, sine_position


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1


def test_conversion():
    boxes = random_boxes(3, 5)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), box_convert(boxes, "cxcywh", "xyxy"))


def test_generalized_iou_of_all_pairs_and_of_single_pairs():
    a, b = cxcywh_to_xyxy(random_boxes(2, 6, seed=1)), cxcywh_to_xyxy(random_boxes(2, 4, seed=2))
    expected = torch.stack([generalized_box_iou(a[i], b[i]) for i in range(2)])
    torch.testing.assert_close(generalized_iou(a[:, :, None], b[:, None]), expected)
    torch.testing.assert_close(generalized_iou(a[:, :4], b), expected[:, :4].diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 1.0),  # the same box
        ([1.0, 0.0, 3.0, 2.0], 2 / 6),  # half of it: intersection 2, union 6, hull 6
        ([4.0, 0.0, 6.0, 2.0], -4 / 12),  # apart: union 8, hull 12
        ([1.0, 1.0, 1.0, 1.0], 0.0),  # a point inside
    ],
)
def test_generalized_iou_by_hand(other, expected):
    box = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert generalized_iou(box, torch.tensor(other)).item() == pytest.approx(expected, abs=1e-6)


def test_inverse_sigmoid():
    x = torch.tensor([0.0, 1e-7, 0.25, 0.5, 1.0, 1.5, -1.0])
    limit = math.log(1e5)
    expected = torch.tensor([-limit, -limit, math.log(1 / 3), 0.0, limit, limit, -limit])
    torch.testing.assert_close(inverse_sigmoid(x), expected, rtol=1e-5, atol=1e-6)
    y = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(y.sigmoid()), y)


def test_sine_embedding_by_the_formula():
    value, channels = 0.3, 8
    expected = []
    for i in range(channels):
        angle = value * 2 * math.pi / 10000 ** (2 * (i // 2) / channels)
        expected.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    torch.testing.assert_close(sine_embedding(torch.tensor([value]), channels)[0], torch.tensor(expected))


@pytest.mark.parametrize(("centred", "shift"), [(True, 0.5), (False, 0.0)], ids=["deformable", "plain"])
def test_sine_position_counts_unpadded_pixels(centred, shift):
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[0, :3, :5] = mask[1, :4, :2] = False
    position = sine_position(mask, 8, centred)
    assert position.shape == (2, 4, 6, 8) and position.dtype == torch.float32
    for b, (height, width) in enumerate([(3, 5), (4, 2)]):
        for y in range(height):
            for x in range(width):
                numbers = torch.tensor([(y + 1 - shift) / (height + 1e-6), (x + 1 - shift) / (width + 1e-6)])
                expected = sine_embedding(numbers, 4).flatten()
                torch.testing.assert_close(position[b, y, x], expected, rtol=1e-5, atol=1e-6)
    assert position.isfinite().all()


def suppressed_one_by_one(boxes: torch.Tensor, most: float) -> list[bool]:
    """Greedy suppression of boxes [N, 4], best first, as a loop."""
    iou, gone = box_iou(boxes, boxes), []
    for i in range(len(boxes)):
        gone.append(any(iou[j, i] > most and not gone[j] for j in range(i)))
    return gone


@pytest.mark.parametrize("most", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_suppression_is_that_of_a_loop(most, spread):
    generator = torch.Generator().manual_seed(3)
    # crowds around three places, and boxes that are equal
    centres = torch.rand(2, 3, 4, generator=generator).repeat(1, 40, 1) * 0.5 + 0.2
    boxes = cxcywh_to_xyxy(centres + spread * torch.rand(2, 120, 4, generator=generator))
    boxes[:, 7] = boxes[:, 2]
    gone = suppressed(boxes, most)
    for b in range(2):
        assert gone[b].tolist() == suppressed_one_by_one(boxes[b], most)
        kept = nms(boxes[b], torch.linspace(1, 0, 120), most)
        assert kept.tolist() == (~gone[b]).nonzero()[:, 0].tolist()
    assert gone.any() and not gone[:, 0].any()


def test_suppression_follows_a_chain_as_far_as_its_rounds(monkeypatch):
    # each overlaps the next by 3/5 and the one after by 1/3: every second one goes, if the rounds suffice
    left = torch.arange(12.0)
    boxes = torch.stack([left, torch.zeros(12), left + 4, torch.ones(12)], 1)
    expected = suppressed_one_by_one(boxes, 0.5)
    assert expected == [False, True] * 6
    assert suppressed(boxes[None], 0.5)[0].tolist() == expected
    monkeypatch.setattr("detr.boxes._ROUNDS", 3)
    found = suppressed(boxes[None], 0.5)[0].tolist()
    assert found[:3] == expected[:3] and found != expected


def test_boxes_without_an_area_suppress_nothing():
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]]])
    assert not suppressed(boxes, 0.0).any()
