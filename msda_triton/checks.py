"""What the public functions accept: a wrong argument is named, with what was expected and what came."""

import contextlib
import functools
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from msda_triton.call import Call
from msda_triton.constants import constant, traced

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_LIMIT = 2**31  # of a level's height and width


# what is checked of a tensor
Facts = tuple[torch.Size, torch.dtype, torch.device]


def facts(name: str, x: Tensor) -> Facts:
    """Shape, dtype and device of a tensor, which must be an ordinary one.

    Raises:
        TypeError: no tensor. ValueError: sparse, nested or of another layout.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
    if not torch.compiler.is_compiling() and x.is_nested:  # of the older kind, which claims to be strided
        raise ValueError(f"{name}: expected a dense tensor, got a nested one")
    return x.shape, x.dtype, x.device


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raises a TypeError for a dtype that no kernel reads."""
    if dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")


def raise_shape(name: str, expected, got) -> None:
    """The error of a shape that does not fit."""
    expected = expected if isinstance(expected, str) else tuple(expected)
    raise ValueError(f"{name}: expected shape {expected}, got {tuple(got)}")


def check_device(name: str, device: torch.device, expected: torch.device) -> None:
    """Raises a ValueError if a tensor is not where value is."""
    if device != expected:
        raise ValueError(f"{name}: expected on value's device {expected}, got {device}")


def check_mask(name: str, mask: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Of a padding mask [B, S]."""
    got, dtype, mask_device = facts(name, mask)
    if dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True on padding), got {dtype}")
    if got != tuple(shape):
        raise_shape(name, shape, got)
    check_device(name, mask_device, device)


def count(name: str, n) -> int:
    """n, an integer of at least 1."""
    if not isinstance(n, Integral) or isinstance(n, bool):
        raise TypeError(f"{name}: expected an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"{name}: expected at least 1, got {n}")
    return int(n)


def _listed(name: str, x, expected: str) -> list:
    """The entries of a list, tuple, other sequence or NumPy array."""
    if not isinstance(x, (list, tuple)):
        if hasattr(x, "tolist") and not isinstance(x, (Tensor, type)):
            x = x.tolist()
        if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
            raise TypeError(f"{name}: expected {expected}, got {x!r}")
    return list(x)


def _integers(name: str, x, numbers: Sequence, expected: str) -> tuple[int, ...]:
    """numbers, which must be integers, as Python's own; x is what the caller gave."""
    found = []
    for n in numbers:
        if type(n) is not int and not isinstance(n, torch.SymInt):
            if not isinstance(n, Integral) or isinstance(n, bool):
                raise TypeError(f"{name}: expected {expected}, got {x!r}")
            n = int(n)
        found.append(n)
    return tuple(found)


def plain_call(
    value: Tensor, spatial_shapes, locations: Tensor, weights: Tensor, level_start_index=None, num_points=None,
    names: tuple[str, str] = ("sampling_locations", "attention_weights"), *fused: Tensor | None,
) -> Call:  # fmt: skip
    """The arguments of `functional.ms_deform_attn` as a `Call`.

    Args:
        names: of locations and weights, for messages. fused: the last fields of the call, checked by who gives them.
    """
    points = None
    if num_points is not None:
        expected = "the number of points of each level, as integers"
        points = _integers("num_points", num_points, _listed("num_points", num_points, expected), expected)
    found = facts("value", value), facts(names[0], locations), facts(names[1], weights)
    known = not traced(value, locations, weights)
    points = (_known_samples if known else _check_samples)(*found, *names, points)
    shapes, starts, sizes, first = _levels(value, spatial_shapes, level_start_index, len(points), known)
    return Call(value, shapes, starts, locations, weights, points, sizes, first, *fused)


def fused_call(
    value: Tensor, spatial_shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor, level_start_index=None,
    value_mask: Tensor | None = None, num_points=None,
) -> Call:  # fmt: skip
    """The arguments of `functional.ms_deform_attn_fused` as a `Call`."""
    names = "sampling_offsets", "attention_logits"
    fused = reference_points, value_mask
    call = plain_call(value, spatial_shapes, offsets, logits, level_start_index, num_points, names, *fused)
    check_reference_points(reference_points, offsets, len(call.num_points))
    if value_mask is not None:
        check_mask("value_mask", value_mask, value.shape[:2], value.device)
    return call


def check_reference_points(reference_points: Tensor, offsets: Tensor, L: int) -> None:
    """Raises a ValueError or TypeError if reference points do not fit offsets [B, Q, ...] and L levels."""
    shape, dtype, device = facts("reference_points", reference_points)
    check_float("reference_points", dtype)
    check_device("reference_points", device, offsets.device)
    B, Q = offsets.shape[:2]
    if len(shape) != 4 or shape[:2] != (B, Q) or shape[2] not in (1, L) or shape[3] not in (2, 4):
        raise_shape("reference_points", f"({B}, {Q}, {L} or 1, 2 or 4)", shape)


def _check_samples(
    value: Facts, locations: Facts, weights: Facts, locations_name: str, weights_name: str, num_points
) -> tuple[int, ...]:
    """The points of each level."""
    listed = num_points is not None
    points = "K" if listed else "L, P"
    layouts = "[B, S, M, D]", f"[B, Q, M, {points}, 2]", f"[B, Q, M, {points}]"
    if listed and (not num_points or min(num_points) < 1):
        raise ValueError(
            f"num_points: expected at least one point for each of at least one level, got {list(num_points)}"
        )
    names = "value", locations_name, weights_name
    for name, layout, (shape, dtype, device) in zip(names, layouts, (value, locations, weights), strict=True):
        rank = layout.count(",") + 1
        if len(shape) != rank:
            raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(shape)}")
        check_float(name, dtype)
        check_device(name, device, value[2])
    (B, _, M, D), shape = value[0], locations[0]
    Q, sizes = shape[1], (sum(num_points),) if listed else shape[3:-1]
    if min(sizes) < 1:
        raise ValueError(f"{locations_name}: expected at least one level and point, got shape {tuple(shape)}")
    if D < 1 or M < 1:
        raise ValueError(f"value: expected at least one head and one channel, got shape {tuple(value[0])}")
    if shape != (B, Q, M, *sizes, 2):
        raise_shape(locations_name, f"({', '.join(map(str, (B, 'Q', M, *sizes, 2)))})", shape)
    if weights[0] != (B, Q, M, *sizes):
        raise_shape(weights_name, (B, Q, M, *sizes), weights[0])
    return num_points if listed else (sizes[1],) * sizes[0]


# the checks take longer than a small call may; what passed them once passes again
_known_samples = functools.lru_cache(maxsize=1024)(_check_samples)


def _levels(
    value: Tensor, spatial_shapes, level_start_index, L: int, known: bool
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], tuple[int, ...]]:
    """The fields of a Call: sizes and starts of the levels, as tensors on value's device or as integers.

    Checked against S where they are known.

    Args:
        spatial_shapes, level_start_index: as in `functional.ms_deform_attn`, for L levels. known: nothing is traced.
    """
    if known and level_start_index is None:
        numbers = _pairs_of_usual_classes(spatial_shapes)
        with contextlib.suppress(TypeError):  # something in there is no integer: what follows says so
            if numbers:
                return None, None, _known_sizes(value.shape[1], L, *numbers), ()
    sizes = starts = None
    if isinstance(spatial_shapes, Tensor):
        numbers = _check_integer_tensor("spatial_shapes", spatial_shapes, (L, 2), value, known)
        if numbers is not None:
            sizes = tuple([tuple(row) for row in numbers])
    else:
        sizes = _size_pairs(spatial_shapes, L)
    if isinstance(level_start_index, Tensor):
        starts = _check_integer_tensor("level_start_index", level_start_index, (L,), value, known)
        starts = None if starts is None else tuple(starts)
    elif level_start_index is not None:
        expected = f"{L} integers"
        starts = _listed("level_start_index", level_start_index, expected)
        if len(starts) != L:
            raise ValueError(f"level_start_index: expected {expected}, got {level_start_index!r}")
        starts = _integers("level_start_index", level_start_index, starts, "integers")
    in_order = level_start_index is None
    (_known_levels if known else _check_levels)(sizes, starts, in_order, value.shape[1])
    # a caller's own tensor may be one of inference mode, or be changed later: its numbers are enough if they are known
    shapes = spatial_shapes if sizes is None else None
    first = level_start_index if starts is None else None
    return shapes, first, _flat(sizes or ()), starts or ()


def _flat(pairs) -> tuple[int, ...]:
    return tuple([n for pair in pairs for n in pair])


def _pairs_of_usual_classes(x) -> list:
    """The numbers in a list or tuple of pairs that are lists or tuples; empty if it is anything else."""
    numbers = []
    if isinstance(x, (list, tuple)):
        for row in x:
            if not isinstance(row, (tuple, list)) or len(row) != 2:  # a torch.Size is a tuple
                return []
            numbers += row
    return numbers


def level_shapes(spatial_shapes, L: int, like: Tensor) -> Tensor:
    """[L, 2] (H, W) on like's device, of what `functional.ms_deform_attn` takes as spatial_shapes."""
    if isinstance(spatial_shapes, Tensor):
        sizes = _check_integer_tensor("spatial_shapes", spatial_shapes, (L, 2), like, not traced(like))
        sizes = sizes and tuple(map(tuple, sizes))
    else:
        sizes = _size_pairs(spatial_shapes, L)
    _check_sizes(sizes)
    return spatial_shapes if sizes is None else constant(sizes, like)


# typed: 2.0 and True are no sizes, though they equal 2 and 1
@functools.lru_cache(maxsize=1024, typed=True)
def _known_sizes(S: int, L: int, *numbers: int) -> tuple[int, ...]:
    """Heights and widths of the levels in turn, checked."""
    sizes = _size_pairs(list(zip(numbers[::2], numbers[1::2], strict=True)), L)
    _check_levels(sizes, None, True, S)
    return _flat(sizes)


def _size_pairs(x, L: int) -> tuple[tuple[int, int], ...]:
    expected = "an integer tensor [L, 2] or a pair of integers (H, W) for each level"
    rows = [_listed("spatial_shapes", row, expected) for row in _listed("spatial_shapes", x, expected)]
    if len(rows) != L or any(len(row) != 2 for row in rows):
        raise ValueError(f"spatial_shapes: expected {L} x 2 integers, got {x!r}")
    return tuple([_integers("spatial_shapes", x, row, "integers") for row in rows])


def _check_integer_tensor(name: str, x: Tensor, shape: tuple[int, ...], value: Tensor, known: bool) -> list | None:
    """The numbers in x, if the host has them: no device is ever waited for."""
    got, dtype, device = facts(name, x)
    if dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {dtype}")
    if got != shape:
        raise_shape(name, shape, got)
    if known and on_host(x) and not traced(x):
        return x.tolist()
    check_device(name, device, value.device)
    return None


def on_host(x: Tensor) -> bool:
    """Whether the numbers in x can be read without waiting for a device."""
    return x.device.type == "cpu"


def _check_sizes(sizes) -> None:
    """Of spatial_shapes, None where only the device has them."""
    if sizes is not None and any(not 0 <= n < _LIMIT for size in sizes for n in size):
        raise ValueError(f"spatial_shapes: expected sizes of at least 0 and below 2^31, got {list(sizes)}")


def _check_levels(sizes, starts, in_order: bool, S: int) -> None:
    """Arguments: the numbers of spatial_shapes and level_start_index, None where only the device has them."""
    _check_sizes(sizes)
    if sizes is not None:
        tokens = [h * w for h, w in sizes]
        if in_order and sum(tokens) != S:
            raise ValueError(f"spatial_shapes: expected areas that sum to S = {S} of value, got {list(sizes)}")
    else:
        tokens = [0] * len(starts or ())
    if starts is not None and any(first < 0 or first + n > S for first, n in zip(starts, tokens, strict=True)):
        sizes = "" if sizes is None else f" for spatial_shapes {list(sizes)}"
        raise ValueError(
            f"level_start_index: expected levels inside the S = {S} tokens of value, got {list(starts)}{sizes}"
        )


_known_levels = functools.lru_cache(maxsize=1024)(_check_levels)
