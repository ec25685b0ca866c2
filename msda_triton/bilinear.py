"""What the forward and backward kernels share: level geometry, sample geometry, and how a row of channels is spread.

A [BLOCK_Q, BLOCK_D] tile holds one row of channels per query. SPREAD says how a row lies over the lanes of a warp, so
that loads and reds are 16 bytes wide, four lanes share the address arithmetic of a row of 32 channels, and no tile
travels through shared memory between a load and a red:
    "words"   bfloat16, read as two channels a 32-bit word; 8 neighbouring channels a lane
    "eights"  float16; 8 neighbouring channels a lane
    "halves"  float32; 4 channels of each half of the row a lane
    "plain"   anything else
"""

import triton
import triton.language as tl


@triton.jit
def load_level(shapes_ptr, starts_ptr, l, next_start, S):
    """(H, W, first token, first token of level l + 1); a level that does not fit into S tokens has no pixels."""
    H = tl.maximum(tl.load(shapes_ptr + 2 * l).to(tl.int32), 0)
    W = tl.maximum(tl.load(shapes_ptr + 2 * l + 1).to(tl.int32), 0)
    start = next_start
    if starts_ptr is not None:
        start = tl.load(starts_ptr + l).to(tl.int32)
    end = H.to(tl.int64) * W + start
    fits = (start >= 0) & (end <= S)
    return tl.where(fits, H, 0), tl.where(fits, W, 0), start, tl.minimum(end, S + 1).to(tl.int32)


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
def to_pixel(u, ref, step, size, REF_DIM: tl.constexpr, METHOD: tl.constexpr):
    """Pixel coordinate of a location u, or of an offset u from a reference."""
    # pixel centres sit at (i + 0.5) / size: grid_sample's align_corners=False; "discrete" rounds as RT-DETRv2 does
    shift: tl.constexpr = -0.5 if METHOD == "default" else 0.5
    if REF_DIM == 0:
        return u * size + shift
    elif REF_DIM == 2:
        return ref * size + (u + shift)
    else:
        return (ref + u * step) * size + shift


@triton.jit
def load_weight(attn_ptr, row_max, row_scale, ACC: tl.constexpr, FUSED: tl.constexpr):
    """Attention weight of one sample per row; of a logit if FUSED, with the row's maximum and 1 / sum."""
    weight = widen(tl.load(attn_ptr), ACC)
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
def corners(x, y, attn, H, W, METHOD: tl.constexpr):
    """Fraction (fx, fy), weight (0 if not taken), first token and four inside masks of samples at pixel (x, y)."""
    if METHOD == "default":
        # nested selects, not one conjunction: LLVM turns four comparisons at once into eight instructions on bit masks
        x = tl.maximum(tl.where(x < W, x, -2.0), -2.0)
        y = tl.maximum(tl.where(y < H, y, -2.0), -2.0)
        taken = (x > -1) & (y > -1)
        x0 = tl.floor(x)
        y0 = tl.floor(y)
        top = taken & (y0 >= 0)
        bottom = taken & (y0 < H - 1)
        left = x0 >= 0
        right = x0 < W - 1
    else:
        taken = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        x_last = (H if METHOD == "discrete_h" else W) - 1
        x0 = tl.where(taken, tl.minimum(tl.maximum(tl.floor(x), 0.0), x_last), -1.0)
        y0 = tl.where(taken, tl.minimum(tl.maximum(tl.floor(y), 0.0), H - 1), -1.0)
        x = x0
        y = y0
        top = taken & (y0 >= 0)
        bottom = top & (y0 < 0)
        left = (x0 >= 0) & (x0 < W)
        right = left & (x0 < 0)
    token = y0.to(tl.int32) * W.to(tl.int32) + x0.to(tl.int32)
    attn = tl.where(taken, attn, 0.0)
    return x - x0, y - y0, attn, token, top & left, top & right, bottom & left, bottom & right


@triton.jit
def unmasked(inside, mask_ptr, token):
    """Drop the pixels whose token the padding mask at mask_ptr hides."""
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=1) == 0)
    return inside


@triton.jit
def load_offsets(D: tl.constexpr, BLOCK_D: tl.constexpr, SPREAD: tl.constexpr):
    """Offsets that one value load touches in every row, and which of them exist."""
    if SPREAD == "words":
        d = tl.arange(0, BLOCK_D // 2)[None, :]
        return d, d < D // 2
    elif SPREAD == "halves":
        d = (tl.arange(0, BLOCK_D // 8) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
        return d, d < D // 2
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        return d, d < D


@triton.jit
def add_offsets(D: tl.constexpr, BLOCK_D: tl.constexpr, SPREAD: tl.constexpr):
    """Offsets that one red touches in every row, and which of them exist."""
    if SPREAD == "words" or SPREAD == "eights":
        d = (tl.arange(0, BLOCK_D // 8) * 8)[None, :, None] + tl.arange(0, 4)[None, None, :]
        return d, d < D
    else:
        return load_offsets(D, BLOCK_D, SPREAD)


@triton.jit
def as_column(x, offsets):
    """[BLOCK_Q] against offsets of two or three dimensions."""
    if len(offsets.shape) == 3:
        return x[:, None, None]
    else:
        return x[:, None]


@triton.jit
def load_pixel(ptrs, mask, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPREAD: tl.constexpr):
    """Channels of one pixel per row in the accumulator's dtype, zero where masked: [BLOCK_Q, BLOCK_D]."""
    if SPREAD == "words":
        # a bfloat16 is the upper half of a float32: one instruction a channel
        words = tl.load(ptrs, mask=mask, other=0)
        pair = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(pair, [pair.shape[0], BLOCK_D]).to(ACC)
    elif SPREAD == "halves":
        low = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        high = tl.load(ptrs + D // 2, mask=mask, other=0.0).to(ACC)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 3, 1, 2)), [low.shape[0], BLOCK_D])
    else:
        return widen(tl.load(ptrs, mask=mask, other=0.0), ACC)


@triton.jit
def add_pixel(ptrs, grad, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, SPREAD: tl.constexpr):
    """Add a row of grad [BLOCK_Q, BLOCK_D] to every pixel at ptrs that is not masked."""
    if SPREAD == "words" or SPREAD == "eights":
        low, high = tl.split(tl.permute(tl.reshape(grad, [grad.shape[0], BLOCK_D // 8, 2, 4]), (0, 1, 3, 2)))
        tl.atomic_add(ptrs, low, mask=mask, sem="relaxed")
        tl.atomic_add(ptrs + 4, high, mask=mask, sem="relaxed")
    elif SPREAD == "halves":
        low, high = tl.split(tl.permute(tl.reshape(grad, [grad.shape[0], 2, BLOCK_D // 8, 4]), (0, 2, 3, 1)))
        tl.atomic_add(ptrs, low, mask=mask, sem="relaxed")
        tl.atomic_add(ptrs + D // 2, high, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(ptrs, grad, mask=mask, sem="relaxed")
