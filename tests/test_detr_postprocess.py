"""Post-processing against numbers worked out by hand."""

import torch

from detr.postprocess import postprocess


def logit(p: list) -> torch.Tensor:
    return torch.tensor(p).logit()


def test_best_box_and_class_pairs_in_pixels():
    outputs = {
        "logits": logit([[[0.9, 0.2, 0.1], [0.3, 0.05, 0.8]], [[0.1, 0.6, 0.2], [0.15, 0.55, 0.7]]]),
        "boxes": torch.tensor(
            [[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]], [[0.1, 0.1, 0.4, 0.2], [0.5, 0.5, 1.0, 1.0]]]
        ),
    }
    first, second = postprocess(outputs, torch.tensor([[100, 200], [40, 30]]), top_k=3)
    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.8, 0.3]))
    assert first["labels"].tolist() == [0, 2, 0]
    expected = torch.tensor([[80.0, 30, 120, 70], [0.0, 50, 100, 100], [0.0, 50, 100, 100]])
    torch.testing.assert_close(first["boxes"], expected)
    torch.testing.assert_close(second["scores"], torch.tensor([0.7, 0.6, 0.55]))
    assert second["labels"].tolist() == [2, 1, 1]
    # not clamped to the image
    expected = torch.tensor([[0.0, 0, 30, 40], [-3.0, 0, 9, 8], [0.0, 0, 30, 40]])
    torch.testing.assert_close(second["boxes"], expected)


def test_fewer_pairs_than_top_k():
    outputs = {"logits": torch.zeros(1, 2, 3), "boxes": torch.full((1, 2, 4), 0.5)}
    (result,) = postprocess(outputs, torch.tensor([[8, 8]]))
    assert [result[key].shape for key in ("scores", "labels", "boxes")] == [(6,), (6,), (6, 4)]


def test_softmax_gives_each_box_its_best_class_and_drops_no_object():
    p = torch.tensor([[[0.5, 0.2, 0.3], [0.05, 0.05, 0.9], [0.1, 0.6, 0.3]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    (result,) = postprocess({"logits": p.log(), "boxes": boxes, "softmax": True}, torch.tensor([[10, 10]]))
    torch.testing.assert_close(result["scores"], torch.tensor([0.6, 0.5, 0.05]))
    assert result["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(result["boxes"][:, 0], torch.tensor([2.0, 0.0, 1.0]))
