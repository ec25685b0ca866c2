"""`ms_deform_attn` and `ms_deform_attn_fused`: the public functions, and the choice of a backend."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msda_triton import checks
from msda_triton.call import Call
from msda_triton.constants import exporting, traced
from msda_triton.op import Attention, AttentionBackward, attend, needs_gradient
from msda_triton.reference import discrete_attention, ms_deform_attn_reference, plain

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
            maps; on wider ones its right part is never read). Both run the plain PyTorch formula
            (`reference.discrete_attention`) whatever the backend: no kernel, and memory for every sampled pixel.
        backend: "auto" takes Triton for tensors on a GPU and the PyTorch fallback elsewhere; "triton" never falls
            back; "torch" is the fallback, "inductor" the fallback compiled for CPUs (needs a C++ compiler).
    Returns:
        [B, Q, M * D] in value's dtype. Coordinates, weights and sums are float32 at least, whatever the inputs.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    call = checks.plain_call(
        value, spatial_shapes, sampling_locations, attention_weights, level_start_index, num_points
    )
    function, arguments = _resolve(call, method, backend)
    return function(*arguments)


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
    call = checks.fused_call(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits, level_start_index, value_mask,
        num_points,
    )  # fmt: skip
    function, arguments = _resolve(call, method, backend)
    return function(*arguments)


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
    call = checks.plain_call(value, spatial_shapes, sampling_locations, attention_weights, level_start_index)
    B, Q, M = call.weights.shape[:3]
    shape, dtype, device = checks.facts("grad_out", grad_out)
    if shape != (B, Q, M * value.shape[3]):
        checks.raise_shape("grad_out", (B, Q, M * value.shape[3]), shape)
    checks.check_float("grad_out", dtype)
    checks.check_device("grad_out", device, value.device)
    needs = [True, True, True, False]
    grad_value, grad_locations, grad_weights, _ = AttentionBackward.apply(
        grad_out, needs, *call, _backend(value, backend)
    )
    return grad_value, grad_locations, grad_weights


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


def _resolve(call: Call, method: str, backend: str) -> tuple[Callable[..., Tensor], tuple]:
    """What computes a call, and its arguments."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    backend = _backend(call.value, backend)
    if method != "default":
        return discrete_attention, (call, method)
    if backend != "triton":
        call = plain(call)
        exported = exporting() or torch.jit.is_tracing()
        if exported or (call.value.device.type != "cpu" and traced(call.value, call.locations, call.weights)):
            # plain operators, which ONNX, AOTInductor and other runtimes know
            return ms_deform_attn_reference, (call,)
    if needs_gradient(call):
        return Attention.apply, (*call, backend)
    return attend, (call, backend)


@functools.cache
def _warn_no_triton(device_type: str) -> None:
    warnings.warn(
        f"backend='auto': triton is not installed, so tensors on {device_type} take the slow PyTorch fallback; "
        "pip install triton",
        stacklevel=4,
    )


def check_backend(backend: str) -> None:
    """Raises a ValueError for a name that is none of BACKENDS."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def _backend(value: Tensor, backend: str) -> str:
    """ "triton" or "torch", for "auto" by the device of value."""
    check_backend(backend)
    device = value.device.type
    if backend == "auto":
        if device not in TRITON_DEVICES:
            return "torch"
        if not TRITON_INSTALLED:
            _warn_no_triton(device)
            return "torch"
        return "triton"
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
