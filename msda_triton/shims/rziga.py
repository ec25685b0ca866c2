"""rziga/msda-triton's function: other names, other axes, and two more ways to treat the border."""

import torch
from torch import Tensor

from msda_triton.functional import ms_deform_attn


def multiscale_deformable_attention(
    img: Tensor,
    img_shapes: Tensor,
    sampling_points: Tensor,
    attention_weights: Tensor,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """Attention with grid_sample's `padding_mode` and `align_corners`.

    Args:
        img: [B, S, M, D]. img_shapes: [L, 2] (H, W). sampling_points: [B, Q, M, L, P, 2] (x, y) in [0, 1].
        attention_weights: [B, Q, M, L, P].
        padding_mode: "zeros", or "border": locations are moved onto the map. align_corners: 0 and 1 are the centres of
            the first and last pixel instead of the map's edges.
    Returns:
        [B, Q, M, D]: four dimensions, unlike all the others.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if padding_mode not in ("zeros", "border"):
        raise ValueError(f"padding_mode: expected 'zeros' or 'border', got {padding_mode!r}")
    if padding_mode == "border" or align_corners:
        sampling_points = _as_zeros_padded(img_shapes, sampling_points, padding_mode == "border", align_corners)
    out = ms_deform_attn(img, img_shapes, sampling_points, attention_weights)
    return out.unflatten(-1, img.shape[2:])


def _as_zeros_padded(img_shapes: Tensor, points: Tensor, border: bool, align_corners: bool) -> Tensor:
    """The points at which zeros padding and align_corners=False read the same."""
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    size = torch.as_tensor(img_shapes, device=points.device).flip(-1)[:, None].to(points.dtype)  # [L, 1, 2]
    pixel = points * (size - 1) if align_corners else points * size - 0.5
    if border:
        pixel = pixel.clamp(min=0).minimum(size - 1)
    return (pixel + 0.5) / size
