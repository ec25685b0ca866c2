"""What a deterministic backward knows of a gradient before it adds it up: how large its terms can be."""

import triton
import triton.language as tl

from msda_triton.kernels.channels import load_rows
from msda_triton.kernels.sample import (
    corners,
    load_level,
    load_reference,
    load_sample,
    rows_of_program,
    softmax_of_rows,
)


@triton.jit(do_not_specialize=["S", "Q"])
def _msda_bound_kernel(
    shapes_ptr, starts_ptr, num_points_ptr, loc_ptr, attn_ptr, ref_ptr, mask_ptr, grad_out_ptr,
    max_weight_ptr, max_grad_ptr, S, Q,
    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    REF_DIM: tl.constexpr, REF_L: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """For each [b, q, m] the largest |weight| of a sample that adds to some pixel's gradient, and largest |grad_out|.

    Infinite for NaN; a weight of -1 if no sample adds anything. Samples and pixels count as in the backward kernel, by
    the same helpers: what it does not add must not cost the rest its precision.
    """
    b, m, first, query, here = rows_of_program(shapes_ptr, Q, L, BLOCK_Q, BLOCK_W, 1)
    loc_ptr += (first * M + m) * (2 * K) + query * (M * 2 * K)
    attn_ptr += (first * M + m) * K + query * (M * K)
    ref_ptr = None if REF_DIM == 0 else ref_ptr + (first + query) * (REF_L * REF_DIM)
    softmax = softmax_of_rows(attn_ptr, ACC, K, BLOCK_K, REF_DIM > 0)
    largest = tl.full((BLOCK_Q,), -1.0, ACC)
    k, end = 0, 0
    for l in range(L):
        H, W, _down, start, end, num_points = load_level(shapes_ptr, starts_ptr, num_points_ptr, l, end, S, P, ACC)
        ref = load_reference(ref_ptr, l, num_points, ACC, REF_DIM, REF_L)
        hidden_ptr = None if mask_ptr is None else mask_ptr + (b * S + start)
        for p in range(num_points):
            x, y, attn, _u, _v = load_sample(
                loc_ptr + 2 * (k + p), attn_ptr + k + p, 0, ref, softmax, H, W, ACC, REF_DIM, 0
            )
            _token, _taken, attn, _fx, _fy, in00, in01, in10, in11 = corners(x, y, attn, H, W, hidden_ptr)
            attn = tl.abs(attn)
            attn = tl.where(attn < float("inf"), attn, float("inf"))  # a maximum passes NaN over
            largest = tl.maximum(largest, tl.where((in00 | in01) | (in10 | in11), attn, -1.0))
        k += num_points

    grad_out = tl.abs(load_rows(grad_out_ptr, (first * M + m) * D, query * (M * D), here, ACC, D, BLOCK_D, 1, 1))
    grad_out = tl.max(tl.where(grad_out < float("inf"), grad_out, float("inf")), 1)
    tl.store(max_weight_ptr + first * M + m + query * M, largest, mask=here)
    tl.store(max_grad_ptr + first * M + m + query * M, grad_out, mask=here)
