"""The operator in eager PyTorch for CPUs, forward and backward: `reference.py`'s formula without its big temporaries.

How it computes is in `bags.py`. There a pixel outside its level counts with weight zero, which is exact as long as
everything is finite: calls with NaN or infinity in them, with levels that do not fit, of other methods and on other
devices go to `reference.py`. Legend: see there.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msda_triton import bags
from msda_triton.reference import compute_dtype, ms_deform_attn_reference

# Samples (b, q, m, k) at a time: bounds the memory, and lets temporaries stay in a CPU's cache.
_CHUNK_FORWARD = 1 << 16
_CHUNK_BACKWARD = 1 << 19
_CHUNK_DENSE = 1 << 20  # numbers of a dense matrix


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
    B, S, M, D = value.shape
    dtype = compute_dtype(value, sampling_locations, attention_weights)
    geometry = None
    if _is_usual(value, sampling_locations, attention_weights, method):
        geometry = bags.geometry_of(spatial_shapes, level_start_index, num_points, S)
    if geometry is None:
        return ms_deform_attn_reference(*inputs)
    table, (batch, token, head) = _as_table(_cast(value, dtype))
    levels = bags.levels_of(geometry, (B, 1, M), (batch, 0, head), token, dtype)
    queries = _CHUNK_FORWARD // (B * M * sum(num_points))
    outs = []
    for locations, attn in _query_chunks(queries, sampling_locations, attention_weights):
        rows, weights, _ = stages.bags(_cast(locations, dtype), _cast(attn, dtype), levels, False)
        outs.append(bags.sum_bags(rows, weights, table).view(4, B, -1, M * D).sum(0))
    out = _cat(outs, 1)
    return _cast(out, value.dtype) if _is_finite(out) else ms_deform_attn_reference(*inputs)


def run_backward(
    stages: Stages, grad_out, value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    num_points, method, needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method)
    B, S, M, D = value.shape
    dtype = compute_dtype(value, sampling_locations, attention_weights)
    geometry = None
    if _is_usual(value, sampling_locations, attention_weights, method) and _is_finite(grad_out):
        geometry = bags.geometry_of(spatial_shapes, level_start_index, num_points, S)
    if geometry is None:
        return _reference_backward(grad_out, inputs, needs)
    grad_value, grads_locations, grads_weights = None, [], []
    per_query = (sampling_locations, attention_weights, grad_out.unflatten(2, (M, D)))
    for part in bags.parts_of(geometry, S):
        value_part = _cast(value[:, part.tokens], dtype)
        T, points = value_part.shape[1], part.points
        queries = _CHUNK_BACKWARD // (B * M * sum(part.geometry.num_points))
        if part.dense:
            queries = min(queries, _CHUNK_DENSE // (B * M * T))
        part_locations, part_weights = [], []
        for locations, attn, grad in _query_chunks(queries, *per_query):
            locations, attn = _cast(locations[:, :, :, points], dtype), _cast(attn[..., points], dtype)
            grad = _cast(grad, dtype)
            if part.dense:
                Q = attn.shape[1]
                levels = bags.levels_of(part.geometry, (B, Q, M), (M * Q * T, T, Q * T), 1, dtype)
            else:
                levels = bags.levels_of(part.geometry, (B, 1, M), (S * M, 0, 1), M, dtype)
            rows, weights, samples = stages.bags(locations, attn, levels, needs[1])
            if not _is_finite(weights):
                return _reference_backward(grad_out, inputs, needs)
            gradients = bags.dense_gradients if part.dense else bags.sorted_gradients
            grad_tokens, products = gradients(rows, weights, grad, value_part, needs)
            if grad_tokens is not None:
                if grad_value is None and T == S:
                    grad_value = grad_tokens
                else:
                    grad_value = value.new_zeros(value.shape, dtype=dtype) if grad_value is None else grad_value
                    grad_value[:, part.tokens] += grad_tokens
            if products is not None:
                if not _is_finite(products):
                    return _reference_backward(grad_out, inputs, needs)
                grads = stages.sample_gradients(samples, attn, products.view(2, 2, *attn.shape))
                part_locations.append(grads[0])
                part_weights.append(grads[1])
        if part_weights:
            grads_locations.append(_cat(part_locations, 1) if needs[1] else None)
            grads_weights.append(_cat(part_weights, 1))
    return (
        grad_value.to(value.dtype).contiguous() if needs[0] else None,
        _cat(grads_locations, 3).to(sampling_locations.dtype) if needs[1] else None,
        _cat(grads_weights, 3).to(attention_weights.dtype) if needs[2] else None,
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


_EAGER = Stages(bags.corner_bags, bags.sample_gradients)


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
