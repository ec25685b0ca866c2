"""The backward kernel of multi-scale deformable attention."""

import triton
import triton.language as tl

from msda_triton.kernels.channels import add_channels, lanes_of_add, lanes_of_load, load_channels, load_rows
from msda_triton.kernels.dtypes import narrow, store_number, store_numbers, widen
from msda_triton.kernels.sample import (
    corner_weights,
    corners,
    load_level,
    load_reference,
    load_sample,
    rows_of_program,
    softmax_of_rows,
)


@triton.jit
def _corner(
    value_ptrs, grad_ptrs, weight, inside, here, grad_out, scale, load, add,
    VEC: tl.constexpr, CHUNKS: tl.constexpr, NEEDS_VALUE: tl.constexpr, NEEDS_SAMPLE: tl.constexpr,
):  # fmt: skip
    """<grad_out, value> of one pixel per row; adds weight * grad_out to the pixel's gradient."""
    dot = tl.zeros_like(weight)
    if NEEDS_SAMPLE:
        _lane, in_row, odd, upper = load
        value = load_channels(value_ptrs, inside[:, None] & in_row, odd, upper, grad_out.dtype, CHUNKS)
        dot = tl.sum(grad_out * value, 1)
    if NEEDS_VALUE:
        if scale is None:
            grad = weight[:, None] * grad_out
        else:
            # a small scale first: the product of two large numbers may be infinite, and no integer is
            grad = weight[:, None] * (grad_out * tl.minimum(scale, 1.0))
            grad = tl.floor(grad * tl.maximum(scale, 1.0) + 0.5).to(tl.int64)
        _lane_add, in_row_add, odd_add, upper_add = add
        add_channels(grad_ptrs, grad, (inside & here)[:, None] & in_row_add, odd_add, upper_add, VEC, CHUNKS)
    return dot


@triton.jit
def _zeros(BLOCK_Q: tl.constexpr, ACC: tl.constexpr):
    """Four sums of a row each."""
    zeros = tl.zeros((BLOCK_Q,), ACC)
    return zeros, zeros, zeros, zeros


@triton.jit(do_not_specialize=["S", "Q", "stride_vb", "stride_vm"])
def _msda_bwd_kernel(
    value_ptr, shapes_ptr, starts_ptr, num_points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr,
    grad_out_ptr, grad_value_ptr, scale_ptr, grad_loc_ptr, grad_attn_ptr, grad_ref_ptr,
    S, Q, stride_vb, stride_vm, STRIDE_VS: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Gradients of out[b, q, m] = sum_l sum_p attn[b, q, m, l, p] * bilinear(value_l[b, m], loc[b, q, m, l, p]).

    A program has BLOCK_Q queries of one head and image. A null grad_*_ptr is a gradient that nobody asked for. With
    scale_ptr, grad_value is summed as integers in units of 1 / scale: such a sum does not depend on its order.
    """
    LANES: tl.constexpr = BLOCK_D // (VEC * CHUNKS)
    b, m, first, query, here = rows_of_program(shapes_ptr, Q, L, BLOCK_Q, BLOCK_W, 1)
    loc_row = (first * M + m) * (2 * K) + query * (M * 2 * K)
    attn_row = (first * M + m) * K + query * (M * K)
    ref_ptr = None if REF_DIM == 0 else ref_ptr + (first + query) * (REF_L * REF_DIM)
    softmax = softmax_of_rows(attn_ptr + attn_row, ACC, K, BLOCK_K, REF_DIM > 0)
    load = lanes_of_load(value_ptr, BLOCK_Q, D, BLOCK_D, CHUNKS, ROTATE)
    add = lanes_of_add(BLOCK_Q, D, BLOCK_D, VEC, CHUNKS, ROTATE)
    grad_out = load_rows(grad_out_ptr, (first * M + m) * D, query * (M * D), here, ACC, D, BLOCK_D, CHUNKS, ROTATE)
    grad_value_ptr = None if grad_value_ptr is None else grad_value_ptr + (b * S * M + m) * D
    scale = None if scale_ptr is None else tl.load(scale_ptr + b * M + m)
    grad_weights = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    k, end = 0, 0
    for l in range(L):
        H, W, down, start, end, num_points = load_level(shapes_ptr, starts_ptr, num_points_ptr, l, end, S, P, ACC)
        ref = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        hidden_ptr = None if mask_ptr is None else mask_ptr + (b * S + start)
        level_ptr = value_ptr + (b * stride_vb + m * stride_vm) * STRIDE_UNIT + start.to(tl.int64) * STRIDE_VS + load[0]
        grad_level_ptr = (0 if grad_value_ptr is None else grad_value_ptr + start.to(tl.int64) * (M * D)) + add[0]
        sum_x, sum_y, sum_w, sum_h = _zeros(BLOCK_Q, ACC)
        for p in tl.range(0, num_points, loop_unroll_factor=UNROLL):
            x, y, attn, u, v = load_sample(
                loc_ptr + loc_row + 2 * (k + p), attn_ptr + attn_row + k + p, 0, ref, softmax, H, W, ACC, REF_DIM, 0
            )
            token, taken, attn, fx, fy, in00, in01, in10, in11 = corners(x, y, attn, H, W, hidden_ptr)
            w0, w01, w1, w11 = corner_weights(attn, fx, fy)
            top = level_ptr + (token.to(tl.int64) * STRIDE_VS)[:, None]
            bottom = top + down * STRIDE_VS
            grad_top = grad_level_ptr + (token.to(tl.int64) * (M * D))[:, None]
            grad_bottom = grad_top + down * (M * D)
            NEEDS_SAMPLE: tl.constexpr = grad_loc_ptr is not None or grad_attn_ptr is not None
            g00 = _corner(
                top, grad_top, w0 - w01, in00, here, grad_out, scale, load, add,
                VEC, CHUNKS, grad_value_ptr is not None, NEEDS_SAMPLE,
            )  # fmt: skip
            g01 = _corner(
                top + STRIDE_VS, grad_top + M * D, w01, in01, here, grad_out, scale, load, add,
                VEC, CHUNKS, grad_value_ptr is not None, NEEDS_SAMPLE,
            )  # fmt: skip
            g10 = _corner(
                bottom, grad_bottom, w1 - w11, in10, here, grad_out, scale, load, add,
                VEC, CHUNKS, grad_value_ptr is not None, NEEDS_SAMPLE,
            )  # fmt: skip
            g11 = _corner(
                bottom + STRIDE_VS, grad_bottom + M * D, w11, in11, here, grad_out, scale, load, add,
                VEC, CHUNKS, grad_value_ptr is not None, NEEDS_SAMPLE,
            )  # fmt: skip
            if NEEDS_SAMPLE:
                g_top = g00 + fx * (g01 - g00)
                g_bottom = g10 + fx * (g11 - g10)
                if grad_attn_ptr is not None:
                    grad_weight = tl.where(taken, g_top + fy * (g_bottom - g_top), 0.0)
                    if REF_DIM > 0:
                        column = tl.arange(0, BLOCK_K)[None, :]
                        grad_weights = tl.where(column == k + p, grad_weight[:, None], grad_weights)
                    else:
                        store_number(grad_attn_ptr + attn_row + k + p, grad_weight, here, LANES)
                if grad_loc_ptr is not None:
                    grad_ptr = grad_loc_ptr + loc_row + 2 * (k + p)
                    # of the pixel coordinate; grad_out may be infinite where no sample is taken
                    grad_x = tl.where(taken, attn * ((g01 - g00) + fy * ((g11 - g10) - (g01 - g00))), 0.0)
                    grad_y = tl.where(taken, attn * (g_bottom - g_top), 0.0)
                    if REF_DIM == 2:
                        store_numbers(grad_ptr, grad_x, grad_y, here, LANES)
                    grad_x *= W
                    grad_y *= H
                    if REF_DIM == 0:
                        store_numbers(grad_ptr, grad_x, grad_y, here, LANES)
                    if REF_DIM == 4:
                        _x, _y, step_x, step_y = ref
                        # the offset or the side of a sample that is not taken may be infinite
                        grad_u = tl.where(taken, grad_x * step_x, 0.0)
                        grad_v = tl.where(taken, grad_y * step_y, 0.0)
                        store_numbers(grad_ptr, grad_u, grad_v, here, LANES)
                        sum_w += tl.where(taken, grad_x * u, 0.0)
                        sum_h += tl.where(taken, grad_y * v, 0.0)
                    sum_x += grad_x
                    sum_y += grad_y
        if grad_ref_ptr is not None:
            grad_ptr = grad_ref_ptr + ((first + query) * M + m) * (L * REF_DIM) + l * REF_DIM
            store_number(grad_ptr, sum_x, here, LANES)
            store_number(grad_ptr + 1, sum_y, here, LANES)
            if REF_DIM == 4:
                store_number(grad_ptr + 2, sum_w * 0.5 / num_points, here, LANES)
                store_number(grad_ptr + 3, sum_h * 0.5 / num_points, here, LANES)
        k += num_points

    if REF_DIM > 0 and grad_attn_ptr is not None:
        # softmax: grad_logit = attn * (grad_attn - sum_j attn_j grad_attn_j)
        row_max, row_scale = softmax
        column = tl.arange(0, BLOCK_K)[None, :]
        in_row_k = here[:, None] & (column < K)
        logits = widen(tl.load((attn_ptr + attn_row)[:, None] + column, mask=in_row_k, other=-float("inf")), ACC)
        attn = tl.exp(logits - row_max[:, None]) * row_scale[:, None]
        grad_logits = attn * (grad_weights - tl.sum(attn * grad_weights, 1)[:, None])
        tl.store((grad_attn_ptr + attn_row)[:, None] + column, narrow(grad_logits, grad_attn_ptr), mask=in_row_k)
