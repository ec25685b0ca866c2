"""Sine position encodings of pixels and of boxes (DETR, arXiv 2005.12872, appendix A.4)."""

import math

import torch
from torch import Tensor


def sine_embedding(positions: Tensor, channels: int) -> Tensor:
    """Encode each number in [0, 1] as sines and cosines of falling frequency.

    Args:
        positions: [...], 1 is one full turn of the fastest wave. channels: even.
    Returns:
        [..., channels] in positions' dtype: sine on even channels, cosine of the same angle on the odd one after.
    """
    exponent = torch.arange(0, channels, 2, dtype=positions.dtype, device=positions.device) / channels
    angle = positions[..., None] * (2 * math.pi) / 10000**exponent
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_position(mask: Tensor, channels: int, centred: bool = True) -> Tensor:
    """Position encoding of every pixel of a padded map, in units of the part that is not padding.

    Args:
        mask: [B, H, W] bool, True on padding. channels: of the result, a multiple of 4.
        centred: count from the pixel's centre as Deformable DETR does, or from its far edge as DETR does.
    Returns:
        [B, H, W, channels] float32, the first half for y and the second for x.
    """
    axes = []
    for dim in (1, 2):
        count = (~mask).cumsum(dim, dtype=torch.float32)
        extent = count.narrow(dim, count.shape[dim] - 1, 1) + 1e-6
        axes.append(sine_embedding((count - 0.5 * centred) / extent, channels // 2))
    return torch.cat(axes, -1)
