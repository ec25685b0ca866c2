"""Bipartite matching between predictions and objects (DETR, arXiv 2005.12872, section 3.1).

Shapes: R predictions of the same image (one for each decoder layer), B batch, N boxes, T objects of the fullest image,
K classes, P matched pairs of one R.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.boxes import cxcywh_to_xyxy, generalized_iou
from detr.config import Config


class Match(NamedTuple):
    """Matched pairs, image by image: prediction r gives box `query[r, p]` of `image[p]` to object `target[r, p]`."""

    image: Tensor  # [P]
    query: Tensor  # [R, P]
    target: Tensor  # [R, P]


def matching_cost(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, config: Config) -> Tensor:
    """Cost of giving an object to a box: its class, L1 and generalised IoU terms weighted as in `config`.

    Args:
        logits: [R, B, N, K], with a column for "no object" if the class loss is softmax. boxes: [R, B, N, 4].
        labels: [B, T] int64. target_boxes: [B, T, 4]. All boxes are (cx, cy, w, h).
    Returns:
        [R, B, N, T] float32.
    """
    R, B, N, _ = logits.shape
    columns = labels[None, :, None].expand(R, B, N, -1)
    if config.class_loss == "softmax":
        class_cost = -logits.float().softmax(-1).gather(-1, columns)
    else:
        p = logits.gather(-1, columns).float().sigmoid()
        positive = config.focal_alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = (1 - config.focal_alpha) * p**2 * -(1 - p + 1e-8).log()
        class_cost = positive - negative
    boxes = boxes.float()
    l1 = torch.cdist(boxes, target_boxes[None], p=1)
    giou = generalized_iou(cxcywh_to_xyxy(boxes)[..., :, None, :], cxcywh_to_xyxy(target_boxes)[:, None])
    return config.cost_class * class_cost + config.cost_bbox * l1 - config.cost_giou * giou


class Matcher:
    """Solves the assignments of a step on the CPU, after one copy of all their costs.

    A cost that is not finite counts as dearer than every finite one; `nonfinite` counts them and each step warns once.
    """

    def __init__(self) -> None:
        self.nonfinite = 0

    def __call__(self, costs: list[Tensor], sizes: list[int]) -> list[Match]:
        """Match each of `costs`, [R, B, N, T] with any R and N; only the first `sizes[b]` objects of image b exist."""
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        ends = np.cumsum([cost.numel() for cost in costs])
        arrays = [part.reshape(cost.shape) for part, cost in zip(np.split(flat, ends[:-1]), costs, strict=True)]
        before = self.nonfinite
        matches = [self._match(array, sizes, costs[0].device) for array in arrays]
        if self.nonfinite > before:
            message = f"matching cost: {self.nonfinite - before} entries not finite, {self.nonfinite} so far"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return matches

    def _match(self, cost: np.ndarray, sizes: list[int], device: torch.device) -> Match:
        R, _, N, _ = cost.shape
        pairs = [
            [linear_sum_assignment(self._finite(cost[r, b, :, :size])) for b, size in enumerate(sizes)]
            for r in range(R)
        ]
        image = np.repeat(np.arange(len(sizes)), np.minimum(sizes, N))
        query, target = np.moveaxis(np.array([np.concatenate(row, axis=1) for row in pairs]), 1, 0)
        stacked = torch.from_numpy(np.concatenate([image[None], query, target])).to(device)
        return Match(stacked[0], stacked[1 : 1 + R], stacked[1 + R :])

    def _finite(self, cost: np.ndarray) -> np.ndarray:
        finite = np.isfinite(cost)
        if finite.all():
            return cost
        self.nonfinite += int((~finite).sum())
        cost = cost.astype(np.float64)
        return np.where(finite, cost, 2 * np.abs(cost[finite]).max(initial=0.5))
