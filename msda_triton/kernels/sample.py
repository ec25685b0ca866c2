"""Where a sample lies: the queries of a program, a level, the sample's place in it, and the four pixels around."""

import triton
import triton.language as tl

from msda_triton.kernels.dtypes import load_number, widen


@triton.jit
def rows_of_program(
    shapes_ptr, Q, L: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    """(b, m, first, query, here) of a program: its image, its head, and BLOCK_Q queries, each in SHARE rows.

    first is the index in [B, Q] of its first query, query [BLOCK_Q * SHARE] counts from it in 32 bits, and here masks:
    rows past the edge of the map repeat its last query, and are masked.
    """
    m, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, H, W, y, x = _place_of_tile(tl.program_id(0), shapes_ptr, Q, L, BLOCK_Q, BLOCK_W)
    index = tl.arange(0, BLOCK_Q * SHARE) // SHARE
    if BLOCK_W == 0:
        return b, m, b * Q + start, tl.minimum(index, W - 1 - x), index < W - x
    else:
        dy = index // BLOCK_W
        dx = index % BLOCK_W
        query = tl.minimum(dy, H - 1 - y) * W + tl.minimum(dx, W - 1 - x)
        return b, m, b * Q + start, query, (dy < H - y) & (dx < W - x)


@triton.jit
def _place_of_tile(tile, shapes_ptr, Q, L: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr):
    """(first, H, W, y, x): a tile's first query, the size of the map that it is a pixel of, and its place there.

    With BLOCK_W, queries are the pixels of all levels, and a tile is a rectangle of BLOCK_W columns. Without, all
    queries are one row of pixels, and a tile is a run of them.
    """
    if BLOCK_W == 0:
        return tile * BLOCK_Q, 1, Q, 0, tile * BLOCK_Q
    else:
        BLOCK_H: tl.constexpr = BLOCK_Q // BLOCK_W
        first = 0
        H = 1
        W = 1
        index = 0
        start = 0
        for l in tl.static_range(L):
            level_H = tl.load(shapes_ptr + 2 * l).to(tl.int32)
            level_W = tl.load(shapes_ptr + 2 * l + 1).to(tl.int32)
            here = tile >= 0
            first = tl.where(here, start, first)
            H = tl.where(here, level_H, H)
            W = tl.where(here, level_W, W)
            index = tl.where(here, tile, index)
            tile -= tl.cdiv(level_H, BLOCK_H) * tl.cdiv(level_W, BLOCK_W)
            start += level_H * level_W
        across = tl.cdiv(W, BLOCK_W)
        y = index // across * BLOCK_H
        x = index % across * BLOCK_W
        return first + y * W + x, H, W, y, x


@triton.jit
def load_level(shapes_ptr, starts_ptr, num_points_ptr, l, end, S, P: tl.constexpr, ACC: tl.constexpr):
    """(H, W, down, start, end, num_points): size, tokens from a pixel to the next row, tokens [start, end), and points.

    H, W and down are -1 if the level has no pixels, or is not within the S tokens: no sample x has -1 < x < -1. A level
    starts at end, where the one before it ends, unless starts_ptr says where.
    """
    H = tl.maximum(tl.load(shapes_ptr + 2 * l).to(tl.int32), 0)
    W = tl.maximum(tl.load(shapes_ptr + 2 * l + 1).to(tl.int32), 0)
    start = end
    if starts_ptr is not None:
        start = tl.load(starts_ptr + l).to(tl.int32)
    end = H.to(tl.int64) * W + start
    fits = ((start >= 0) & (end <= S)) & (end > start)
    H = tl.where(fits, H, -1)
    W = tl.where(fits, W, -1)
    num_points = P if num_points_ptr is None else tl.load(num_points_ptr + l)
    return H.to(ACC), W.to(ACC), W.to(tl.int64), start, tl.minimum(end, S + 1).to(tl.int32), num_points


@triton.jit
def load_reference(ref_ptr, l, num_points, ACC: tl.constexpr, REF_DIM: tl.constexpr, REF_L: tl.constexpr):
    """(x, y, w, h) of each row: its reference point, and of a box what an offset of 1 moves by; zeros without one."""
    if REF_DIM == 0:
        return 0.0, 0.0, 0.0, 0.0
    else:
        ref_ptr += (l if REF_L > 1 else 0) * REF_DIM
        x = widen(tl.load(ref_ptr), ACC)
        y = widen(tl.load(ref_ptr + 1), ACC)
        if REF_DIM == 2:
            return x, y, 0.0, 0.0
        else:
            w = widen(tl.load(ref_ptr + 2), ACC)
            h = widen(tl.load(ref_ptr + 3), ACC)
            return x, y, w * 0.5 / num_points, h * 0.5 / num_points


@triton.jit
def softmax_of_rows(logit_ptr, ACC: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FUSED: tl.constexpr):
    """Maximum of every row of K logits, and 1 / the sum of their exp; a pair of zeros if not FUSED."""
    if not FUSED:
        return 0.0, 0.0
    else:
        k = tl.arange(0, BLOCK_K)[None, :]
        logits = widen(tl.load(logit_ptr[:, None] + k, mask=k < K, other=-float("inf")), ACC)
        row_max = tl.max(logits, 1)
        return row_max, 1.0 / tl.sum(tl.exp(logits - row_max[:, None]), 1)


@triton.jit
def load_sample(
    loc_ptr, attn_ptr, i: tl.constexpr, ref, softmax, H, W,
    ACC: tl.constexpr, REF_DIM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """(x, y, attn, u, v) of sample k + i of each row: its pixel, its weight, and its location or offset (u, v).

    Args:
        ref: of `load_reference`. softmax: of `softmax_of_rows`, or of all that is not FUSED.
        PAIRS: 0 loads u, v and attn by themselves; 1 loads u and v at once; 2 also attn of samples k and k + 1.
    """
    u = load_number(loc_ptr + 2 * i, 0, ACC, PAIRS > 0)
    v = load_number(loc_ptr + 2 * i, 1, ACC, PAIRS > 0)
    attn = load_number(attn_ptr, i, ACC, PAIRS == 2)
    ref_x, ref_y, step_x, step_y = ref
    if REF_DIM > 0:
        row_max, row_scale = softmax
        attn = tl.exp(attn - row_max) * row_scale
    return _pixel(u, ref_x, step_x, W, REF_DIM), _pixel(v, ref_y, step_y, H, REF_DIM), attn, u, v


@triton.jit
def _pixel(u, ref, step, size, REF_DIM: tl.constexpr):
    """Pixel coordinate of a location u, or of an offset u from a reference point."""
    # pixel centres sit at (i + 0.5) / size: grid_sample's align_corners=False
    if REF_DIM == 0:
        return u * size - 0.5
    elif REF_DIM == 2:
        return ref * size + (u - 0.5)
    else:
        return (ref + u * step) * size - 0.5


@triton.jit
def corners(x, y, attn, H, W, hidden_ptr):
    """The four pixels around (x, y): top left, top right, bottom left, bottom right.

    Returns:
        Token of the first one, counted from the level's; whether the sample is taken; its weight, 0 if it is not;
        (fx, fy), by how much it lies right of and below the first one; four masks of the pixels that exist, without
        those that a padding mask at hidden_ptr, which is the level's, hides.
    """
    # nested selects, not one conjunction: LLVM turns four comparisons at once into eight instructions on bit masks
    x = tl.maximum(tl.where(x < W, x, -2.0), -2.0)
    y = tl.maximum(tl.where(y < H, y, -2.0), -2.0)
    taken = tl.minimum(x, y) > -1
    x0 = tl.floor(x)
    y0 = tl.floor(y)
    top = taken & (y0 >= 0)
    bottom = taken & (y0 < H - 1)
    left = x0 >= 0
    right = x0 < W - 1
    down = W.to(tl.int32)
    token = y0.to(tl.int32) * down + x0.to(tl.int32)
    attn = tl.where(taken, attn, 0.0)
    fx = x - x0
    fy = y - y0
    in00 = _shown(top & left, hidden_ptr, token)
    in01 = _shown(top & right, hidden_ptr, token + 1)
    in10 = _shown(bottom & left, hidden_ptr, token + down)
    in11 = _shown(bottom & right, hidden_ptr, token + down + 1)
    return token, taken, attn, fx, fy, in00, in01, in10, in11


@triton.jit
def _shown(inside, hidden_ptr, token):
    if hidden_ptr is not None:
        inside = inside & (tl.load(hidden_ptr + token, mask=inside, other=1) == 0)
    return inside


@triton.jit
def corner_weights(attn, fx, fy):
    """(w0, w01, w1, w11): attn of the upper row, of its right pixel, of the lower row, and of its right pixel.

    The left pixels have w0 - w01 and w1 - w11, taken where they are used: earlier they cost registers, and spills.
    """
    w1 = attn * fy
    w0 = attn - w1
    return w0, w0 * fx, w1, w1 * fx
