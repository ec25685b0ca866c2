"""Multi-scale deformable attention as a formula in plain PyTorch: the specification of every kernel.

The legend of the whole package: B batch, S = sum of H_l * W_l value tokens, Q queries, M heads, D channels per head,
L levels, P points per level, K = sum of the points over all levels (L * P where every level has P).
"""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: coordinates and sums never use storage precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def level_of_point(spatial_shapes: Tensor, num_points: list[int]) -> Tensor:
    """The level that each of the K flat points samples, [K] int64."""
    levels = [l for l, n in enumerate(num_points) for _ in range(n)]
    return torch.tensor(levels, dtype=torch.int64, device=spatial_shapes.device)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    method: str = "default",
) -> Tensor:
    """out[b, q, m] = sum_k attention_weights[b, q, m, k] * bilinear(value of level(k), sampling_locations[b, q, m, k]).

    Differentiable as often as autograd likes; computes in float32 at least and in float64 for float64 inputs.

    Args:
        value: [B, S, M, D]. spatial_shapes: [L, 2] integer (H, W). level_start_index: [L] integer, or None for levels
            stored one after the other. sampling_locations: [B, Q, M, K, 2] (x, y) in units of the level's size.
            attention_weights: [B, Q, M, K]. num_points: points per level, sums to K.
        method: "default" is bilinear; "discrete" takes the nearest pixel, clamped to the map, as RT-DETRv2 does;
            "discrete_h" clamps x with H - 1 too, as the original RT-DETRv2 and D-FINE code does for every map.
    Returns:
        [B, Q, M * D] in value's dtype.
    """
    B, S, M, D = value.shape
    Q = sampling_locations.shape[1]
    dtype = compute_dtype(value, sampling_locations, attention_weights)

    level = level_of_point(spatial_shapes, num_points)
    areas = spatial_shapes[:, 0] * spatial_shapes[:, 1]
    starts = areas.cumsum(0) - areas if level_start_index is None else level_start_index
    # a level that does not fit into S holds nothing
    fits = (starts >= 0) & (spatial_shapes >= 0).all(1) & (starts + areas <= S)
    H, W = (torch.where(fits, size, 0)[level].long() for size in spatial_shapes.unbind(1))  # [K]
    start = torch.where(fits, starts, 0)[level].long()

    x, y = sampling_locations.to(dtype).unbind(-1)  # [B, Q, M, K]
    attn = attention_weights.to(dtype)
    if method == "default":
        # pixel centres sit at (i + 0.5) / size: grid_sample's align_corners=False
        x, y = x * W - 0.5, y * H - 0.5
        taken = (x > -1) & (y > -1) & (x < W) & (y < H)
    else:
        x_last = (H if method == "discrete_h" else W) - 1
        taken = x.isfinite() & y.isfinite()
        x = (x * W + 0.5).detach().floor().clamp(min=0).minimum(x_last.to(dtype))
        y = (y * H + 0.5).detach().floor().clamp(min=0).minimum((H - 1).to(dtype))
    x, y, attn = torch.where(taken, x, -2), torch.where(taken, y, -2), torch.where(taken, attn, 0)

    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    b = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    m = torch.arange(M, device=value.device).view(1, 1, M, 1)

    out = value.new_zeros(B, Q, M, D, dtype=dtype)
    for dx, dy, weight in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy)):
        xi, yi = x0 + dx, y0 + dy
        inside = (xi >= 0) & (xi < W) & (yi >= 0) & (yi < H)
        if method != "default" and (dx or dy):
            inside = torch.zeros_like(inside)
        token = torch.where(inside, start + yi * W + xi, 0)
        corner = value[b, token, m].to(dtype) if S else value.new_zeros(*token.shape, D, dtype=dtype)
        corner = torch.where(inside.unsqueeze(-1), corner, 0)  # [B, Q, M, K, D]
        out = out + torch.einsum("bqmk,bqmkd->bqmd", attn * weight, corner)
    return out.reshape(B, Q, M * D).to(value.dtype)
