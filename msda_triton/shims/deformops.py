"""deformops' functions: `deformops.registry.msda` (3.0) and `deform2d_multiscale` with its fused variant (2.0)."""

import torch
from torch import Tensor

from msda_triton.functional import ms_deform_attn


def msda(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    /,
    *,
    method: str | None = None,
    softmax: bool = False,
    chunk_step: int = 128,
    backend: None = None,
) -> Tensor:
    """[B, S, M, D] -> [B, Q, M * D].

    Args:
        sampling_locations: [B, Q, M, L, P, 2]. attention_weights: [B, Q, M, L, P] or [B, Q, M, L * P].
        method: "linear" takes the weights as they are, "softmax" normalises them; None: as `softmax` says.
        chunk_step: not needed. backend: None; a backend of deformops cannot be asked for here.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    method = ("softmax" if softmax else "linear") if method is None else getattr(method, "value", method)
    if method not in ("linear", "softmax"):
        raise ValueError(f"method: expected 'linear' or 'softmax', got {method!r}")
    if backend is not None:
        raise ValueError(f"backend: expected None, got {backend!r}, which is one of deformops' own")
    shape = sampling_locations.shape[:5]
    if attention_weights.shape not in (shape, (*shape[:3], shape[-1] * shape[-2])):
        raise ValueError(
            f"attention_weights: expected shape {tuple(shape)} or its last two joined, "
            f"got {tuple(attention_weights.shape)}"
        )
    weights = attention_weights.reshape(shape)
    if method == "softmax":
        dtype = torch.promote_types(weights.dtype, torch.float32)
        weights = weights.flatten(3).to(dtype).softmax(-1).view(shape)
    return ms_deform_attn(value, spatial_shapes, sampling_locations, weights, level_start_index=level_start_index)


def deform2d_multiscale(
    values: Tensor, shapes: Tensor, start_index: Tensor, locs: Tensor, attn: Tensor, im2col_step: int = 128
) -> Tensor:
    """[B, S, M, D] -> [B, Q, M * D], of 2.0; `im2col_step` is not needed."""
    return ms_deform_attn(values, shapes, locs, attn, level_start_index=start_index)


def deform2d_multiscale_fused(
    values: Tensor,
    shapes: Tensor,
    start_index: Tensor,
    loc: Tensor,
    attn_logits: Tensor,
    im2col_step: int = 64,
    points: int = 8,
) -> Tensor:
    """As `deform2d_multiscale`, with the softmax of `attn_logits` [B, Q, M, L, P] over all points; `points` is P."""
    if loc.dim() != 6 or loc.shape[4] != points:
        raise ValueError(f"loc: expected [B, Q, M, L, P = {points}, 2], got shape {tuple(loc.shape)}")
    return msda(values, shapes, start_index, loc, attn_logits, method="softmax")
