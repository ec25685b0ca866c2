"""Deterministic sums: integers, whose unit is chosen by how large the terms of a head's gradient are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msda_triton.bilinear import (
    as_weight,
    corners,
    load_level,
    load_reference,
    softmax_rows,
    to_pixel,
    unmasked,
    widen,
)

ROWS = 32  # queries of a program


@triton.jit(do_not_specialize=["S", "Q"])
def _msda_bound_kernel(
    shapes_ptr, starts_ptr, points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr, grad_out_ptr,
    max_weight_ptr, max_grad_ptr, S, Q,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """For each [b, q, m] the largest |weight| of a sample that adds to some pixel's gradient, and largest |grad_out|.

    Infinite for NaN; a weight of -1 if no sample adds anything. Samples and pixels count as in the backward kernel, by
    the same helpers: what it does not add must not cost the rest its precision.
    """
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    q0 = tl.program_id(0) * BLOCK_Q
    row0 = b * Q + q0  # of [B, Q]
    rows = tl.arange(0, BLOCK_Q)
    row = tl.minimum(rows, Q - 1 - q0)
    loc_ptr += (row0 * M + m) * (2 * K) + row * (M * 2 * K)
    attn_ptr += (row0 * M + m) * K + row * (M * K)
    row_max = 0.0
    row_scale = 1.0
    if REF_DIM > 0:
        row_max, row_scale = softmax_rows(attn_ptr, ACC, K, BLOCK_K)
        ref_ptr += (row0 + row) * (REF_L * REF_DIM)
    if mask_ptr is not None:
        mask_ptr += b * S

    largest = tl.full((BLOCK_Q,), -1.0, ACC)
    k = 0
    next_start = 0
    for l in range(L):
        H, W, start, next_start = load_level(shapes_ptr, starts_ptr, l, next_start, S)
        num_points = P if points_ptr is None else tl.load(points_ptr + l)
        ref_x, ref_y, step_x, step_y = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        mask_level_ptr = None if mask_ptr is None else mask_ptr + start
        H = H.to(ACC)
        W = W.to(ACC)
        for p in range(num_points):
            x = to_pixel(widen(tl.load(loc_ptr + 2 * (k + p)), ACC), ref_x, step_x, W, REF_DIM)
            y = to_pixel(widen(tl.load(loc_ptr + 2 * (k + p) + 1), ACC), ref_y, step_y, H, REF_DIM)
            attn = as_weight(widen(tl.load(attn_ptr + k + p), ACC), row_max, row_scale, REF_DIM > 0)
            _, _, _, attn, token, in00, in01, in10, in11 = corners(x, y, attn, H, W)
            in00 = unmasked(in00, mask_level_ptr, token)
            in01 = unmasked(in01, mask_level_ptr, token + 1)
            in10 = unmasked(in10, mask_level_ptr, token + W.to(tl.int32))
            in11 = unmasked(in11, mask_level_ptr, token + W.to(tl.int32) + 1)
            attn = tl.abs(attn)
            attn = tl.where(attn < float("inf"), attn, float("inf"))  # a maximum passes NaN over
            largest = tl.maximum(largest, tl.where((in00 | in01) | (in10 | in11), attn, -1.0))
        k += num_points

    d = tl.arange(0, BLOCK_D)[None, :]
    grad_out_ptr += (row0 * M + m) * D + (row * (M * D))[:, None]
    grad_out = tl.abs(widen(tl.load(grad_out_ptr + d, mask=d < D, other=0.0), ACC))
    grad_out = tl.max(tl.where(grad_out < float("inf"), grad_out, float("inf")), 1)
    tl.store(max_weight_ptr + row0 * M + m + row * M, largest, mask=rows < Q - q0)
    tl.store(max_grad_ptr + row0 * M + m + row * M, grad_out, mask=rows < Q - q0)


def fixed_point_scale(arguments: dict, grad_out: Tensor) -> Tensor:
    """[B, M] powers of two, such that the terms of one pixel sum to 62 bits at most; NaN for a gradient not finite.

    Args:
        arguments: of the backward kernel. grad_out: [B, Q, M * D], contiguous; neither B nor Q is 0.
    """
    B, Q, M = len(grad_out), arguments["Q"], arguments["M"]
    dtype = torch.float64 if arguments["ACC"] == tl.float64 else torch.float32
    weight, grad = torch.empty(2, B, Q, M, dtype=dtype, device=grad_out.device)
    given = {"grad_out_ptr": grad_out, "max_weight_ptr": weight, "max_grad_ptr": grad, "BLOCK_Q": ROWS}
    given |= {name: arguments[name] for name in _msda_bound_kernel.arg_names if name not in given}
    launch_bound((triton.cdiv(Q, ROWS), M, B), given)
    # every sample adds at most this to a pixel, once; in float64, as two finite numbers may have no product in float32
    largest = torch.where(weight >= 0, weight.double() * grad.double(), 0).amax(1)
    exponent = 62 - torch.log2(largest * (Q * arguments["K"])).ceil()
    finest = 126 if dtype == torch.float32 else 1000  # powers of two that dtype has
    return torch.where(largest.isfinite(), torch.exp2(exponent.clamp(-finest, finest)), torch.nan).to(dtype)


def launch_bound(grid: tuple[int, int, int], arguments: dict) -> None:
    """Run the kernel; one configuration will do, as it reads a fraction of what the backward kernel does."""
    _msda_bound_kernel[grid](**arguments, num_warps=4, num_stages=1)
