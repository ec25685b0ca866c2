"""The operator in eager PyTorch for CPUs, forward and backward: `reference.py`'s formula without its big temporaries.

The pixels that one (batch, query, head) touches are a bag of rows of the table [B * S * M, D]: the weighted sum over a
bag is the result, the sum over the transposed bags is the gradient of value, and the products of grad_out with the rows
give the other two. A pixel outside its level counts with weight zero, which is exact as long as everything is finite.
Calls with NaN or infinity in them, with levels that do not fit, of other methods and on other devices go to
`reference.py`. Legend: see there.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_triton.reference import compute_dtype, ms_deform_attn_reference

# Samples (b, q, m, k) at a time: bounds the memory, and lets temporaries stay in a CPU's cache.
_CHUNK_FORWARD = 1 << 16
_CHUNK_BACKWARD = 1 << 19


class _Levels(NamedTuple):
    """The level that each of the K points samples, and how its pixels become rows of the table."""

    size: Tensor  # [2, 1, 1, 1, K] (W, H)
    first: Tensor  # 0 and
    last: Tensor  # size - 1, of the same shape
    scale: Tensor  # [2, 1, 1, 1, K] rows from one pixel to the next along x and y
    base: Tensor  # [B, 1, M, K] row of the first pixel


class Samples(NamedTuple):
    """The two neighbours of each sample along each axis; the dimensions are neighbour, (x, y), B, Q, M, K."""

    pixel: Tensor  # moved into the level where outside
    weight: Tensor  # of the linear interpolation, 0 where moved
    slope: Tensor | None  # derivative of the weight by the location, 0 where moved


class Stages(NamedTuple):
    """The element-wise parts of the algorithm, which `inductor.py` compiles; the rest are calls into PyTorch."""

    bags: Callable
    sample_gradients: Callable


def fallback_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    method: str,
) -> Tensor:
    """[B, Q, M * D] in value's dtype; arguments as of `ms_deform_attn_reference`. Autograd does not see through it."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    if torch.compiler.is_compiling():
        return _traced_forward(*inputs)
    return run_forward(_EAGER, *inputs)


def fallback_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    method: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, locations and weights, each in its input's dtype, None where `needs` says False.

    grad_out: [B, Q, M * D]. The other arguments are those of `fallback_forward`.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    if torch.compiler.is_compiling():
        grads = _traced_backward(grad_out, *inputs, list(needs))
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    return run_backward(_EAGER, grad_out, *inputs, needs)


def run_forward(
    stages: Stages, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method
) -> Tensor:
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    B, _, M, D = value.shape
    dtype = compute_dtype(value, sampling_locations, attention_weights)
    levels = None
    if _is_usual(value, sampling_locations, attention_weights, method):
        table, steps = _as_table(value.to(dtype))
        levels = _levels(spatial_shapes, level_start_index, num_points, value.shape, steps, dtype)
    if levels is None:
        return ms_deform_attn_reference(*inputs)
    outs = []
    for locations, attn in _query_chunks(_CHUNK_FORWARD, sampling_locations, attention_weights):
        rows, weights, _ = stages.bags(locations.to(dtype), attn.to(dtype), levels, False)
        corners = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
        outs.append(corners.view(4, B, -1, M * D).sum(0))
    out = _cat(outs)
    return out.to(value.dtype) if _is_finite(out) else ms_deform_attn_reference(*inputs)


def run_backward(
    stages: Stages, grad_out, value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    num_points, method, needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    B, S, M, D = value.shape
    dtype = compute_dtype(value, sampling_locations, attention_weights)
    levels = None
    if _is_usual(value, sampling_locations, attention_weights, method) and _is_finite(grad_out):
        levels = _levels(spatial_shapes, level_start_index, num_points, value.shape, (S * M, M, 1), dtype)
    if levels is None:
        return _reference_backward(grad_out, inputs, needs)
    table = value.to(dtype).reshape(B * S * M, D)
    grad_table, grads_locations, grads_weights = None, [], []
    for locations, attn, grad in _query_chunks(_CHUNK_BACKWARD, sampling_locations, attention_weights, grad_out):
        locations, attn = locations.to(dtype), attn.to(dtype)
        rows, weights, samples = stages.bags(locations, attn, levels, needs[1])
        if not _is_finite(weights):
            return _reference_backward(grad_out, inputs, needs)
        grad_bags = grad.to(dtype).expand(4, -1, -1, -1).reshape(-1, D)
        if needs[0]:
            grad_chunk = _sum_transposed_bags(rows, weights, grad_bags, len(table))
            grad_table = grad_chunk if grad_table is None else grad_table.add_(grad_chunk)
        if needs[1] or needs[2]:
            products = _products(rows, grad_bags, table)
            if not _is_finite(products):
                return _reference_backward(grad_out, inputs, needs)
            grad_locations, grad_weights = stages.sample_gradients(samples, attn, products.view(2, 2, *attn.shape))
            grads_locations.append(grad_locations)
            grads_weights.append(grad_weights)
    return (
        grad_table.view(B, S, M, D).to(value.dtype) if needs[0] else None,
        _cat(grads_locations).to(sampling_locations.dtype) if needs[1] else None,
        _cat(grads_weights).to(attention_weights.dtype) if needs[2] else None,
    )


def _reference_backward(grad_out: Tensor, inputs: tuple, needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    value, spatial_shapes, level_start_index, locations, weights, num_points, method = inputs
    tensors = [t.detach().requires_grad_(need) for t, need in zip((value, locations, weights), needs, strict=True)]
    with torch.enable_grad():
        out = ms_deform_attn_reference(
            tensors[0], spatial_shapes, level_start_index, tensors[1], tensors[2], num_points, method
        )
    wanted = [t for t in tensors if t.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, materialize_grads=True) if wanted else ())
    return tuple(next(grads) if need else None for need in needs)


def _is_usual(value: Tensor, locations: Tensor, weights: Tensor, method: str) -> bool:
    # numbers are read back, which is free on CPUs only
    if method != "default" or value.device.type != "cpu" or value.numel() == 0 or weights.numel() == 0:
        return False
    return _is_finite(locations)


def _is_finite(tensor: Tensor) -> bool:
    # finite numbers may have an infinite sum: then the reference computes what it need not have
    return math.isfinite(tensor.sum().item())


def _query_chunks(samples: int, locations: Tensor, weights: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors [B, Q, ...] in runs of queries with about so many samples each."""
    tensors = (locations, weights, *others)
    if weights.numel() <= samples:
        return [tensors]
    queries = max(1, samples * weights.shape[1] // weights.numel())
    return list(zip(*(t.split(queries, 1) for t in tensors), strict=True))


def _cat(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)


def _as_table(value: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """value as [rows, D], and the rows from one batch, token and head to the next. Copies only if strides force it."""
    D = value.shape[3]
    if value.stride(3) != 1 or any(stride % D for stride in value.stride()[:3]):
        value = value.contiguous()
    steps = tuple(stride // D for stride in value.stride()[:3])
    rows = 1 + sum((n - 1) * step for n, step in zip(value.shape[:3], steps, strict=True))
    return value.as_strided((rows, D), (D, 1)), steps


def _levels(
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    num_points: list[int],
    value_shape: torch.Size,
    steps: tuple[int, int, int],
    dtype: torch.dtype,
) -> _Levels | None:
    """None if a level is empty or does not fit into value."""
    B, S, M, _ = value_shape
    shapes = spatial_shapes.tolist()
    if level_start_index is None:
        starts = [sum(H * W for H, W in shapes[:level]) for level in range(len(shapes))]
    else:
        starts = level_start_index.tolist()
    widths, heights, base = [], [], []
    for (H, W), start, count in zip(shapes, starts, num_points, strict=True):
        if H <= 0 or W <= 0 or start < 0 or start + H * W > S:
            return None
        widths += [W] * count
        heights += [H] * count
        base += [start * steps[1]] * count
    index = torch.int32 if sum(n * step for n, step in zip((B, S, M), steps, strict=True)) < 2**31 else torch.int64
    bounds = [[widths, heights], [[0] * len(widths)] * 2, [[W - 1 for W in widths], [H - 1 for H in heights]]]
    size, first, last = torch.tensor(bounds, dtype=dtype).view(3, 2, 1, 1, 1, -1)
    scale = torch.tensor([[steps[1]] * len(widths), [W * steps[1] for W in widths]], dtype=index).view(2, 1, 1, 1, -1)
    heads = torch.tensor([[[[b * steps[0] + m * steps[2]] for m in range(M)]] for b in range(B)], dtype=index)
    return _Levels(size, first, last, scale, heads + torch.tensor(base, dtype=index))


def _samples(locations: Tensor, levels: _Levels, with_slope: bool) -> Samples:
    # masks are numbers here: comparing and selecting costs ten times an addition in eager PyTorch
    position = locations.movedim(-1, 0).contiguous().mul(levels.size).sub_(0.5)
    low = position.floor()
    neighbour = torch.stack((low, low + 1))
    pixel = neighbour.clamp(levels.first, levels.last)
    # the distance to the neighbour itself; one outside is first pushed on by twice its way, to 1 or more from position
    distance = torch.lerp(pixel, neighbour, 3).sub_(position).abs_()
    weight = torch.rsub(distance, 1).clamp_(min=0)
    slope = None
    if with_slope:
        inside = 1 - neighbour.sub_(pixel).abs_().clamp_(max=1)
        # a location exactly one pixel before the first does not count, though its upper neighbour is inside
        slope = inside.mul_(torch.sign(position + 1).mul_(levels.size))
        slope[0].neg_()
    return Samples(pixel, weight, slope)


def corner_bags(locations: Tensor, attn: Tensor, levels: _Levels, with_slope: bool) -> tuple[Tensor, Tensor, Samples]:
    """Rows of the table and their weights, [2 (y) * 2 (x) * B * Q * M, K]: a bag for each of the four corners."""
    samples = _samples(locations, levels, with_slope)
    x, y = (samples.pixel.to(levels.scale.dtype) * levels.scale).unbind(1)
    wx, wy = samples.weight.unbind(1)
    rows = (y + levels.base).unsqueeze(1) + x
    weights = (wy * attn).unsqueeze(1) * wx
    return rows.view(-1, attn.shape[-1]), weights.view(-1, attn.shape[-1]), samples


def _sum_transposed_bags(rows: Tensor, weights: Tensor, grad_bags: Tensor, table_rows: int) -> Tensor:
    """Gradient of the table, [table_rows, D]: its rows are the bags now, so that no two threads add to one of them."""
    rows, order = rows.flatten().sort(stable=True)
    offsets = torch._convert_indices_from_coo_to_csr(rows, table_rows)
    bag = order // weights.shape[1]
    weights = weights.flatten().index_select(0, order)
    return F.embedding_bag(bag, grad_bags, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


@functools.cache
def _accept_beta() -> None:
    # torch says once per process that CSR tensors are beta; users of this operator cannot do anything about that
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        torch.empty(0, 0, layout=torch.sparse_csr)


def _products(rows: Tensor, grad_bags: Tensor, table: Tensor) -> Tensor:
    """The sum over channels of grad_bags[i] * table[rows[i, j]] for every entry of rows in order."""
    _accept_beta()
    bags, per_bag = rows.shape
    ends = torch.arange(0, bags * per_bag + 1, per_bag, dtype=rows.dtype)
    products = table.new_zeros(bags * per_bag)  # beta = 0 still multiplies what is there, and 0 * NaN is NaN
    wanted = torch.sparse_csr_tensor(ends, rows.flatten(), products, (bags, len(table)), check_invariants=False)
    torch.sparse.sampled_addmm(wanted, grad_bags, table.T, beta=0, out=wanted)  # writes into products
    return products


def sample_gradients(samples: Samples, attn: Tensor, products: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients of locations [B, Q, M, K, 2] and weights [B, Q, M, K] from the products [2 (y), 2 (x), B, Q, M, K]."""
    (wx0, wy0), (wx1, wy1) = samples.weight
    at_x = torch.addcmul(wy0 * products[0], wy1, products[1])  # [2 (x), B, Q, M, K]
    grad_weights = torch.addcmul(wx0 * at_x[0], wx1, at_x[1])
    if samples.slope is None:
        return None, grad_weights
    at_y = torch.addcmul(wx0 * products[:, 0], wx1, products[:, 1])
    low, high = samples.slope
    at_xy = torch.stack((at_x, at_y), 1)
    grad_locations = torch.addcmul(low * at_xy[0], high, at_xy[1]) * attn
    return grad_locations.movedim(0, -1), grad_weights


_EAGER = Stages(corner_bags, sample_gradients)


# Under torch.compile and torch.export the fallback is one node: what it does depends on numbers that graphs do not see.


@torch.library.custom_op("msda_triton::fallback_forward", mutates_args=())
def _traced_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    method: str,
) -> Tensor:
    return run_forward(
        _EAGER, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method
    )


@_traced_forward.register_fake
def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method):
    return value.new_empty(value.shape[0], attention_weights.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("msda_triton::fallback_backward", mutates_args=())
def _traced_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    method: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    grads = run_backward(_EAGER, grad_out, *inputs, needs)
    return tuple(value.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@_traced_backward.register_fake
def _(
    grad_out, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method, needs
):
    inputs = (value, sampling_locations, attention_weights)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else value.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )
