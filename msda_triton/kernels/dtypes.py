"""Numbers between memory and registers."""

import triton
import triton.language as tl


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
def load_number(ptr, i: tl.constexpr, ACC: tl.constexpr, PAIRED: tl.constexpr):
    """Number i, 0 or 1, of those at ptr. PAIRED loads both as one integer, at a multiple of its size.

    Who asks for both asks for one load: the compiler drops the second, equal one.
    """
    if not PAIRED:
        return widen(tl.load(ptr + i), ACC)
    elif ptr.dtype.element_ty == tl.float32:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int64), bitcast=True))
        return (pair >> 32 * i).to(tl.int32).to(tl.float32, bitcast=True).to(ACC)
    else:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True))
        return widen((pair >> 16 * i).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True), ACC)


@triton.jit
def store_number(ptr, x, mask, LANES: tl.constexpr):
    """Store x, one number a row, as LANES columns of which the first is written.

    So x keeps its layout, and does not travel through shared memory.
    """
    lane = tl.arange(0, LANES)[None, :]
    x = tl.broadcast_to(x[:, None], [x.shape[0], LANES])
    tl.store(ptr[:, None] + lane, narrow(x, ptr), mask=mask[:, None] & (lane == 0))


@triton.jit
def store_numbers(ptr, x, y, mask, LANES: tl.constexpr):
    """Store x at ptr and y behind it; float32 ones in one store, at a multiple of 8 bytes."""
    if ptr.dtype.element_ty == tl.float32:
        low = narrow(x, ptr).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        word = (narrow(y, ptr).to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        store_number(ptr.to(tl.pointer_type(tl.int64), bitcast=True), word, mask, LANES)
    else:
        store_number(ptr, x, mask, LANES)
        store_number(ptr + 1, y, mask, LANES)
