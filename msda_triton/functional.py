"""`ms_deform_attn` and `ms_deform_attn_fused`: validation and the choice of a backend."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from msda_triton.op import AttentionBackward, attention, locations_and_weights, reference_attention

BACKENDS = ("auto", "triton", "torch", "inductor")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices call themselves cuda
METHODS = ("default", "discrete", "discrete_h")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Tensor | Sequence[int] | None = None,
    num_points: Sequence[int] | None = None,
    method: str = "default",
    backend: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention: sample, weigh and sum (Deformable DETR, arXiv 2010.04159, equation 3).

    B batch, S = sum of H_l * W_l tokens, Q queries, M heads, D channels per head, L levels, P points per level.

    Args:
        value: [B, S, M, D], float16, bfloat16, float32 or float64; read in place through any strides whose last is 1.
        spatial_shapes: [L, 2] (H, W) of the levels: an integer tensor on any device, or pairs of ints.
        sampling_locations: [B, Q, M, L, P, 2] (x, y), any float dtype; [0, 1] is the level, padding included; what lies
            outside reads zeros. A location that is NaN or infinite contributes nothing and gets zero gradient.
        attention_weights: [B, Q, M, L, P], any float dtype.
        level_start_index: [L] first token of each level; None for levels stored one after the other.
        num_points: points of each level where they differ (RT-DETRv2, D-FINE); `sampling_locations` is then
            [B, Q, M, sum(num_points), 2] and `attention_weights` [B, Q, M, sum(num_points)].
        method: "default" is bilinear, as grid_sample with zeros padding and align_corners=False. "discrete" reads the
            pixel at floor(location * size + 0.5), clamped to the map, without gradient to the location (RT-DETRv2);
            "discrete_h" clamps x with H - 1 too, as the original RT-DETRv2 and D-FINE code does (the same on square
            maps; on wider ones its right part is never read).
        backend: "auto" takes Triton for tensors on a GPU and the PyTorch fallback elsewhere; "triton" never falls
            back; "torch" is the fallback, "inductor" the fallback compiled for CPUs (needs a C++ compiler).
    Returns:
        [B, Q, M * D] in value's dtype. Coordinates, weights and sums are float32 at least, whatever the inputs.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    locations, weights, num_points = _samples(
        value, "sampling_locations", sampling_locations, "attention_weights", attention_weights, num_points
    )
    levels = _levels(value, spatial_shapes, level_start_index, len(num_points))
    return _attend(value, levels, locations, weights, None, None, num_points, method, backend)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Tensor | Sequence[int] | None = None,
    value_mask: Tensor | None = None,
    num_points: Sequence[int] | None = None,
    method: str = "default",
    backend: str = "auto",
) -> Tensor:
    """`ms_deform_attn` with the softmax, the locations and the padding mask inside the kernel (appendix A.2 to A.4).

    Nothing of the size of the sampling locations is written to memory or saved for backward.

    Args:
        value, spatial_shapes, level_start_index, num_points, method, backend: as in `ms_deform_attn`.
        reference_points: [B, Q, L or 1, 2] points (x, y), offsets counting pixels of their level; or [B, Q, L or 1, 4]
            boxes (cx, cy, w, h), an offset of P points reaching half the box's size. In [0, 1] of the padded image.
        sampling_offsets: [B, Q, M, L, P, 2] (x, y), as the linear layer gives them.
        attention_logits: [B, Q, M, L, P], before the softmax over L and P.
        value_mask: [B, S] bool, True on padding: such tokens read as zeros.
    Returns:
        [B, Q, M * D] in value's dtype; gradients reach value, reference_points, sampling_offsets and attention_logits.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    offsets, logits, num_points = _samples(
        value, "sampling_offsets", sampling_offsets, "attention_logits", attention_logits, num_points
    )
    L = len(num_points)
    shape, dtype, device = _facts("reference_points", reference_points)
    if not dtype.is_floating_point:
        raise TypeError(f"reference_points: expected a floating-point dtype, got {dtype}")
    _check_same_device("reference_points", device, value.device)
    B, Q = offsets.shape[:2]
    if len(shape) != 4 or shape[:2] != (B, Q) or shape[2] not in (1, L) or shape[3] not in (2, 4):
        _raise_shape("reference_points", f"({B}, {Q}, {L} or 1, 2 or 4)", shape)
    if value_mask is not None:
        if value_mask.dtype != torch.bool:
            raise TypeError(f"value_mask: expected a bool tensor (True on padding), got {value_mask.dtype}")
        if value_mask.shape != value.shape[:2]:
            _raise_shape("value_mask", value.shape[:2], value_mask.shape)
        _check_same_device("value_mask", value_mask.device, value.device)
    levels = _levels(value, spatial_shapes, level_start_index, L)
    return _attend(value, levels, offsets, logits, reference_points, value_mask, num_points, method, backend)


def ms_deform_attn_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `ms_deform_attn` by itself, for code that keeps its own autograd functions.

    Args:
        grad_out: [B, Q, M * D], any strides. The others: as in `ms_deform_attn`.
    Returns:
        The gradients of value, sampling_locations and attention_weights, each in its input's shape and dtype.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    locations, weights, num_points = _samples(
        value, "sampling_locations", sampling_locations, "attention_weights", attention_weights, None
    )
    B, Q, M = weights.shape[:3]
    if grad_out.shape != (B, Q, M * value.shape[3]):
        _raise_shape("grad_out", (B, Q, M * value.shape[3]), grad_out.shape)
    _check_same_device("grad_out", grad_out.device, value.device)
    levels = _levels(value, spatial_shapes, level_start_index, len(num_points))
    sizes, needs = levels.of_queries(Q), [True, True, True, False]
    grad_value, grad_locations, grad_weights, _ = AttentionBackward.apply(
        grad_out, value, levels.shapes, levels.starts, locations, weights, None, None, num_points, "default", sizes,
        _backend(value, backend), needs,
    )  # fmt: skip
    return grad_value, grad_locations.view(sampling_locations.shape), grad_weights.view(attention_weights.shape)


class MSDeformAttnFunction:
    """Stands for the autograd function of the original CUDA extension; `im2col_step` is accepted and not needed."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """As `ms_deform_attn`, in the original's order of arguments: [B, S, M, D] -> [B, Q, M * D]."""
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            level_start_index=value_level_start_index,
        )


def _attend(value, levels, locations, weights, reference, mask, num_points, method, backend) -> Tensor:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    backend = _backend(value, backend)
    shapes, starts, _ = levels
    if backend == "triton":
        sizes = levels.of_queries(weights.shape[1])
        return attention(value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend)
    if torch.compiler.is_exporting():
        # plain operators, which ONNX, AOTInductor and other runtimes know
        return reference_attention(value, shapes, starts, locations, weights, reference, mask, num_points, method)
    if reference is not None:
        locations, weights = locations_and_weights(shapes, locations, weights, reference, num_points)
    if mask is not None:
        value = value.masked_fill(mask[:, :, None, None], 0)
    return attention(value, shapes, starts, locations, weights, None, None, num_points, method, [], backend)


def _raise_shape(name: str, expected, got):
    expected = expected if isinstance(expected, str) else tuple(expected)
    raise ValueError(f"{name}: expected shape {expected}, got {tuple(got)}")


def _check_same_device(name: str, device: torch.device, expected: torch.device) -> None:
    if device != expected:
        raise ValueError(f"{name}: expected on value's device {expected}, got {device}")


def _facts(name: str, x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """What is checked of a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x.shape, x.dtype, x.device


def _samples(
    value: Tensor, locations_name: str, locations: Tensor, weights_name: str, weights: Tensor, num_points
) -> tuple[Tensor, Tensor, list[int]]:
    """Locations [B, Q, M, K, 2] and weights [B, Q, M, K] that fit value [B, S, M, D], and the points of each level."""
    facts = _facts("value", value), _facts(locations_name, locations), _facts(weights_name, weights)
    points = None if num_points is None else tuple(num_points)
    check = _check_samples if torch.compiler.is_compiling() else _known_samples
    points = check(*facts, locations_name, weights_name, points)
    if num_points is None:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    return locations, weights, points


def _check_samples(value, locations, weights, locations_name: str, weights_name: str, num_points) -> list[int]:
    """The points of each level. Arguments: the `_facts` of tensors, and num_points of the caller."""
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
        if not dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point dtype, got {dtype}")
        _check_same_device(name, device, value[2])
    B, _, M, D = value[0]
    Q, sizes = locations[0][1], (sum(num_points),) if listed else locations[0][3:-1]
    if min(sizes) < 1:
        raise ValueError(f"{locations_name}: expected at least one level and point, got shape {tuple(locations[0])}")
    if D < 1 or M < 1:
        raise ValueError(f"value: expected at least one head and one channel, got shape {tuple(value[0])}")
    if locations[0] != (B, Q, M, *sizes, 2):
        _raise_shape(locations_name, f"({', '.join(map(str, (B, 'Q', M, *sizes, 2)))})", locations[0])
    if weights[0] != (B, Q, M, *sizes):
        _raise_shape(weights_name, (B, Q, M, *sizes), weights[0])
    return list(num_points) if listed else [sizes[1]] * sizes[0]


# the checks take longer than a small call may; what passed them once passes again
_known_samples = functools.lru_cache(maxsize=1024)(_check_samples)


class _Levels(NamedTuple):
    shapes: Tensor  # [L, 2] (H, W), on value's device
    starts: Tensor | None  # [L]
    sizes: tuple[tuple[int, int], ...] | None  # the shapes, if the host knows them

    def of_queries(self, Q: int) -> list[int]:
        """H, W of each level if the Q queries may be their pixels, else nothing: see `launch.kernel_arguments`."""
        if self.sizes is None or torch.compiler.is_exporting() or sum(H * W for H, W in self.sizes) != Q:
            return []
        return [n for size in self.sizes for n in size]


def _levels(value: Tensor, spatial_shapes, level_start_index, L: int) -> _Levels:
    """Level sizes and starts as tensors on value's device, checked against S where the host knows them."""
    S, device = value.shape[1], value.device
    if level_start_index is None and isinstance(spatial_shapes, (list, tuple)) and not torch.compiler.is_compiling():
        key = tuple(spatial_shapes)
        if set(map(type, key)) == {tuple}:
            return _listed_levels(key, S, L, device)
    return _checked_levels(spatial_shapes, level_start_index, S, L, device)


@functools.lru_cache(maxsize=1024)
def _listed_levels(spatial_shapes: tuple[tuple[int, int], ...], S: int, L: int, device: torch.device) -> _Levels:
    """Checked once."""
    return _checked_levels(spatial_shapes, None, S, L, device)


def _checked_levels(spatial_shapes, level_start_index, S: int, L: int, device: torch.device) -> _Levels:
    shapes, sizes = _integers("spatial_shapes", spatial_shapes, (L, 2), device)
    if level_start_index is None:
        starts, first = None, None
    else:
        starts, first = _integers("level_start_index", level_start_index, (L,), device)
    if sizes is not None and (starts is None or first is not None):
        tokens = [h * w for h, w in sizes]
        if starts is None:
            if sum(tokens) != S:
                raise ValueError(f"spatial_shapes: expected areas that sum to S = {S} of value, got {list(sizes)}")
        elif any(f < 0 or f + n > S for f, n in zip(first, tokens, strict=True)):
            raise ValueError(
                f"level_start_index: expected levels inside the S = {S} tokens of value, got {list(first)} "
                f"for spatial_shapes {list(sizes)}"
            )
        if any(h < 0 or w < 0 for h, w in sizes):
            raise ValueError(f"spatial_shapes: expected sizes of at least 0, got {list(sizes)}")
    return _Levels(shapes, starts, sizes)


def _integers(name: str, x, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple | None]:
    """x as an integer tensor on the device, and its values if the host has them: no device is ever waited for."""
    if isinstance(x, Tensor):
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")
        if x.shape != shape:
            _raise_shape(name, shape, x.shape)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            _check_same_device(name, x.device, device)
            return x, None
        values = x.tolist()
    else:
        values = [tuple(row) if isinstance(row, Sequence) else row for row in x]
        lengths = [len(row) for row in values if isinstance(row, tuple)]
        if len(values) != shape[0] or (len(shape) == 2 and lengths != [2] * shape[0]):
            raise ValueError(f"{name}: expected {' x '.join(map(str, shape))} integers, got {x!r}")
        numbers = [n for row in values for n in row] if len(shape) == 2 else values
        if not all(isinstance(n, (Integral, torch.SymInt)) for n in numbers):
            raise TypeError(f"{name}: expected integers, got {x!r}")
    values = tuple(tuple(row) for row in values) if len(shape) == 2 else tuple(values)
    if not isinstance(x, Tensor) or x.device != device:
        make = _new_constant if torch.compiler.is_compiling() else _constant
        x = make(values, device)
    return x, values


def _new_constant(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _constant(values: tuple, device: torch.device) -> Tensor:
    # copied to the device once, so that later calls neither copy nor wait; a graph keeps its constants by itself.
    # One that was made in inference mode could not be saved for backward by a later call.
    return _new_constant(values, device)


@functools.cache
def _warn_no_triton(device_type: str) -> None:
    warnings.warn(
        f"backend='auto': triton is not installed, so tensors on {device_type} take the slow PyTorch fallback; "
        "pip install triton",
        stacklevel=4,
    )


def _backend(value: Tensor, backend: str) -> str:
    """ "triton" or "torch", for "auto" by the device of value."""
    device = value.device.type
    if backend == "auto":
        if device not in TRITON_DEVICES:
            return "torch"
        if not TRITON_INSTALLED:
            _warn_no_triton(device)
            return "torch"
        return "triton"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "inductor" and device != "cpu":
        raise ValueError(f"backend: 'inductor' needs tensors on the CPU, got {device}")
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise ValueError("backend: 'triton' needs the package triton, which is not installed")
        if device not in TRITON_DEVICES and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                f"backend: 'triton' needs tensors on {' or '.join(TRITON_DEVICES)}, got {device} "
                "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
            )
    return backend
