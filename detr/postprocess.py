"""From the model's output to scored boxes in pixels."""

import torch
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy
from detr.errors import NotFiniteError


def postprocess(outputs: dict, orig_sizes: Tensor, top_k: int | None = None) -> list[dict[str, Tensor]]:
    """The `top_k` best (box, class) pairs of each image; with softmax scores the best class of each box.

    Args:
        outputs: of the model: logits [B, N, K], boxes [B, N, 4], and softmax if the last column is "no object".
        orig_sizes: [B, 2] integer (h, w) of the images before any resizing, in pixels.
        top_k: most detections of an image; None is one for each of the N queries. There is no score threshold and no
            suppression of duplicates.
    Returns:
        For each image, best first: scores [k], labels [k] in 0 .. K - 1, boxes [k, 4] (x0, y0, x1, y1) in pixels, cut
        off at the borders of the image.
    Raises:
        NotFiniteError: a score or a box is NaN or infinite.
    """
    logits, boxes = outputs["logits"].float(), outputs["boxes"].float()
    scores = _scores(outputs)
    _check_finite(scores, boxes)
    if outputs.get("softmax", False):
        scores, classes = scores.max(-1, keepdim=True)
    else:
        classes = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    scores, best = scores.flatten(1).topk(min(top_k or boxes.shape[1], scores[0].numel()))
    labels = classes.flatten(1).gather(1, best)
    box = best // classes.shape[-1]
    corners = _corners(boxes.gather(1, box[..., None].expand(-1, -1, 4)), orig_sizes.flip(1))
    return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(scores, labels, corners, strict=True)]


def best_of_each_query(outputs: dict, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """For the first image the best class of every query, in their order: scores [N], labels [N], boxes [N, 4] xyxy.

    Args:
        size: (width, height) of the image in pixels.
    """
    scores = _scores(outputs)
    _check_finite(scores, outputs["boxes"])
    scores, labels = scores[0].max(-1)
    return scores, labels, _corners(outputs["boxes"][:1].float(), torch.tensor([size]))[0]


def _corners(boxes: Tensor, sizes: Tensor) -> Tensor:
    """[B, k, 4] cxcywh in [0, 1] to x0, y0, x1, y1 in pixels, within images of the `sizes` [B, 2] (width, height)."""
    return cxcywh_to_xyxy(boxes).clamp(0, 1) * sizes.to(boxes.device).repeat(1, 2)[:, None]


def _check_finite(scores: Tensor, boxes: Tensor) -> None:
    if not (scores.isfinite().all() & boxes.isfinite().all()):
        raise NotFiniteError(
            "the model's scores or boxes are not finite: its training diverged (a lower lr may help), or its weights "
            "are not numbers"
        )


def _scores(outputs: dict) -> Tensor:
    """[B, N, K]."""
    logits = outputs["logits"].float()
    return logits.softmax(-1)[..., :-1] if outputs.get("softmax", False) else logits.sigmoid()
