"""A row of channels per query: how it is spread over lanes, loaded, stored and added to.

A [rows, BLOCK_D] tile holds a row of channels per query. A row is cut into CHUNKS equal pieces, and every lane has VEC
neighbouring channels, 16 bytes of value, of each: loads and reds are vectors, the few lanes of a row share its address
arithmetic, and no tile travels through shared memory between a load and a red. VEC and CHUNKS are 1 where 16 bytes do
not fit. A pointer to int32 is one to pairs of bfloat16.

The rows of a tile take their chunks in ROTATE different orders: row r begins with chunk r % ROTATE * CHUNKS / ROTATE.
All rows begin at the same place of their cache lines, and so those of a warp are at different places in each load.
"""

import triton
import triton.language as tl

from msda_triton.kernels.dtypes import narrow, widen


@triton.jit
def _steps(ROWS: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr):
    """(first, odd, upper): offsets of each row's first chunk, from it to the second, and from it to the third.

    The number of a row's i-th chunk is an exclusive or of i and of its first one's: each bit of i moves the row by one
    offset, forwards or backwards. STEP goes to the next chunk.
    """
    if ROTATE == 1:
        return 0, STEP, 2 * STEP
    else:
        row = tl.arange(0, ROWS)[:, None]
        odd = (1 - 2 * (row % 2)) * STEP if ROTATE == CHUNKS else STEP
        upper = (2 - 4 * (row // (2 * ROTATE // CHUNKS) % 2)) * STEP
        return row % ROTATE * (CHUNKS // ROTATE * STEP), odd, upper


@triton.jit
def lanes_of_load(
    ptr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr
):
    """(lane, in_row, odd, upper): offsets from ptr that a load or store of the rows' first chunks touches, which of
    them exist, and `_steps`."""
    PACK: tl.constexpr = 2 if ptr.dtype.element_ty == tl.int32 else 1
    first, odd, upper = _steps(ROWS, D // (PACK * CHUNKS), CHUNKS, ROTATE)
    d = tl.arange(0, BLOCK_D // (PACK * CHUNKS))[None, :]
    return first + d, d < D // PACK, odd, upper


@triton.jit
def lanes_of_add(
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VEC: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """As `lanes_of_load`, of the first red of the rows' first chunks."""
    first, odd, upper = _steps(ROWS, D // CHUNKS, CHUNKS, ROTATE)
    if VEC == 8:
        d = tl.arange(0, BLOCK_D // (2 * CHUNKS))[None, :]
        d = d // 4 * 8 + d % 4
    else:
        d = tl.arange(0, BLOCK_D // CHUNKS)[None, :]
    return first + d, d < D, odd, upper


@triton.jit
def _join_halves(a, b):
    """[rows, 2 N] of two [rows, N]; a renaming of registers."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _split_halves(x):
    """The inverse of _join_halves."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _load_chunk(ptrs, mask, ACC: tl.constexpr):
    """One chunk of channels per row in the accumulator's dtype, zero where masked."""
    if ptrs.dtype.element_ty == tl.int32:
        # a bfloat16 is the upper half of a float32: one instruction a channel
        words = tl.load(ptrs, mask=mask, other=0)
        pair = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(pair, [words.shape[0], 2 * words.shape[1]]).to(ACC)
    else:
        return widen(tl.load(ptrs, mask=mask, other=0.0), ACC)


@triton.jit
def load_channels(ptrs, mask, odd, upper, ACC: tl.constexpr, CHUNKS: tl.constexpr):
    """A row [rows, BLOCK_D] at every ptr, zero where masked; ptrs, mask, odd and upper are of `lanes_of_load`."""
    tl.static_assert(CHUNKS == 1 or (CHUNKS == 2 or CHUNKS == 4), "CHUNKS: 1, 2 or 4")
    if CHUNKS == 1:
        return _load_chunk(ptrs, mask, ACC)
    else:
        a = _load_chunk(ptrs, mask, ACC)
        b = _load_chunk(ptrs + odd, mask, ACC)
        if CHUNKS == 2:
            return _join_halves(a, b)
        else:
            c = _load_chunk(ptrs + upper, mask, ACC)
            d = _load_chunk(ptrs + odd + upper, mask, ACC)
            return _join_halves(_join_halves(a, b), _join_halves(c, d))


@triton.jit
def load_rows(
    ptr, offset, offsets, mask,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Rows [rows, BLOCK_D] that begin at ptr + offset + offsets, zero where masked."""
    lane, in_row, odd, upper = lanes_of_load(ptr, offsets.shape[0], D, BLOCK_D, CHUNKS, ROTATE)
    return load_channels(ptr + (offset + offsets[:, None] + lane), mask[:, None] & in_row, odd, upper, ACC, CHUNKS)


@triton.jit
def store_rows(
    ptr, offset, offsets, rows, mask,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Store rows [rows, BLOCK_D] that begin at ptr + offset + offsets."""
    lane, in_row, odd, upper = lanes_of_load(ptr, offsets.shape[0], D, BLOCK_D, CHUNKS, ROTATE)
    ptrs, mask = ptr + (offset + offsets[:, None] + lane), mask[:, None] & in_row
    if CHUNKS == 1:
        tl.store(ptrs, narrow(rows, ptrs), mask=mask)
    else:
        a, b = _split_halves(rows)
        if CHUNKS == 2:
            tl.store(ptrs, narrow(a, ptrs), mask=mask)
            tl.store(ptrs + odd, narrow(b, ptrs), mask=mask)
        else:
            a0, a1 = _split_halves(a)
            b0, b1 = _split_halves(b)
            tl.store(ptrs, narrow(a0, ptrs), mask=mask)
            tl.store(ptrs + odd, narrow(a1, ptrs), mask=mask)
            tl.store(ptrs + upper, narrow(b0, ptrs), mask=mask)
            tl.store(ptrs + odd + upper, narrow(b1, ptrs), mask=mask)


@triton.jit
def _add_chunk(ptrs, grad, mask, VEC: tl.constexpr):
    """Add one chunk of channels per row."""
    if VEC == 8:
        a, b = tl.split(tl.permute(tl.reshape(grad, [grad.shape[0], grad.shape[1] // 8, 2, 4]), (0, 1, 3, 2)))
        tl.atomic_add(ptrs, tl.reshape(a, ptrs.shape), mask=mask, sem="relaxed")
        tl.atomic_add(ptrs + 4, tl.reshape(b, ptrs.shape), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(ptrs, grad, mask=mask, sem="relaxed")


@triton.jit
def add_channels(ptrs, grad, mask, odd, upper, VEC: tl.constexpr, CHUNKS: tl.constexpr):
    """Add a row of grad [rows, BLOCK_D] at every ptr that is not masked; all are of `lanes_of_add`."""
    if CHUNKS == 1:
        _add_chunk(ptrs, grad, mask, VEC)
    else:
        a, b = _split_halves(grad)
        if CHUNKS == 2:
            _add_chunk(ptrs, a, mask, VEC)
            _add_chunk(ptrs + odd, b, mask, VEC)
        else:
            a0, a1 = _split_halves(a)
            b0, b1 = _split_halves(b)
            _add_chunk(ptrs, a0, mask, VEC)
            _add_chunk(ptrs + odd, a1, mask, VEC)
            _add_chunk(ptrs + upper, b0, mask, VEC)
            _add_chunk(ptrs + odd + upper, b1, mask, VEC)
