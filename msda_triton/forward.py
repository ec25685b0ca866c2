"""Forward kernel of multi-scale deformable attention, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msda_triton.bilinear import (
    as_weight,
    corners,
    load_level,
    load_offsets,
    load_pixel,
    load_reference,
    queries,
    rectangle_of_program,
    softmax_rows,
    store_row,
    to_pixel,
    unmasked,
    widen,
)
from msda_triton.launch import MAX_BATCH, batches, grid, joined, kernel_arguments
from msda_triton.tuning import launch


@triton.jit
def _load_pair(ptr, PAIR: tl.constexpr):
    """With PAIR two neighbouring numbers per row as one integer, at a multiple of its size; else one number."""
    if not PAIR:
        return tl.load(ptr)
    elif ptr.dtype.element_ty == tl.float32:
        return tl.load(ptr.to(tl.pointer_type(tl.int64), bitcast=True))
    else:
        return tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def _number(pair, i: tl.constexpr, ptr, ACC: tl.constexpr, PAIR: tl.constexpr):
    """The i-th of the numbers that `_load_pair` loaded from ptr."""
    if not PAIR:
        return widen(pair, ACC)
    elif ptr.dtype.element_ty == tl.float32:
        return (pair >> 32 * i).to(tl.int32).to(tl.float32, bitcast=True).to(ACC)
    else:
        return widen((pair >> 16 * i).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True), ACC)


@triton.jit
def _load_location(loc_ptr, ACC: tl.constexpr, PAIR: tl.constexpr):
    """x and y of one sample per row."""
    if PAIR and loc_ptr.dtype.element_ty != tl.float64:
        pair = _load_pair(loc_ptr, True)
        return _number(pair, 0, loc_ptr, ACC, True), _number(pair, 1, loc_ptr, ACC, True)
    else:
        return widen(tl.load(loc_ptr), ACC), widen(tl.load(loc_ptr + 1), ACC)


@triton.jit(do_not_specialize=["S", "Q", "q_bucket"])
def _msda_fwd_kernel(
    value_ptr, shapes_ptr, starts_ptr, points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr, out_ptr,
    S, Q, stride_vb, stride_vm, q_bucket,
    STRIDE_VS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, PACK: tl.constexpr,
    VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PIXELS: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, LANE_D: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """out[b, q, m] = sum_l sum_p attn[b, q, m, l, p] * bilinear(value_l[b, m], loc[b, q, m, l, p]).

    With REF_DIM 2 or 4, loc holds offsets from a reference point or box, and attn logits of a softmax over l and p.
    """
    # one program: BLOCK_Q queries of one head and image; rows without a query repeat another and are not stored
    # before Triton 3.6 min and max of constants are tensors, and before 3.4 only two conditions may be joined
    LANE: tl.constexpr = LANE_D if LANE_D < D else D
    CHUNKS: tl.constexpr = LANE // VEC if (VEC > 0 and D == BLOCK_D) and LANE > VEC else 1
    # SHARE rows share a query, and each takes every SHARE-th point of a level
    SHARE: tl.constexpr = SPLIT if P > 0 and P % SPLIT == 0 else 1
    FIT: tl.constexpr = TILE // (BLOCK_D if VEC > 0 else 8 * BLOCK_D)
    ROWS: tl.constexpr = SHARE if FIT < SHARE else (FIT if FIT < 128 else 128)
    BLOCK_Q: tl.constexpr = ROWS // SHARE
    # two neighbouring numbers are one load; the other kernels would pass them through shared memory, or spill
    PAIRS: tl.constexpr = ALIGNED and (REF_DIM == 0 and P > 0)
    NARROW: tl.constexpr = attn_ptr.dtype.element_ty != tl.float64
    GROUP: tl.constexpr = 2 if (PAIRS and NARROW) and (SHARE == 1 and UNROLL % 2 + P % 2 == 0) else 1
    WIDTH: tl.constexpr = (TILE_W if TILE_W < BLOCK_Q else BLOCK_Q) if PIXELS else 0
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q0, tile_H, tile_W, tile_y, tile_x = rectangle_of_program(shapes_ptr, Q, L, BLOCK_Q, WIDTH)
    row0 = b * Q + q0  # of [B, Q]
    row, _ = queries(tl.arange(0, ROWS) // SHARE, tile_H, tile_W, tile_y, tile_x, WIDTH)
    first = tl.arange(0, ROWS) % SHARE
    loc_ptr += (row0 * M + m) * (2 * K) + row * (M * 2 * K)
    attn_ptr += (row0 * M + m) * K + row * (M * K)
    d, mask_d = load_offsets(D, BLOCK_D, PACK, CHUNKS)
    value_ptr += b * stride_vb + m * stride_vm
    row_max = 0.0
    row_scale = 1.0
    if REF_DIM > 0:
        row_max, row_scale = softmax_rows(attn_ptr, ACC, K, BLOCK_K)
        ref_ptr += (row0 + row) * (REF_L * REF_DIM)
    loc_ptr += 2 * first
    attn_ptr += first
    if mask_ptr is not None:
        mask_ptr += b * S

    out = tl.zeros((ROWS, BLOCK_D), ACC)
    k = 0
    next_start = 0
    for l in range(L):
        H, W, start, next_start = load_level(shapes_ptr, starts_ptr, l, next_start, S)
        num_points = P if points_ptr is None else tl.load(points_ptr + l)
        ref_x, ref_y, step_x, step_y = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        level_ptr = value_ptr + start.to(tl.int64) * STRIDE_VS + d
        mask_level_ptr = None if mask_ptr is None else mask_ptr + start
        below = W.to(tl.int64) * STRIDE_VS
        H = H.to(ACC)
        W = W.to(ACC)
        for p in tl.range(0, num_points, SHARE * GROUP, loop_unroll_factor=UNROLL // GROUP if REF_DIM == 0 else 1):
            weights = _load_pair(attn_ptr + k + p, GROUP == 2)
            for i in tl.static_range(GROUP):
                u, v = _load_location(loc_ptr + 2 * (k + p + i), ACC, PAIRS)
                x = to_pixel(u, ref_x, step_x, W, REF_DIM)
                y = to_pixel(v, ref_y, step_y, H, REF_DIM)
                attn = as_weight(_number(weights, i, attn_ptr, ACC, GROUP == 2), row_max, row_scale, REF_DIM > 0)
                fx, fy, _, attn, token, in00, in01, in10, in11 = corners(x, y, attn, H, W)
                in00 = unmasked(in00, mask_level_ptr, token)
                # attn * (1 - fy) and attn * fy, then each times (1 - fx) and fx
                w1 = attn * fy
                w0 = attn - w1
                w01 = w0 * fx
                w11 = w1 * fx
                top_ptr = level_ptr + (token.to(tl.int64) * STRIDE_VS)[:, None]
                bottom_ptr = top_ptr + below
                v00 = load_pixel(top_ptr, in00[:, None] & mask_d, ACC, D, PACK, CHUNKS)
                out += (w0 - w01)[:, None] * v00
                in01 = unmasked(in01, mask_level_ptr, token + 1)
                in10 = unmasked(in10, mask_level_ptr, token + W.to(tl.int32))
                in11 = unmasked(in11, mask_level_ptr, token + W.to(tl.int32) + 1)
                v01 = load_pixel(top_ptr + STRIDE_VS, in01[:, None] & mask_d, ACC, D, PACK, CHUNKS)
                v10 = load_pixel(bottom_ptr, in10[:, None] & mask_d, ACC, D, PACK, CHUNKS)
                v11 = load_pixel(bottom_ptr + STRIDE_VS, in11[:, None] & mask_d, ACC, D, PACK, CHUNKS)
                out += w01[:, None] * v01
                out += (w1 - w11)[:, None] * v10
                out += w11[:, None] * v11
        k += num_points

    if SHARE > 1:
        out = tl.sum(tl.reshape(out, (BLOCK_Q, SHARE, BLOCK_D)), 1)
    PARTS: tl.constexpr = CHUNKS if SHARE == 1 else 1
    row, mask_q = queries(tl.arange(0, BLOCK_Q), tile_H, tile_W, tile_y, tile_x, WIDTH)
    d, mask_d = load_offsets(D, BLOCK_D, 1, PARTS)
    out_ptr += (row0 * M + m) * D + (row * (M * D))[:, None] + d
    store_row(out_ptr, out, mask_q[:, None] & mask_d, D, PARTS)


def launch_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    num_points: list[int],
    reference_points: Tensor | None,
    value_mask: Tensor | None,
    query_sizes: list[int],
) -> Tensor:
    """out [B, Q, M * D] in value's dtype."""
    B, _, M, D = value.shape
    Q = weights.shape[1]
    if B > MAX_BATCH:
        sizes = spatial_shapes, level_start_index
        return joined(
            [
                launch_forward(v, *sizes, x, w, num_points, reference, mask, query_sizes)
                for v, x, w, reference, mask in batches(value, locations, weights, reference_points, value_mask)
            ]
        )
    arguments = kernel_arguments(
        value, spatial_shapes, level_start_index, locations, weights, num_points, reference_points, value_mask,
        query_sizes,
    )  # fmt: skip
    out = torch.empty(B, Q, M * D, dtype=value.dtype, device=value.device)
    aligned = all(arguments[name].data_ptr() % 8 == 0 for name in ("loc_ptr", "attn_ptr"))
    arguments |= {"out_ptr": out, "ALIGNED": aligned}
    if out.numel():
        launch("forward", _msda_fwd_kernel, grid(B, Q, M, query_sizes), B * Q * M, arguments)
    return out
