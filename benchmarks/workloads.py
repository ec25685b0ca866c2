"""Named shapes and location distributions: what is timed."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_R50_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # an 800 x 1333 image at strides 8 to 64


@dataclass(frozen=True)
class Workload:
    """One call of the operator: B images, levels (H, W), Q queries, M heads of D channels, P points per level."""

    name: str
    B: int
    levels: tuple[tuple[int, int], ...]
    Q: int
    M: int = 8
    D: int = 32
    P: int = 4

    @property
    def S(self) -> int:
        return sum(h * w for h, w in self.levels)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("encoder", 2, _R50_LEVELS, 22223),
        Workload("decoder", 2, _R50_LEVELS, 300),
        Workload("decoder_b4", 4, _R50_LEVELS, 300),
        Workload("dino_decoder", 2, _R50_LEVELS, 900),
        Workload("mask2former_encoder", 2, ((128, 128), (64, 64), (32, 32)), 21504),
        Workload("rtdetr_decoder", 8, ((80, 80), (40, 40), (20, 20)), 300),
        Workload("bev_cross", 6, ((116, 200), (58, 100), (29, 50), (15, 25)), 9675, P=8),
        Workload("l4_encoder", 2, ((64, 64), (32, 32), (16, 16), (8, 8)), 5440),
        Workload("tiny", 1, ((12, 12), (6, 6), (3, 3)), 25, M=4, D=16),
        Workload("tiny_encoder", 8, ((16, 16), (8, 8), (4, 4)), 336, M=4, D=16),  # of the tiny detector
        Workload("tiny_decoder", 8, ((16, 16), (8, 8), (4, 4)), 25, M=4, D=16),
        Workload("dry_encoder", 2, ((4, 5), (2, 3)), 26, M=2, D=8, P=2),  # rehearsals: seconds in Triton's interpreter
        Workload("dry_decoder", 1, ((4, 5), (2, 3)), 3, M=2, D=8, P=2),
    )
}
DISTRIBUTIONS = ("local", "uniform")  # by worth


@dataclass
class Inputs:
    """The operator's arguments in both forms: the locations and weights are those of the offsets and logits."""

    workload: Workload
    value: Tensor  # [B, S, M, D]
    shapes: Tensor  # [L, 2] int64 (H, W)
    starts: Tensor  # [L] int64
    reference_points: Tensor  # [B, Q, 1, 2] float32
    offsets: Tensor  # [B, Q, M, L, P, 2] float32, pixels of the level
    logits: Tensor  # [B, Q, M, L, P]
    locations: Tensor  # [B, Q, M, L, P, 2] float32
    weights: Tensor  # [B, Q, M, L, P]

    def from_offsets_and_logits(self) -> "Inputs":
        """The same with locations and weights computed from offsets and logits, differentiably."""
        locations = self.reference_points[:, :, None, :, None] + self.offsets / self.shapes.flip(1)[:, None]
        weights = self.logits.flatten(3).softmax(-1).view_as(self.logits)
        return replace(self, locations=locations, weights=weights)


def make_inputs(workload: Workload, distribution: str, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random inputs, the same for every provider and device.

    Args:
        distribution: "uniform" draws locations from the whole map, as published benchmarks do. "local" is what a
            trained model does: the query's own pixel (a random point where queries are no pixels), the ring of offsets
            that the module starts from, and Gaussian noise of 2 pixels.
        dtype: of value and weights; locations are float32 as models compute them.
    """
    w, L = workload, len(workload.levels)
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([(W, H) for H, W in w.levels], dtype=torch.float32)[:, None]  # [L, 1, 2] (x, y)
    if distribution == "uniform":
        reference = torch.full((w.B, w.Q, 1, 2), 0.5)
        offsets = (torch.rand(w.B, w.Q, w.M, L, w.P, 2, generator=rng) - 0.5) * sizes
    elif distribution == "local":
        points = _pixel_centres(w.levels) if w.Q == w.S else torch.rand(w.Q, 2, generator=rng)
        reference = points.view(1, w.Q, 1, 2).expand(w.B, -1, -1, -1).contiguous()
        noise = torch.randn(w.B, w.Q, w.M, L, w.P, 2, generator=rng) * 2
        offsets = _ring(w.M, w.P)[:, None] + noise
    else:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    logits = torch.randn(w.B, w.Q, w.M, L, w.P, generator=rng).to(dtype)
    value = torch.randn(w.B, w.S, w.M, w.D, generator=rng).to(dtype)
    shapes = torch.tensor(w.levels)
    return Inputs(
        workload=w,
        value=value.to(device),
        shapes=shapes.to(device),
        starts=(shapes.prod(1).cumsum(0) - shapes.prod(1)).to(device),
        reference_points=reference.to(device),
        offsets=offsets.to(device),
        logits=logits.to(device),
        locations=(reference[:, :, None, :, None] + offsets / sizes).to(device),
        weights=logits.float().flatten(3).softmax(-1).view_as(logits).to(dtype).to(device),
    )


def _pixel_centres(levels: tuple[tuple[int, int], ...]) -> Tensor:
    """(x, y) in [0, 1] of every pixel of every level in storage order, [S, 2]."""
    centres = []
    for H, W in levels:
        y, x = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
        centres.append(torch.stack((x, y), -1).view(-1, 2))
    return torch.cat(centres)


def _ring(M: int, P: int) -> Tensor:
    """The offsets that `MSDeformAttn` starts from, [M, P, 2]: head m looks along 2 pi m / M, point p is p + 1 away."""
    angle = torch.arange(M) * (2 * math.pi / M)
    direction = torch.stack((angle.cos(), angle.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(1, P + 1)[:, None]
