"""Post-processing against numbers worked out by hand."""

import pytest
import torch

from detr.postprocess import best_of_each_query, postprocess


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
    # the second reaches 3 pixels over the left border
    expected = torch.tensor([[0.0, 0, 30, 40], [0.0, 0, 9, 8], [0.0, 0, 30, 40]])
    torch.testing.assert_close(second["boxes"], expected)


def test_boxes_end_at_the_borders_of_their_image():
    boxes = torch.tensor([[[0.0, 1.0, 0.5, 0.25], [0.9, 0.5, 1.0, 3.0], [1.0, 0.0, 0.0, 0.0]]])
    outputs = {"logits": logit([[[0.9], [0.8], [0.7]]]), "boxes": boxes}
    expected = torch.tensor([[0.0, 35, 50, 40], [80, 0, 200, 40], [200, 0, 200, 0]])
    (result,) = postprocess(outputs, torch.tensor([[40, 200]]))
    torch.testing.assert_close(result["boxes"], expected)
    torch.testing.assert_close(best_of_each_query(outputs, (200, 40))[2], expected)


@pytest.mark.parametrize(("top_k", "count"), [(None, 2), (1, 1), (5, 5), (100, 6)])
def test_as_many_as_there_are_queries_or_pairs(top_k, count):
    outputs = {"logits": torch.zeros(1, 2, 3), "boxes": torch.full((1, 2, 4), 0.5)}
    (result,) = postprocess(outputs, torch.tensor([[8, 8]]), top_k)
    assert [result[key].shape for key in ("scores", "labels", "boxes")] == [(count,), (count,), (count, 4)]


def test_softmax_gives_each_box_its_best_class_and_drops_no_object():
    p = torch.tensor([[[0.5, 0.2, 0.3], [0.05, 0.05, 0.9], [0.1, 0.6, 0.3]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    (result,) = postprocess({"logits": p.log(), "boxes": boxes, "softmax": True}, torch.tensor([[10, 10]]))
    torch.testing.assert_close(result["scores"], torch.tensor([0.6, 0.5, 0.05]))
    assert result["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(result["boxes"][:, 0], torch.tensor([2.0, 0.0, 1.0]))
