"""What both launchers hand to their kernels: pointers, sizes, strides and the compile-time constants."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from msda_triton.constants import constant

MAX_BATCH = 65535  # programs along the last axis of a grid


def _vector(value: Tensor) -> tuple[int, int]:
    """(VEC, PACK) of bilinear.py: channels in 16 bytes, or 0 where they do not fit, and channels a word."""
    D = value.shape[-1]
    if value.dtype == torch.float32:
        return (4, 1) if D >= 4 and D & (D - 1) == 0 else (0, 1)
    if value.dtype == torch.float64 or D % 8:
        return 0, 1
    words = value.dtype == torch.bfloat16 and value.storage_offset() % 2 == 0
    words = words and all(stride % 2 == 0 for stride in value.stride()[:-1])
    return 8, 2 if words else 1


def kernel_arguments(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    num_points: list[int],
    reference_points: Tensor | None,
    value_mask: Tensor | None,
    query_sizes: list[int],
) -> dict:
    """The arguments that forward and backward share, by name.

    query_sizes: H, W of each level, if the host knows them and the queries are as many as the levels have pixels: they
    are then taken in rectangles instead of runs, whose samples lie closer together. Else empty.
    """
    S, M, D = value.shape[1:]
    Q, K = weights.shape[1], weights.shape[3]
    L = len(num_points)
    uniform = len(set(num_points)) == 1
    if value.stride(-1) != 1:
        # of a tensor without elements any strides are contiguous
        value = value.contiguous() if value.numel() else value.new_empty(value.shape)
    vec, pack = _vector(value)
    if pack == 2:
        value = value.view(torch.int32)
    tensors = [value, locations, weights, *([] if reference_points is None else [reference_points])]
    double = any(x.dtype == torch.float64 for x in tensors)
    return {
        "value_ptr": value,
        "shapes_ptr": spatial_shapes.contiguous(),
        "starts_ptr": None if level_start_index is None else level_start_index.contiguous(),
        "points_ptr": None if uniform else constant(tuple(num_points), value, torch.int32),
        "loc_ptr": locations.contiguous(),
        "attn_ptr": weights.contiguous(),
        "ref_ptr": None if reference_points is None else reference_points.contiguous(),
        "mask_ptr": None if value_mask is None else value_mask.contiguous().view(torch.uint8),
        "S": S,
        "Q": Q,
        "stride_vb": value.stride(0),
        "stride_vm": value.stride(2),
        "q_bucket": triton.next_power_of_2(Q),
        "STRIDE_VS": value.stride(1),
        "M": M,
        "D": D,
        "L": L,
        "P": num_points[0] if uniform else 0,
        "K": K,
        "REF_DIM": 0 if reference_points is None else reference_points.shape[-1],
        "REF_L": 1 if reference_points is None else reference_points.shape[2],
        "ACC": tl.float64 if double else tl.float32,
        "PACK": pack,
        "VEC": vec,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_K": triton.next_power_of_2(K),
        # a program of up to 128 queries counts from its first one in 32 bits
        "PIXELS": 0 < max(query_sizes, default=0) * 128 * M * max(D, 4 * K) < 2**31,
    }


def grid(B: int, Q: int, M: int, query_sizes: list[int]):
    """One program per tile of queries, head and image."""

    def size(meta):
        split, P = meta.get("SPLIT", 1), meta["P"]
        share = split if P > 0 and P % split == 0 else 1
        rows = min(max(meta["TILE"] // (meta["BLOCK_D"] * (1 if meta["VEC"] else 8)), share), 128)
        block_q = rows // share
        if not meta["PIXELS"] or not meta["TILE_W"]:
            return triton.cdiv(Q, block_q), M, B
        width = min(meta["TILE_W"], block_q)
        pairs = zip(query_sizes[::2], query_sizes[1::2], strict=True)
        return sum(triton.cdiv(h, block_q // width) * triton.cdiv(w, width) for h, w in pairs), M, B

    return size


def batches(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """The tensors [B, ...] in runs of MAX_BATCH images."""
    B = tensors[0].shape[0]
    runs = [slice(i, i + MAX_BATCH) for i in range(0, B, MAX_BATCH)]
    return [tuple(None if x is None else x[run] for x in tensors) for run in runs]


def joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, which autocast would hold to its dtype."""
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for i, part in zip(range(0, len(out), len(parts[0])), parts, strict=True):
        out[i : i + len(part)] = part
    return out


def on_device(tensor: Tensor):
    """Context in which the tensor's device is the current one, where kernels are launched."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)
