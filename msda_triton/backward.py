"""Backward kernel of multi-scale deformable attention, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msda_triton.bilinear import (
    add_offsets,
    add_pixel,
    as_weight,
    corners,
    load_level,
    load_offsets,
    load_pixel,
    load_reference,
    narrow,
    queries,
    rectangle_of_program,
    softmax_rows,
    to_pixel,
    unmasked,
    widen,
)
from msda_triton.fixed_point import fixed_point_scale
from msda_triton.launch import MAX_BATCH, batches, grid, joined, kernel_arguments
from msda_triton.tuning import launch


@triton.jit
def _store_row(ptr, x, mask_q, LANES: tl.constexpr):
    """Store [BLOCK_Q], as columns of which the first is written: x keeps its layout and shared memory stays unused."""
    lane = tl.arange(0, LANES)[None, :]
    mask = mask_q[:, None] & (lane == 0)
    tl.store(ptr[:, None] + lane, narrow(tl.broadcast_to(x[:, None], [x.shape[0], LANES]), ptr), mask=mask)


@triton.jit
def _store_pair(ptr, x, y, mask_q, LANES: tl.constexpr):
    """Store x [BLOCK_Q] at ptr and y behind it: in one store if they are float32, at a multiple of 8 bytes then."""
    if ptr.dtype.element_ty == tl.float32:
        low = narrow(x, ptr).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        word = (narrow(y, ptr).to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        _store_row(ptr.to(tl.pointer_type(tl.int64), bitcast=True), word, mask_q, LANES)
    else:
        _store_row(ptr, x, mask_q, LANES)
        _store_row(ptr + 1, y, mask_q, LANES)


@triton.jit
def _backward_pixel(
    value_ptrs, grad_ptrs, weight, grad_out, inside, scale, d, mask_d, d_add, mask_add, mask_q,
    D: tl.constexpr, PACK: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_SAMPLE: tl.constexpr,
):  # fmt: skip
    """<grad_out, value> of one pixel per row [BLOCK_Q]; adds weight * grad_out to the pixel's gradient."""
    dot = tl.zeros_like(weight)
    if NEEDS_SAMPLE:
        v = load_pixel(value_ptrs, inside[:, None] & mask_d, grad_out.dtype, D, PACK, CHUNKS)
        dot = tl.sum(grad_out * v, 1)
    if NEEDS_VALUE:
        grad = weight[:, None] * grad_out
        if scale is not None:
            grad = tl.floor(grad * scale + 0.5).to(tl.int64)
        add_pixel(grad_ptrs, grad, (inside & mask_q)[:, None] & mask_add, D, VEC, CHUNKS)
    return dot


@triton.jit(do_not_specialize=["S", "Q", "q_bucket"])
def _msda_bwd_kernel(
    value_ptr, shapes_ptr, starts_ptr, points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr,
    grad_out_ptr, grad_value_ptr, scale_ptr, grad_loc_ptr, grad_attn_ptr, grad_ref_ptr,
    S, Q, stride_vb, stride_vm, q_bucket,
    STRIDE_VS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, PACK: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PIXELS: tl.constexpr,
    TILE: tl.constexpr, LANE_D: tl.constexpr, UNROLL: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Gradients of out[b, q, m] = sum_l sum_p attn[b, q, m, l, p] * bilinear(value_l[b, m], loc[b, q, m, l, p]).

    A null grad_*_ptr is a gradient that nobody asked for. With scale_ptr, grad_value is summed as integers in units of
    1 / scale, and such a sum does not depend on its order.
    """
    NEEDS_VALUE: tl.constexpr = grad_value_ptr is not None
    NEEDS_SAMPLE: tl.constexpr = grad_loc_ptr is not None or grad_attn_ptr is not None
    # before Triton 3.6 min and max of constants are tensors, and before 3.4 only two conditions may be joined
    LANE: tl.constexpr = LANE_D if LANE_D < D else D
    CHUNKS: tl.constexpr = LANE // VEC if (VEC > 0 and D == BLOCK_D) and LANE > VEC else 1
    LANES: tl.constexpr = BLOCK_D // (VEC * CHUNKS) if VEC > 0 else BLOCK_D
    # one program: BLOCK_Q queries of one head and image; rows without a query repeat another and are not stored
    FIT: tl.constexpr = TILE // (BLOCK_D if VEC > 0 else 8 * BLOCK_D)
    BLOCK_Q: tl.constexpr = 1 if FIT < 1 else (FIT if FIT < 128 else 128)
    WIDTH: tl.constexpr = (TILE_W if TILE_W < BLOCK_Q else BLOCK_Q) if PIXELS else 0
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q0, tile_H, tile_W, tile_y, tile_x = rectangle_of_program(shapes_ptr, Q, L, BLOCK_Q, WIDTH)
    row0 = b * Q + q0  # of [B, Q]
    row, mask_q = queries(tl.arange(0, BLOCK_Q), tile_H, tile_W, tile_y, tile_x, WIDTH)
    loc_offset = (row0 * M + m) * (2 * K) + row * (M * 2 * K)
    attn_offset = (row0 * M + m) * K + row * (M * K)
    loc_ptr += loc_offset
    attn_ptr += attn_offset
    if grad_loc_ptr is not None:
        grad_loc_ptr += loc_offset
    d, mask_d = load_offsets(D, BLOCK_D, PACK, CHUNKS)
    d_add, mask_add = add_offsets(D, BLOCK_D, VEC, CHUNKS)
    value_ptr += b * stride_vb + m * stride_vm
    scale = None
    if NEEDS_VALUE:
        grad_value_ptr += (b * S * M + m) * D
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + b * M + m)
    row_max = 0.0
    row_scale = 1.0
    if REF_DIM > 0:
        row_max, row_scale = softmax_rows(attn_ptr, ACC, K, BLOCK_K)
        ref_ptr += (row0 + row) * (REF_L * REF_DIM)
    if mask_ptr is not None:
        mask_ptr += b * S
    d_out, mask_out = load_offsets(D, BLOCK_D, 1, CHUNKS)
    grad_out_ptr += (row0 * M + m) * D + (row * (M * D))[:, None] + d_out
    grad_out = load_pixel(grad_out_ptr, mask_q[:, None] & mask_out, ACC, D, 1, CHUNKS)

    cols = tl.arange(0, BLOCK_K)[None, :]
    grad_weights = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    k = 0
    next_start = 0
    for l in range(L):
        H, W, start, next_start = load_level(shapes_ptr, starts_ptr, l, next_start, S)
        num_points = P if points_ptr is None else tl.load(points_ptr + l)
        ref_x, ref_y, step_x, step_y = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        level_ptr = value_ptr + start.to(tl.int64) * STRIDE_VS + d
        mask_level_ptr = None if mask_ptr is None else mask_ptr + start
        below = W.to(tl.int64) * STRIDE_VS
        grad_level_ptr = d_add
        if NEEDS_VALUE:
            grad_level_ptr = grad_value_ptr + start.to(tl.int64) * (M * D) + d_add
        grad_below = W.to(tl.int64) * (M * D)
        H = H.to(ACC)
        W = W.to(ACC)
        sum_x = tl.zeros((BLOCK_Q,), ACC)
        sum_y = tl.zeros((BLOCK_Q,), ACC)
        sum_w = tl.zeros((BLOCK_Q,), ACC)
        sum_h = tl.zeros((BLOCK_Q,), ACC)
        for p in tl.range(num_points, loop_unroll_factor=UNROLL):
            u = widen(tl.load(loc_ptr + 2 * (k + p)), ACC)
            v = widen(tl.load(loc_ptr + 2 * (k + p) + 1), ACC)
            x = to_pixel(u, ref_x, step_x, W, REF_DIM)
            y = to_pixel(v, ref_y, step_y, H, REF_DIM)
            attn = as_weight(widen(tl.load(attn_ptr + k + p), ACC), row_max, row_scale, REF_DIM > 0)
            fx, fy, taken, attn, token, in00, in01, in10, in11 = corners(x, y, attn, H, W)
            in00 = unmasked(in00, mask_level_ptr, token)
            in01 = unmasked(in01, mask_level_ptr, token + 1)
            in10 = unmasked(in10, mask_level_ptr, token + W.to(tl.int32))
            in11 = unmasked(in11, mask_level_ptr, token + W.to(tl.int32) + 1)
            w1 = attn * fy
            w0 = attn - w1
            w01 = w0 * fx
            w11 = w1 * fx
            top = level_ptr + (token.to(tl.int64) * STRIDE_VS)[:, None]
            bottom = top + below
            grad_top = grad_level_ptr + (token.to(tl.int64) * (M * D))[:, None]
            grad_bottom = grad_top + grad_below
            g00 = _backward_pixel(
                top, grad_top, w0 - w01, grad_out, in00, scale, d, mask_d, d_add, mask_add, mask_q,
                D, PACK, VEC, CHUNKS, NEEDS_VALUE, NEEDS_SAMPLE,
            )  # fmt: skip
            g01 = _backward_pixel(
                top + STRIDE_VS, grad_top + M * D, w01, grad_out, in01, scale, d, mask_d, d_add, mask_add, mask_q,
                D, PACK, VEC, CHUNKS, NEEDS_VALUE, NEEDS_SAMPLE,
            )  # fmt: skip
            g10 = _backward_pixel(
                bottom, grad_bottom, w1 - w11, grad_out, in10, scale, d, mask_d, d_add, mask_add, mask_q,
                D, PACK, VEC, CHUNKS, NEEDS_VALUE, NEEDS_SAMPLE,
            )  # fmt: skip
            g11 = _backward_pixel(
                bottom + STRIDE_VS, grad_bottom + M * D, w11, grad_out, in11, scale, d, mask_d, d_add, mask_add, mask_q,
                D, PACK, VEC, CHUNKS, NEEDS_VALUE, NEEDS_SAMPLE,
            )  # fmt: skip
            if NEEDS_SAMPLE:
                g_top = g00 + fx * (g01 - g00)
                g_bottom = g10 + fx * (g11 - g10)
                if grad_attn_ptr is not None:
                    grad_weight = tl.where(taken, g_top + fy * (g_bottom - g_top), 0.0)
                    if REF_DIM > 0:
                        grad_weights = tl.where(cols == k + p, grad_weight[:, None], grad_weights)
                    else:
                        _store_row(grad_attn_ptr + attn_offset + k + p, grad_weight, mask_q, LANES)
                if grad_loc_ptr is not None:
                    # of the pixel coordinate; grad_out may be infinite where no sample is taken
                    grad_x = tl.where(taken, attn * ((g01 - g00) + fy * ((g11 - g10) - (g01 - g00))), 0.0)
                    grad_y = tl.where(taken, attn * (g_bottom - g_top), 0.0)
                    if REF_DIM == 2:
                        _store_pair(grad_loc_ptr + 2 * (k + p), grad_x, grad_y, mask_q, LANES)
                    grad_x *= W
                    grad_y *= H
                    if REF_DIM == 0:
                        _store_pair(grad_loc_ptr + 2 * (k + p), grad_x, grad_y, mask_q, LANES)
                    if REF_DIM == 4:
                        # the offset or the side of a sample that is not taken may be infinite
                        grad_u = tl.where(taken, grad_x * step_x, 0.0)
                        grad_v = tl.where(taken, grad_y * step_y, 0.0)
                        _store_pair(grad_loc_ptr + 2 * (k + p), grad_u, grad_v, mask_q, LANES)
                        sum_w += tl.where(taken, grad_x * u, 0.0)
                        sum_h += tl.where(taken, grad_y * v, 0.0)
                    sum_x += grad_x
                    sum_y += grad_y
        if grad_ref_ptr is not None:
            grad_ref_level_ptr = grad_ref_ptr + ((row0 + row) * M + m) * (L * REF_DIM) + l * REF_DIM
            _store_row(grad_ref_level_ptr, sum_x, mask_q, LANES)
            _store_row(grad_ref_level_ptr + 1, sum_y, mask_q, LANES)
            if REF_DIM == 4:
                _store_row(grad_ref_level_ptr + 2, sum_w * 0.5 / num_points, mask_q, LANES)
                _store_row(grad_ref_level_ptr + 3, sum_h * 0.5 / num_points, mask_q, LANES)
        k += num_points

    if REF_DIM > 0 and grad_attn_ptr is not None:
        # softmax: grad_logit = attn * (grad_attn - sum_j attn_j grad_attn_j)
        mask_k = mask_q[:, None] & (cols < K)
        logits = widen(tl.load(attn_ptr[:, None] + cols, mask=mask_k, other=-float("inf")), ACC)
        attn = tl.exp(logits - row_max[:, None]) * row_scale[:, None]
        grad_logits = attn * (grad_weights - tl.sum(attn * grad_weights, 1)[:, None])
        tl.store((grad_attn_ptr + attn_offset)[:, None] + cols, narrow(grad_logits, grad_attn_ptr), mask=mask_k)


def launch_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    num_points: list[int],
    reference_points: Tensor | None,
    value_mask: Tensor | None,
    query_sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, locations, weights and reference points in their dtypes; None for those not asked for."""
    needs_value, needs_locations, needs_weights, needs_reference = needs
    B, S, M, D = value.shape
    Q = weights.shape[1]
    if B > MAX_BATCH:
        sizes = spatial_shapes, level_start_index
        grads = [
            launch_backward(g, v, *sizes, x, w, num_points, reference, mask, query_sizes, needs)
            for g, v, x, w, reference, mask in batches(
                grad_out, value, locations, weights, reference_points, value_mask
            )
        ]
        return tuple(None if parts[0] is None else joined(parts) for parts in zip(*grads, strict=True))
    arguments = kernel_arguments(
        value, spatial_shapes, level_start_index, locations, weights, num_points, reference_points, value_mask,
        query_sizes,
    )  # fmt: skip
    if grad_out.dtype == torch.float64:
        arguments["ACC"] = tl.float64
    acc = torch.float64 if arguments["ACC"] == tl.float64 else torch.float32
    grad_out = grad_out.contiguous()

    grad_value = scale = grad_locations = grad_weights = grad_reference = None
    if needs_value:
        deterministic = torch.are_deterministic_algorithms_enabled()
        if deterministic:
            arguments["VEC"] = 0  # integers are added one by one
            scale = fixed_point_scale(arguments, grad_out) if B * Q * M else None
        grad_value = torch.zeros(B, S, M, D, dtype=torch.int64 if deterministic else acc, device=value.device)
    if needs_locations or needs_reference:
        grad_locations = torch.empty(locations.shape, dtype=locations.dtype, device=value.device)
    if needs_weights:
        grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=value.device)
    if needs_reference:
        shape = (B, Q, M, len(num_points), reference_points.shape[-1])
        grad_reference = torch.empty(shape, dtype=acc, device=value.device)
    if B * Q * M:
        arguments |= {
            "grad_out_ptr": grad_out,
            "grad_value_ptr": grad_value,
            "scale_ptr": scale,
            "grad_loc_ptr": grad_locations,
            "grad_attn_ptr": grad_weights,
            "grad_ref_ptr": grad_reference,
        }
        launch("backward", _msda_bwd_kernel, grid(B, Q, M, query_sizes), B * Q * M, arguments)
    if scale is not None:
        grad_value = grad_value.to(acc) / scale.view(B, 1, M, 1)
    if needs_value:
        grad_value = grad_value.to(value.dtype)
    if needs_reference:
        grad_reference = grad_reference.sum(2)
        if reference_points.shape[2] == 1:
            grad_reference = grad_reference.sum(2, keepdim=True)
        grad_reference = grad_reference.to(reference_points.dtype)
    return grad_value, grad_locations if needs_locations else None, grad_weights, grad_reference
