"""Multi-scale deformable attention as a formula in plain PyTorch: the specification of every kernel.

The legend of the whole package: B batch, S = sum of H_l * W_l value tokens, Q queries, M heads, D channels per head,
L levels, P points per level, K = sum of the points over all levels (L * P where every level has P).

Every function here is differentiable as often as autograd likes, computes in float32 at least, and consists of
operations that autocast leaves alone.
"""

import math

import torch
from torch import Tensor

from msda_triton.call import Call
from msda_triton.constants import constant, traced


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: coordinates and sums never use storage precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def level_of_point(spatial_shapes: Tensor, num_points: list[int]) -> Tensor:
    """The level that each of the K flat points samples, [K] int64."""
    return constant(tuple(l for l, n in enumerate(num_points) for _ in range(n)), spatial_shapes)


def ms_deform_attn_reference(call: Call) -> Tensor:
    """out[b, q, m] = sum_k weights[b, q, m, k] * bilinear(value of level(k), locations[b, q, m, k]).

    Args:
        call: plain or fused; it is made flat and plain first. Locations are (x, y) in units of the level's size.
    Returns:
        [B, Q, M * D] in value's dtype.
    """
    call = plain(call)
    value, locations, weights = call.value, call.locations, call.weights
    dtype = compute_dtype(value, locations, weights)
    table = value.to(dtype)  # once, so that the gradients of a pixel are added up in dtype
    H, W, start = _level_of_each_point(call)
    x, y = locations.to(dtype).unbind(-1)  # [B, Q, M, K]
    # pixel centres sit at (i + 0.5) / size: grid_sample's align_corners=False
    x, y = x * W - 0.5, y * H - 0.5
    taken = (x > -1) & (y > -1) & (x < W) & (y < H)
    x, y = x.masked_fill(~taken, -2), y.masked_fill(~taken, -2)
    attn = weights.to(dtype).masked_fill(~taken, 0)

    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    sampled = 0.0
    for dx, dy, weight in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy)):
        xi, yi = x0 + dx, y0 + dy
        inside = (xi >= 0) & (xi < W) & (yi >= 0) & (yi < H)
        sampled = sampled + weight.unsqueeze(-1) * _pixels(table, start + yi * W + xi, inside)
    return (attn.unsqueeze(-1) * sampled).sum(3).flatten(2).to(value.dtype)


def discrete_attention(call: Call, method: str) -> Tensor:
    """As `ms_deform_attn_reference`, with the pixel at floor(location * size + 0.5), clamped to the map (RT-DETRv2).

    The locations get zeros for a gradient. A location that is not finite contributes nothing.

    Args:
        method: "discrete", or "discrete_h", which clamps x with H - 1 too, as the original RT-DETRv2 and D-FINE code
            does for every map.
    """
    call = plain(call)
    value, locations, weights = call.value, call.locations, call.weights
    dtype = compute_dtype(value, locations, weights)
    H, W, start = _level_of_each_point(call)
    x, y = locations.to(dtype).unbind(-1)  # [B, Q, M, K]
    finite = x.isfinite() & y.isfinite()
    x, y = x.masked_fill(~finite, 0), y.masked_fill(~finite, 0)
    x_last = (H if method == "discrete_h" else W) - 1
    x = (x * W + 0.5).floor().clamp(min=0).minimum(x_last.to(dtype))
    y = (y * H + 0.5).floor().clamp(min=0).minimum((H - 1).to(dtype))
    xi, yi = x.detach().long(), y.detach().long()
    inside = finite & (xi >= 0) & (xi < W) & (yi >= 0)
    attn = weights.to(dtype).masked_fill(~inside, 0)
    attn = attn + (x - x.detach())  # zero, and so is floor's gradient: the locations get one, of zeros
    pixel = _pixels(value.to(dtype), start + yi * W + xi, inside)
    return (attn.unsqueeze(-1) * pixel).sum(3).flatten(2).to(value.dtype)


def _level_of_each_point(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """H, W and first token of each point's level, [K] int64; -1 for H and W of a level without pixels, or one that is
    not within the S tokens: no sample x has -1 < x < -1."""
    shapes, starts = _shapes(call), call.level_start_index
    level = level_of_point(shapes, call.num_points)
    S = call.value.shape[1]
    areas = shapes[:, 0] * shapes[:, 1]
    if starts is not None:
        starts = starts.long()
    elif call.level_starts:
        starts = constant(tuple(call.level_starts), call.value)
    else:
        starts = areas.cumsum(0) - areas
    # a product of sizes beyond S may have overflowed
    fits = ((shapes > 0) & (shapes <= S)).all(1) & (starts >= 0) & (starts + areas <= S)
    H, W, start = (x.masked_fill(~fits, -1)[level] for x in (*shapes.unbind(1), starts))
    return H, W, start


def _shapes(call: Call) -> Tensor:
    """[L, 2] int64 (H, W) on value's device."""
    if call.spatial_shapes is not None:
        return call.spatial_shapes.long()  # an area may be more than a narrow integer holds
    sizes = call.level_sizes
    return constant(tuple(zip(sizes[::2], sizes[1::2], strict=True)), call.value)


def _pixels(value: Tensor, token: Tensor, inside: Tensor) -> Tensor:
    """Channels [B, Q, M, K, D] of the tokens [B, Q, M, K] of each image and head; zeros where not inside."""
    B, S, M, D = value.shape
    if not S:
        return value.sum().expand(*token.shape, D)  # zeros; value gets a gradient all the same
    b = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    m = torch.arange(M, device=value.device).view(1, 1, M, 1)
    return value[b, token.masked_fill(~inside, 0), m].masked_fill(~inside.unsqueeze(-1), 0)


def plain(call: Call) -> Call:
    """A call as the flat and plain one that it stands for: locations, softmax and mask by PyTorch."""
    call = call.flat()
    if call.reference_points is not None:
        dtype = compute_dtype(call.value, call.locations, call.weights, call.reference_points)
        offsets = call.locations.to(dtype)
        points, parts = _points_and_parts(call.reference_points.to(dtype), _shapes(call), call.num_points)
        locations = _locate(points, offsets, parts)
        if not _known_to_be_finite(locations):
            # such a sample is not taken, and its zero gradient must not meet what is not finite here: 0 * inf is NaN
            finite = locations.isfinite().all(-1, keepdim=True)
            points = points.expand(*offsets.shape[:-1], -1).masked_fill(~finite, 0)
            locations = _locate(points, offsets.masked_fill(~finite, 0), parts).masked_fill(~finite, math.nan)
        call = call.changed(locations=locations, weights=call.weights.to(dtype).softmax(-1), reference_points=None)
    if call.value_mask is not None:
        value = call.value.masked_fill(call.value_mask[:, :, None, None], 0)
        call = call.changed(value=value, value_mask=None)
    return call


def sampling_locations(
    reference_points: Tensor, offsets: Tensor, spatial_shapes: Tensor, num_points: list[int]
) -> Tensor:
    """[B, Q, M, K, 2] (x, y) in units of the level's size (appendix A.3 and A.4 of arXiv 2010.04159).

    Args:
        reference_points: [B, Q, L or 1, 2] points (x, y), whose offsets count pixels of a level; or [B, Q, L or 1, 4]
            boxes (cx, cy, w, h): an offset of P, the level's number of points, reaches from the centre to the edge.
        offsets: [B, Q, M, K, 2]. spatial_shapes: [L, 2] integer (H, W). num_points: of each level, K in all.
    """
    dtype = compute_dtype(reference_points, offsets)
    points, parts = _points_and_parts(reference_points.to(dtype), spatial_shapes, num_points)
    return _locate(points, offsets.to(dtype), parts)


def _points_and_parts(reference_points: Tensor, spatial_shapes: Tensor, num_points: list[int]) -> tuple[Tensor, Tensor]:
    """Reference point of each of the K points, [B, Q, 1, K, 2 or 4], and what divides its offsets: see `_locate`."""
    level = level_of_point(spatial_shapes, num_points)
    points = reference_points[:, :, None, level if reference_points.shape[2] > 1 else torch.zeros_like(level)]
    if points.shape[-1] == 4:
        return points, constant(tuple(num_points), spatial_shapes)[level, None]
    # of a level without pixels no sample is taken; a size of 1 keeps its gradient from being 0 / 0
    return points, spatial_shapes.long().flip(-1)[level].clamp(min=1)


def _locate(points: Tensor, offsets: Tensor, parts: Tensor) -> Tensor:
    """Offsets count pixels of a level of (W, H) = parts; or, for boxes, of `parts` points reach half the box's size."""
    if points.shape[-1] == 2:
        return points + offsets / parts
    return points[..., :2] + offsets * (points[..., 2:] * 0.5 / parts)


def _known_to_be_finite(x: Tensor) -> bool:
    # numbers are read back, which is free on CPUs only; finite numbers may have an infinite sum, and count as not known
    return not traced(x) and x.device.type == "cpu" and math.isfinite(x.detach().sum().item())
