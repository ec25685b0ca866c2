"""Box arithmetic: centres and corners, generalised IoU, and the inverse of the sigmoid that boxes pass through."""

import torch
from torch import Tensor

_ROUNDS = 16  # of `suppressed`


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners (x0, y0, x1, y1) of boxes [..., 4] given as (cx, cy, w, h)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def iou_and_generalized_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes given as corners, elementwise over broadcast dimensions.

    torchvision's take two lists of boxes only; this one gives all pairs of a batch for `a[..., :, None, :]` and
    `b[..., None, :, :]`.

    Args:
        a, b: [..., 4] (x0, y0, x1, y1).
    Returns:
        Both [...], in [0, 1] and [-1, 1]; nan where both boxes have no area and coincide.
    """
    size_a, size_b = (box[..., 2:] - box[..., :2] for box in (a, b))
    area_a, area_b = size_a.prod(-1), size_b.prod(-1)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - inner
    iou = inner / union
    return iou, iou - (hull - union) / hull


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """The second of `iou_and_generalized_iou`."""
    return iou_and_generalized_iou(a, b)[1]


def suppressed(boxes: Tensor, most: float) -> Tensor:
    """Greedy non-maximum suppression as a mask: what overlaps a better box that is kept by an IoU of more than `most`.

    Its size depends on no data, so that it can be compiled and exported, which torchvision's `nms` cannot. A box is
    settled one round after the better ones that overlap it, so _ROUNDS bounds the length of a chain of boxes in which
    each overlaps the next; boxes beyond it may come out otherwise than box by box.

    Args:
        boxes: [B, N, 4] (x0, y0, x1, y1), best first.
    Returns:
        [B, N] bool.
    """
    iou = iou_and_generalized_iou(boxes[:, :, None], boxes[:, None])[0]  # NaN of two equal boxes without an area
    over = (iou > most).float().triu(1)  # [better, worse]
    kept = over.new_ones(over.shape[0], 1, over.shape[1])
    for _ in range(_ROUNDS):
        kept = 1 - (kept @ over).clamp(max=1)
    return kept[:, 0] == 0


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both terms kept at eps or more, so that 0 and 1 give finite values."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
