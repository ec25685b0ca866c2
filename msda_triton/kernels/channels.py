"""A row of channels per query: how it is spread over lanes, loaded, stored and added to.

A [rows, BLOCK_D] tile holds a row of channels per query. A row is cut into CHUNKS equal pieces, and every lane has VEC
neighbouring channels, 16 bytes of value, of each: loads and reds are vectors, the few lanes of a row share its address
arithmetic, and no tile travels through shared memory between a load and a red. VEC and CHUNKS are 1 where 16 bytes do
not fit. A pointer to int32 is one to pairs of bfloat16.
"""

import triton
import triton.language as tl

from msda_triton.kernels.dtypes import narrow, widen


@triton.jit
def lanes_of_load(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Offsets from ptr that a load or store of a row's first chunk touches, and which of them exist."""
    PACK: tl.constexpr = 2 if ptr.dtype.element_ty == tl.int32 else 1
    d = tl.arange(0, BLOCK_D // (PACK * CHUNKS))[None, :]
    return d, d < D // PACK


@triton.jit
def lanes_of_add(D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr):
    """Offsets that the first red of a row's first chunk touches, and which of them exist."""
    if VEC == 8:
        d = tl.arange(0, BLOCK_D // (2 * CHUNKS))[None, :]
        d = d // 4 * 8 + d % 4
    else:
        d = tl.arange(0, BLOCK_D // CHUNKS)[None, :]
    return d, d < D


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
def load_channels(ptrs, mask, ACC: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr):
    """A row [rows, BLOCK_D] at every ptr, zero where masked; ptrs and mask are of its first chunk."""
    tl.static_assert(CHUNKS == 1 or (CHUNKS == 2 or CHUNKS == 4), "CHUNKS: 1, 2 or 4")
    PACK: tl.constexpr = 2 if ptrs.dtype.element_ty == tl.int32 else 1
    STEP: tl.constexpr = D // (PACK * CHUNKS)
    if CHUNKS == 1:
        return _load_chunk(ptrs, mask, ACC)
    elif CHUNKS == 2:
        return _join_halves(_load_chunk(ptrs, mask, ACC), _load_chunk(ptrs + STEP, mask, ACC))
    else:
        ab = _join_halves(_load_chunk(ptrs, mask, ACC), _load_chunk(ptrs + STEP, mask, ACC))
        ptrs += 2 * STEP
        cd = _join_halves(_load_chunk(ptrs, mask, ACC), _load_chunk(ptrs + STEP, mask, ACC))
        return _join_halves(ab, cd)


@triton.jit
def load_rows(
    ptr, offset, offsets, mask, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr
):
    """Rows [rows, BLOCK_D] that begin at ptr + offset + offsets, zero where masked."""
    lane, in_row = lanes_of_load(ptr, D, BLOCK_D, CHUNKS)
    return load_channels(ptr + (offset + offsets[:, None] + lane), mask[:, None] & in_row, ACC, D, CHUNKS)


@triton.jit
def store_rows(ptr, offset, offsets, rows, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Store rows [rows, BLOCK_D] that begin at ptr + offset + offsets."""
    lane, in_row = lanes_of_load(ptr, D, BLOCK_D, CHUNKS)
    _store_channels(ptr + (offset + offsets[:, None] + lane), rows, mask[:, None] & in_row, D, CHUNKS)


@triton.jit
def _store_channels(ptrs, row, mask, D: tl.constexpr, CHUNKS: tl.constexpr):
    """Store a row [rows, BLOCK_D] at every ptr; ptrs and mask are of its first chunk."""
    STEP: tl.constexpr = D // CHUNKS
    if CHUNKS == 1:
        tl.store(ptrs, narrow(row, ptrs), mask=mask)
    else:
        a, b = _split_halves(row)
        if CHUNKS == 2:
            tl.store(ptrs, narrow(a, ptrs), mask=mask)
            tl.store(ptrs + STEP, narrow(b, ptrs), mask=mask)
        else:
            a0, a1 = _split_halves(a)
            b0, b1 = _split_halves(b)
            tl.store(ptrs, narrow(a0, ptrs), mask=mask)
            tl.store(ptrs + STEP, narrow(a1, ptrs), mask=mask)
            tl.store(ptrs + 2 * STEP, narrow(b0, ptrs), mask=mask)
            tl.store(ptrs + 3 * STEP, narrow(b1, ptrs), mask=mask)


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
def add_channels(ptrs, grad, mask, D: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr):
    """Add a row of grad [rows, BLOCK_D] at every ptr that is not masked; ptrs and mask are those of `lanes_of_add`."""
    STEP: tl.constexpr = D // CHUNKS
    if CHUNKS == 1:
        _add_chunk(ptrs, grad, mask, VEC)
    elif CHUNKS == 2:
        a, b = _split_halves(grad)
        _add_chunk(ptrs, a, mask, VEC)
        _add_chunk(ptrs + STEP, b, mask, VEC)
    else:
        ab, cd = _split_halves(grad)
        a, b = _split_halves(ab)
        c, d = _split_halves(cd)
        _add_chunk(ptrs, a, mask, VEC)
        _add_chunk(ptrs + STEP, b, mask, VEC)
        _add_chunk(ptrs + 2 * STEP, c, mask, VEC)
        _add_chunk(ptrs + 3 * STEP, d, mask, VEC)
