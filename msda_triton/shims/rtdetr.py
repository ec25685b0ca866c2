"""RT-DETR's `deformable_attention_core_func` and RT-DETRv2's, D-FINE's and DEIM's `_v2`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from msda_triton.functional import ms_deform_attn

_METHODS = {"default": "default", "discrete": "discrete_h"}  # theirs clamps x with H - 1 too


def deformable_attention_core_func(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """RT-DETR's: value [B, S, M, D], locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P] -> [B, Q, M * D]."""
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def deformable_attention_core_func_v2(
    value: Tensor | Sequence[Tensor],
    value_spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
    value_shape: str | None = None,
) -> Tensor:
    """RT-DETRv2's, D-FINE's and DEIM's function, with K = sum(num_points_list) points of each head.

    Args:
        value: [B, S, M, D], or for each level [B, M, D, H * W] (copied once).
        sampling_locations: [B, Q, M, K, 2] (x, y). attention_weights: [B, Q, M, K].
        method: "default" (bilinear) or "discrete" (the nearest pixel, both axes clamped with H - 1 as there).
        value_shape: DEIM's: "default" says that value comes by levels, "reshape" that it is one tensor.
    Returns:
        [B, Q, M * D].
    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {tuple(_METHODS)}, got {method!r}")
    if value_shape not in (None, "default", "reshape"):
        raise ValueError(f"value_shape: expected 'default' or 'reshape', got {value_shape!r}")
    by_levels = not isinstance(value, Tensor)
    if value_shape is not None and by_levels != (value_shape == "default"):
        what = "a tensor for each level" if value_shape == "default" else "one tensor [B, S, M, D]"
        raise ValueError(f"value: expected {what} for value_shape={value_shape!r}, got {type(value).__name__}")
    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # None, not zeros: optimisers tell them apart
    if by_levels:
        value = _join(value, value_spatial_shapes, sampling_locations.shape[2])
    return ms_deform_attn(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points=num_points_list,
        method=_METHODS[method],
    )


def _join(levels: Sequence[Tensor], shapes: Tensor | Sequence[tuple[int, int]], M: int) -> Tensor:
    sizes = [None] * len(shapes) if isinstance(shapes, Tensor) else [H * W for H, W in shapes]
    fit = len(levels) == len(sizes) and all(
        v.dim() == 4 and v.shape[1] == M and size in (None, v.shape[3]) for v, size in zip(levels, sizes, strict=True)
    )
    if not fit:
        raise ValueError(
            f"value: expected [B, {M}, D, H * W] for each of the levels {list(shapes)}, "
            f"got shapes {[tuple(v.shape) for v in levels]}"
        )
    return torch.cat([v.permute(0, 3, 1, 2) for v in levels], 1)
