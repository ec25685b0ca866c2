"""The forward kernel of multi-scale deformable attention."""

import triton
import triton.language as tl

from msda_triton.kernels.channels import lanes_of_load, load_channels, store_rows
from msda_triton.kernels.sample import (
    corner_weights,
    corners,
    load_level,
    load_reference,
    load_sample,
    rows_of_program,
    softmax_of_rows,
)


@triton.jit(do_not_specialize=["S", "Q", "stride_vb", "stride_vm"])
def _msda_fwd_kernel(
    value_ptr, shapes_ptr, starts_ptr, num_points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr, out_ptr,
    S, Q, stride_vb, stride_vm, STRIDE_VS: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
    SHARE: tl.constexpr, PAIRS: tl.constexpr, ROTATE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """out[b, q, m] = sum_l sum_p attn[b, q, m, l, p] * bilinear(value_l[b, m], loc[b, q, m, l, p]).

    With REF_DIM 2 or 4, loc holds offsets from a reference point or box, and attn logits of a softmax over l and p.
    A program has BLOCK_Q queries of one head and image. Of a query's SHARE rows, row r takes points r, r + SHARE, ...
    Rows take the points of a level in TURN different orders: those of a warp are at different places of their cache
    lines, which are otherwise the same.
    """
    b, m, first, query, _here = rows_of_program(shapes_ptr, Q, L, BLOCK_Q, BLOCK_W, SHARE)
    loc_ptr += (first * M + m) * (2 * K) + query * (M * 2 * K)
    attn_ptr += (first * M + m) * K + query * (M * K)
    ref_ptr = None if REF_DIM == 0 else ref_ptr + (first + query) * (REF_L * REF_DIM)
    softmax = softmax_of_rows(attn_ptr, ACC, K, BLOCK_K, REF_DIM > 0)
    # from here on the pointers are those of a row's first point
    loc_ptr += 2 * (tl.arange(0, BLOCK_Q * SHARE) % SHARE)
    attn_ptr += tl.arange(0, BLOCK_Q * SHARE) % SHARE
    value_ptr += (b * stride_vb + m * stride_vm) * STRIDE_UNIT
    lane, in_row, odd, upper = lanes_of_load(value_ptr, BLOCK_Q * SHARE, D, BLOCK_D, CHUNKS, ROTATE)
    out = tl.zeros((BLOCK_Q * SHARE, BLOCK_D), ACC)
    k, end = 0, 0
    for l in range(L):
        H, W, down, start, end, num_points = load_level(shapes_ptr, starts_ptr, num_points_ptr, l, end, S, P, ACC)
        ref = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        hidden_ptr = None if mask_ptr is None else mask_ptr + (b * S + start)
        level_ptr = value_ptr + start.to(tl.int64) * STRIDE_VS + lane
        GROUP: tl.constexpr = 2 if PAIRS == 2 else 1  # points of a row in a round
        turn = tl.arange(0, BLOCK_Q * SHARE) % TURN * GROUP
        for p in tl.range(0, num_points, SHARE * GROUP, loop_unroll_factor=UNROLL):
            for i in tl.static_range(GROUP):
                point = k + p if TURN == 1 else k + (p ^ turn)
                x, y, attn, _u, _v = load_sample(
                    loc_ptr + 2 * point, attn_ptr + point, i, ref, softmax, H, W, ACC, REF_DIM, PAIRS
                )
                token, _taken, attn, fx, fy, in00, in01, in10, in11 = corners(x, y, attn, H, W, hidden_ptr)
                w0, w01, w1, w11 = corner_weights(attn, fx, fy)
                top = level_ptr + (token.to(tl.int64) * STRIDE_VS)[:, None]
                bottom = top + down * STRIDE_VS
                # in this order of loads and sums nothing spills (benchmarks/NOTES.md)
                v00 = load_channels(top, in00[:, None] & in_row, odd, upper, ACC, CHUNKS)
                out += (w0 - w01)[:, None] * v00
                v01 = load_channels(top + STRIDE_VS, in01[:, None] & in_row, odd, upper, ACC, CHUNKS)
                v10 = load_channels(bottom, in10[:, None] & in_row, odd, upper, ACC, CHUNKS)
                v11 = load_channels(bottom + STRIDE_VS, in11[:, None] & in_row, odd, upper, ACC, CHUNKS)
                out += w01[:, None] * v01
                out += (w1 - w11)[:, None] * v10
                out += w11[:, None] * v11
        k += num_points

    if SHARE > 1:
        out = tl.sum(tl.reshape(out, (BLOCK_Q, SHARE, BLOCK_D)), 1)
    # a row for each query is left; a sum of SHARE rows has no chunks. With SHARE 1 these are the rows of above
    _b, _m, _first, query, here = rows_of_program(shapes_ptr, Q, L, BLOCK_Q, BLOCK_W, 1)
    C: tl.constexpr = CHUNKS if SHARE == 1 else 1
    store_rows(out_ptr, (first * M + m) * D, query * (M * D), out, here, D, BLOCK_D, C, ROTATE)
