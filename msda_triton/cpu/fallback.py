"""The operator in eager PyTorch for CPUs, forward and backward: `reference.py`'s formula without its big temporaries.

How it computes is in `bags.py`. There a pixel outside its level counts with weight zero, which is exact as long as
everything is finite. What is not is computed again with care: such a pixel is then a row of zeros behind the table, and
no level is dense. Legend: see `reference.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msda_triton.call import Call
from msda_triton.cpu import bags
from msda_triton.reference import compute_dtype

# Samples (b, q, m, k) at a time: bounds the memory, and lets temporaries stay in a CPU's cache.
_CHUNK_FORWARD = 1 << 16
_CHUNK_BACKWARD = 1 << 19
_CHUNK_DENSE = 1 << 20  # numbers of a dense matrix
# A level is dense in the backward if it has at most this many tokens for each of its points.
_DENSE_TOKENS = 64


class Stages(NamedTuple):
    """The element-wise parts of the algorithm, which `inductor.py` compiles; the rest are calls into PyTorch."""

    bags: Callable
    sample_gradients: Callable


_EAGER = Stages(bags.corner_bags, bags.sample_gradients)


def _without_autocast(run: Callable) -> Callable:
    """The dtypes are ours: autocast would compute matrix products in half precision."""

    @functools.wraps(run)
    def wrapped(*arguments):
        if not torch.is_autocast_enabled("cpu"):
            return run(*arguments)
        with torch.autocast("cpu", enabled=False):
            return run(*arguments)

    return wrapped


def fallback_forward(call: Call) -> Tensor:
    """[B, Q, M * D] in value's dtype, of a plain call. Autograd does not see through it."""
    return run_forward(_EAGER, call)


def fallback_backward(grad_out: Tensor, call: Call, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of value, locations and weights, each in its input's dtype, None where `needs` says False.

    Args:
        grad_out: [B, Q, M * D]. call: a plain one.
    """
    return run_backward(_EAGER, grad_out, call, needs)


@_without_autocast
def run_forward(stages: Stages, call: Call) -> Tensor:
    """`fallback_forward`, with the element-wise parts given."""
    value = call.value
    geometry, _, locations, weights = _used_samples(call)
    if not value.numel() or not weights.numel():
        return value.new_zeros(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])
    out = _forward(stages, value, geometry, locations, weights)
    if not _is_finite(out):
        out = _forward(None, value, geometry, _bounded(locations), weights)
    return _cast(out, value.dtype)


@_without_autocast
def run_backward(stages: Stages, grad_out: Tensor, call: Call, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """`fallback_backward`, with the element-wise parts given."""
    value, inputs = call.value, (call.value, call.locations, call.weights)
    geometry, points, locations, weights = _used_samples(call)
    if not value.numel() or not weights.numel():
        return tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
    grads = None
    if _is_finite(grad_out):
        grads = _backward(stages, grad_out, value, geometry, locations, weights, needs)
    if grads is None:
        grads = _backward(None, grad_out, value, geometry, _bounded(locations), weights, needs)
    if points is not None:
        grads = grads[0], *(_spread(grad, points, sum(call.num_points)) for grad in grads[1:])
    return tuple(
        _cast(grad, x.dtype).contiguous().view(x.shape) if need else None
        for grad, x, need in zip(grads, inputs, needs, strict=True)
    )


def _used_samples(call: Call) -> tuple[bags.Geometry, list[int] | None, Tensor, Tensor]:
    """The levels that hold pixels, their points among the K (None for all), and the locations and weights of these."""
    call = call.flat()
    locations, weights = call.locations, call.weights
    geometry, points = bags.geometry_of(call)
    if not _is_finite(locations):
        locations = _bounded(locations)
    if points is not None:
        locations, weights = locations[:, :, :, points], weights[..., points]
    return geometry, points, locations, weights


def _forward(
    stages: Stages | None, value: Tensor, geometry: bags.Geometry, locations: Tensor, weights: Tensor
) -> Tensor:
    """[B, Q, M * D] in the dtype of computation; without stages, also where something is not finite."""
    B, _, M, D = value.shape
    dtype = compute_dtype(value, locations, weights)
    table, (batch, token, head) = _as_table(_cast(value, dtype))
    levels = bags.levels_of(geometry, (B, 1, M), (batch, 0, head), token, dtype)
    zero_row = len(table)
    if stages is None:
        table = _with_zero_rows(table, 1)
    outs = []
    for loc, attn in _query_chunks(_CHUNK_FORWARD // (B * M * weights.shape[3]), locations, weights):
        loc, attn = _cast(loc, dtype), _cast(attn, dtype)
        if stages is None:
            rows, bag_weights, *_ = _careful_bags(loc, attn, levels, zero_row, False)
        else:
            rows, bag_weights, _ = stages.bags(loc, attn, levels, False)
        outs.append(bags.sum_bags(rows, bag_weights, table).view(4, B, -1, M * D).sum(0))
    return _cat(outs, 1)


def _backward(
    stages: Stages | None, grad_out: Tensor, value: Tensor, geometry: bags.Geometry, locations: Tensor, weights: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    """Gradients in the dtype of computation; with stages, None if something is not finite."""
    B, S, M, D = value.shape
    dtype = compute_dtype(value, locations, weights, grad_out)
    grad_value, grads_locations, grads_weights = None, [], []
    per_query = (locations, weights, grad_out.unflatten(2, (M, D)))
    for part in bags.parts_of(geometry, S, 0 if stages is None else _DENSE_TOKENS):
        value_part = _cast(value[:, part.tokens], dtype)
        T, points = value_part.shape[1], part.points
        queries = _CHUNK_BACKWARD // (B * M * sum(part.geometry.num_points))
        if part.dense:
            queries = min(queries, _CHUNK_DENSE // (B * M * T))
        part_locations, part_weights = [], []
        for loc, attn, grad in _query_chunks(queries, *per_query):
            loc, attn = _cast(loc[:, :, :, points], dtype), _cast(attn[..., points], dtype)
            gradients = _careful_gradients if stages is None else functools.partial(_fast_gradients, stages)
            found = gradients(part, loc, attn, _cast(grad, dtype), value_part, needs)
            if found is None:
                return None
            grad_tokens, grad_locations, grad_weights = found
            if grad_tokens is not None:
                if grad_value is None and T == S:
                    grad_value = grad_tokens
                else:
                    grad_value = value.new_zeros(value.shape, dtype=dtype) if grad_value is None else grad_value
                    grad_value[:, part.tokens] += grad_tokens
            part_locations.append(grad_locations)
            part_weights.append(grad_weights)
        grads_locations.append(_cat(part_locations, 1) if needs[1] else None)
        grads_weights.append(_cat(part_weights, 1) if needs[2] else None)
    return (
        grad_value,
        _cat(grads_locations, 3) if needs[1] else None,
        _cat(grads_weights, 3) if needs[2] else None,
    )


def _fast_gradients(stages: Stages, part: bags.Part, locations, attn, grad, value, needs):
    """Gradients of the part's tokens, and of the locations and weights of some queries; None if not all is finite."""
    B, T, M, D = value.shape
    Q = attn.shape[1]
    if part.dense:
        levels = bags.levels_of(part.geometry, (B, Q, M), (M * Q * T, T, Q * T), 1, attn.dtype)
    else:
        levels = bags.levels_of(part.geometry, (B, 1, M), (T * M, 0, 1), M, attn.dtype)
    rows, weights, samples = stages.bags(locations, attn, levels, needs[1])
    if not _is_finite(weights):
        return None
    if part.dense:
        grad_tokens, products = bags.dense_gradients(rows, weights, grad, value, needs)
    else:
        grad_table, products = bags.sorted_gradients(rows, weights, grad, value.reshape(-1, D), needs)
        grad_tokens = None if grad_table is None else grad_table.view(B, T, M, D)
    if products is None:
        return grad_tokens, None, None
    if not _is_finite(products):
        return None
    return grad_tokens, *stages.sample_gradients(samples, attn, products.view(2, 2, *attn.shape))


def _careful_gradients(part: bags.Part, locations, attn, grad, value, needs):
    """As `_fast_gradients`, whatever is finite. The part is not dense."""
    B, S, M, D = value.shape
    levels = bags.levels_of(part.geometry, (B, 1, M), (S * M, 0, 1), M, attn.dtype)
    rows, weights, samples, counted, attn = _careful_bags(locations, attn, levels, B * S * M, needs[1])
    # a sampled product has at most as many columns as the table has rows
    table = _with_zero_rows(value.reshape(-1, D), max(1, attn.shape[3] - B * S * M))
    grad_table, products = bags.sorted_gradients(rows, weights, grad, table, needs)
    grad_tokens = None if grad_table is None else grad_table[: B * S * M].view(B, S, M, D)
    if products is None:
        return grad_tokens, None, None
    products = torch.where(counted, products.view_as(counted), 0)  # a row of zeros times infinity is NaN
    return grad_tokens, *bags.sample_gradients(samples, attn, products)


def _careful_bags(locations: Tensor, attn: Tensor, levels: bags.Levels, zero_row: int, with_slope: bool):
    """`bags.corner_bags`, [2, 2, B, Q, M, K] that count, and the weights that do: what does not is a row of zeros."""
    rows, weights, samples = bags.corner_bags(locations, attn, levels, with_slope)
    counted = bags.counted_corners(locations, levels)
    rows = torch.where(counted.reshape(rows.shape), rows, zero_row)
    weights = torch.where(counted.reshape(weights.shape), weights, 0)
    return rows, weights, samples, counted, torch.where(counted.any(0).any(0), attn, 0)


def _with_zero_rows(table: Tensor, count: int) -> Tensor:
    return torch.cat([table, table.new_zeros(count, table.shape[1])])


def _bounded(locations: Tensor) -> Tensor:
    """Locations that are far off every level, or not finite, moved to where no level is either."""
    return locations.nan_to_num(nan=2.0, posinf=2.0, neginf=-1.0).clamp(-1, 2)


def _spread(grad: Tensor | None, points: list[int], K: int) -> Tensor | None:
    """Gradients of some of the K points [B, Q, M, K, ...] among zeros for the others."""
    if grad is None:
        return None
    spread = grad.new_zeros(*grad.shape[:3], K, *grad.shape[4:])
    spread[:, :, :, points] = grad
    return spread


def _is_finite(tensor: Tensor) -> bool:
    # finite numbers may have an infinite sum: then more care is taken than needed
    total = tensor.sum() if tensor.dtype.itemsize >= 4 else tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to takes a microsecond to find that there is nothing to do
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _query_chunks(queries: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors [B, Q, ...] in runs of that many queries, or of one."""
    if queries >= tensors[0].shape[1]:
        return [tensors]
    return list(zip(*(t.split(max(queries, 1), 1) for t in tensors), strict=True))


def _cat(chunks: list[Tensor], dim: int) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim)


def _as_table(value: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """value as [rows, D], and the rows from one batch, token and head to the next. Copies only if strides force it."""
    _, S, M, D = value.shape
    if value.is_contiguous():
        return value.view(-1, D), (S * M, M, 1)
    if value.stride(3) != 1 or any(stride % D for stride in value.stride()[:3]):
        value = value.contiguous()
    steps = tuple(stride // D for stride in value.stride()[:3])
    rows = 1 + sum((n - 1) * step for n, step in zip(value.shape[:3], steps, strict=True))
    return value.as_strided((rows, D), (D, 1)), steps
