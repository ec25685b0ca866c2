"""What the forward and backward kernels share: level geometry, sample geometry, and how a row of channels is spread.

A [BLOCK_Q, BLOCK_D] tile holds one row of channels per query. A row is cut into CHUNKS equal pieces, and every lane has
VEC neighbouring channels, 16 bytes of value, of each: loads and reds are vectors, the few lanes of a row share its
address arithmetic, and no tile travels through shared memory between a load and a red. VEC is 0 where 16 bytes do not
fit; PACK is 2 where value is bfloat16 and read as two channels a 32-bit word.
"""

import triton
import triton.language as tl


@triton.jit
def load_level(shapes_ptr, starts_ptr, l, next_start, S):
    """(H, W, first token, first token of level l + 1); -1 for H and W of a level without pixels, or one that is not
    within the S tokens: no sample x has -1 < x < -1."""
    H = tl.maximum(tl.load(shapes_ptr + 2 * l).to(tl.int32), 0)
    W = tl.maximum(tl.load(shapes_ptr + 2 * l + 1).to(tl.int32), 0)
    start = next_start
    if starts_ptr is not None:
        start = tl.load(starts_ptr + l).to(tl.int32)
    end = H.to(tl.int64) * W + start
    fits = ((start >= 0) & (end <= S)) & (end > start)
    return tl.where(fits, H, -1), tl.where(fits, W, -1), start, tl.minimum(end, S + 1).to(tl.int32)


@triton.jit
def rectangle_of_program(shapes_ptr, Q, L: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_W: tl.constexpr):
    """A program's first query, H and W of the level that it is a pixel of, and its row and column there.

    With TILE_W, queries are the pixels of all levels, and a program has a rectangle of TILE_W columns. Without, all
    queries are one row, and a program has a run of them.
    """
    tile = tl.program_id(0)
    if TILE_W == 0:
        return tile * BLOCK_Q, 1, Q, 0, tile * BLOCK_Q
    else:
        TILE_H: tl.constexpr = BLOCK_Q // TILE_W
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
            tile -= tl.cdiv(level_H, TILE_H) * tl.cdiv(level_W, TILE_W)
            start += level_H * level_W
        across = tl.cdiv(W, TILE_W)
        y = index // across * TILE_H
        x = index % across * TILE_W
        return first + y * W + x, H, W, y, x


@triton.jit
def queries(rows, H, W, y, x, TILE_W: tl.constexpr):
    """Query of each row, counted from the program's first, and whether it exists; one that does not is another's."""
    if TILE_W == 0:
        return tl.minimum(rows, W - 1 - x), rows < W - x
    else:
        dy = rows // TILE_W
        dx = rows % TILE_W
        return tl.minimum(dy, H - 1 - y) * W + tl.minimum(dx, W - 1 - x), (dy < H - y) & (dx < W - x)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the accumulator's dtype."""
    # bfloat16 and float64 meet in float32: the interpreter converts them wrongly without it
    if x.dtype == tl.bfloat16:
        return x.to(tl.float32).to(ACC)
    else:
        return x.to(ACC)


@triton.jit
def narrow(x, ptrs):
    """x in the dtype that ptrs point to."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        return x.to(tl.float32).to(tl.bfloat16)
    else:
        return x.to(ptrs.dtype.element_ty)


@triton.jit
def load_reference(ref_ptr, l, num_points, ACC: tl.constexpr, REF_DIM: tl.constexpr, REF_L: tl.constexpr):
    """Reference point (x, y) of every query and, for boxes, the (w, h) that an offset of 1 moves; zeros without one."""
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
def to_pixel(u, ref, step, size, REF_DIM: tl.constexpr):
    """Pixel coordinate of a location u, or of an offset u from a reference."""
    # pixel centres sit at (i + 0.5) / size: grid_sample's align_corners=False
    if REF_DIM == 0:
        return u * size - 0.5
    elif REF_DIM == 2:
        return ref * size + (u - 0.5)
    else:
        return (ref + u * step) * size - 0.5


@triton.jit
def as_weight(weight, row_max, row_scale, FUSED: tl.constexpr):
    """Attention weight of one sample per row; of a logit if FUSED, with the row's maximum and 1 / sum."""
    if FUSED:
        weight = tl.exp(weight - row_max) * row_scale
    return weight


@triton.jit
def softmax_rows(logit_ptr, ACC: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Maximum and 1 / sum of exp of every row of logits."""
    k = tl.arange(0, BLOCK_K)[None, :]
    logits = widen(tl.load(logit_ptr[:, None] + k, mask=k < K, other=-float("inf")), ACC)
    row_max = tl.max(logits, 1)
    return row_max, 1.0 / tl.sum(tl.exp(logits - row_max[:, None]), 1)


@triton.jit
def corners(x, y, attn, H, W):
    """Fraction (fx, fy), whether taken, weight (0 if not), first token and four inside masks of samples at (x, y)."""
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
    token = y0.to(tl.int32) * W.to(tl.int32) + x0.to(tl.int32)
    attn = tl.where(taken, attn, 0.0)
    return x - x0, y - y0, taken, attn, token, top & left, top & right, bottom & left, bottom & right


@triton.jit
def unmasked(inside, mask_ptr, token):
    """Drop the pixels whose token the padding mask at mask_ptr hides."""
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=1) == 0)
    return inside


@triton.jit
def load_offsets(D: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr, CHUNKS: tl.constexpr):
    """Offsets that the load of a row's first chunk touches, and which of them exist."""
    d = tl.arange(0, BLOCK_D // (PACK * CHUNKS))[None, :]
    return d, d < D // PACK


@triton.jit
def add_offsets(D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr):
    """Offsets that the first red of a row's first chunk touches, and which of them exist."""
    if VEC == 8:
        d = tl.arange(0, BLOCK_D // (2 * CHUNKS))[None, :]
        d = d // 4 * 8 + d % 4
    else:
        d = tl.arange(0, BLOCK_D // CHUNKS)[None, :]
    return d, d < D


@triton.jit
def join_halves(a, b):
    """[BLOCK_Q, 2 N] of two [BLOCK_Q, N]; a renaming of registers."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def split_halves(x):
    """The inverse of join_halves."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def load_chunk(ptrs, mask, ACC: tl.constexpr, PACK: tl.constexpr):
    """One chunk of channels per row in the accumulator's dtype, zero where masked."""
    if PACK == 2:
        # a bfloat16 is the upper half of a float32: one instruction a channel
        words = tl.load(ptrs, mask=mask, other=0)
        pair = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(pair, [words.shape[0], 2 * words.shape[1]]).to(ACC)
    else:
        return widen(tl.load(ptrs, mask=mask, other=0.0), ACC)


@triton.jit
def load_pixel(ptrs, mask, ACC: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr, CHUNKS: tl.constexpr):
    """Channels of one pixel per row: [BLOCK_Q, BLOCK_D]."""
    tl.static_assert(CHUNKS == 1 or (CHUNKS == 2 or CHUNKS == 4), "LANE_D allows 1, 2 or 4 chunks")
    STEP: tl.constexpr = D // (PACK * CHUNKS)
    if CHUNKS == 1:
        return load_chunk(ptrs, mask, ACC, PACK)
    elif CHUNKS == 2:
        return join_halves(load_chunk(ptrs, mask, ACC, PACK), load_chunk(ptrs + STEP, mask, ACC, PACK))
    else:
        ab = join_halves(load_chunk(ptrs, mask, ACC, PACK), load_chunk(ptrs + STEP, mask, ACC, PACK))
        ptrs += 2 * STEP
        cd = join_halves(load_chunk(ptrs, mask, ACC, PACK), load_chunk(ptrs + STEP, mask, ACC, PACK))
        return join_halves(ab, cd)


@triton.jit
def store_row(ptrs, row, mask, D: tl.constexpr, CHUNKS: tl.constexpr):
    """Store a row [BLOCK_Q, BLOCK_D] per query; ptrs and mask are of its first chunk."""
    STEP: tl.constexpr = D // CHUNKS
    if CHUNKS == 1:
        tl.store(ptrs, narrow(row, ptrs), mask=mask)
    else:
        a, b = split_halves(row)
        if CHUNKS == 2:
            tl.store(ptrs, narrow(a, ptrs), mask=mask)
            tl.store(ptrs + STEP, narrow(b, ptrs), mask=mask)
        else:
            a0, a1 = split_halves(a)
            b0, b1 = split_halves(b)
            tl.store(ptrs, narrow(a0, ptrs), mask=mask)
            tl.store(ptrs + STEP, narrow(a1, ptrs), mask=mask)
            tl.store(ptrs + 2 * STEP, narrow(b0, ptrs), mask=mask)
            tl.store(ptrs + 3 * STEP, narrow(b1, ptrs), mask=mask)


@triton.jit
def add_chunk(ptrs, grad, mask, VEC: tl.constexpr):
    """Add one chunk of channels per row."""
    if VEC == 8:
        a, b = tl.split(tl.permute(tl.reshape(grad, [grad.shape[0], grad.shape[1] // 8, 2, 4]), (0, 1, 3, 2)))
        tl.atomic_add(ptrs, tl.reshape(a, ptrs.shape), mask=mask, sem="relaxed")
        tl.atomic_add(ptrs + 4, tl.reshape(b, ptrs.shape), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(ptrs, grad, mask=mask, sem="relaxed")


@triton.jit
def add_pixel(ptrs, grad, mask, D: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr):
    """Add a row of grad [BLOCK_Q, BLOCK_D] to every pixel at ptrs that is not masked."""
    STEP: tl.constexpr = D // CHUNKS
    if CHUNKS == 1:
        add_chunk(ptrs, grad, mask, VEC)
    elif CHUNKS == 2:
        a, b = split_halves(grad)
        add_chunk(ptrs, a, mask, VEC)
        add_chunk(ptrs + STEP, b, mask, VEC)
    else:
        ab, cd = split_halves(grad)
        a, b = split_halves(ab)
        c, d = split_halves(cd)
        add_chunk(ptrs, a, mask, VEC)
        add_chunk(ptrs + STEP, b, mask, VEC)
        add_chunk(ptrs + 2 * STEP, c, mask, VEC)
        add_chunk(ptrs + 3 * STEP, d, mask, VEC)
