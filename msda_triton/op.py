"""The registered operators `msda_triton::forward` and `::backward`, and the autograd functions around them.

Schemas and fakes are registered at import; Triton is imported when an operator first runs.
"""

import torch
from torch import Tensor

from msda_triton.fallback import fallback_backward, fallback_forward
from msda_triton.inductor import inductor_backward, inductor_forward
from msda_triton.reference import level_of_point, ms_deform_attn_reference

_INPUTS = (
    "Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor locations, Tensor weights, "
    "SymInt[] num_points, str method, Tensor? reference_points, Tensor? value_mask, SymInt[] query_sizes"
)
_library = torch.library.Library("msda_triton", "DEF")
_library.define(f"forward({_INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward(Tensor grad_out, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask, sizes):
    from msda_triton.forward import launch_forward
    from msda_triton.launch import on_device

    with on_device(value):
        return launch_forward(
            value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask, sizes
        )


def _backward(
    grad_out, value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask, sizes,
    needs,
):  # fmt: skip
    from msda_triton.backward import launch_backward
    from msda_triton.launch import on_device

    with on_device(value):
        grads = launch_backward(
            grad_out, value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask,
            sizes, needs,
        )  # fmt: skip
    # an operator returns tensors only: an empty one stands for a gradient that nobody asked for
    return tuple(value.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(
    value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask, sizes
):
    return value.new_empty(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


def _backward_fake(
    grad_out, value, spatial_shapes, level_start_index, locations, weights, num_points, method, reference, mask, sizes,
    needs,
):  # fmt: skip
    inputs = (value, locations, weights, reference)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else value.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("msda_triton::forward", _forward_fake)
torch.library.register_fake("msda_triton::backward", _backward_fake)
_forward_op = torch.ops.msda_triton.forward.default
_backward_op = torch.ops.msda_triton.backward.default


class Attention(torch.autograd.Function):
    """Attention with one pass per direction. Locations are offsets and weights logits if reference points are given."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend):
        ctx.save_for_backward(value, shapes, starts, locations, weights, reference, mask)
        ctx.options = num_points, method, sizes, backend
        return _result(value, shapes, starts, locations, weights, reference, mask, *ctx.options)

    @staticmethod
    def backward(ctx, grad_out):
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]
        if torch.is_grad_enabled():
            grads = AttentionBackward.apply(grad_out, *ctx.saved_tensors, *ctx.options, needs)
        else:
            grads = _gradients(grad_out, *ctx.saved_tensors, *ctx.options, needs)
        grad_value, grad_locations, grad_weights, grad_reference = grads
        return grad_value, None, None, grad_locations, grad_weights, grad_reference, None, None, None, None, None


class AttentionBackward(torch.autograd.Function):
    """The backward of `Attention`, whose own gradient goes through the differentiable reference."""

    @staticmethod
    def forward(
        ctx, grad_out, value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend,
        needs,
    ):  # fmt: skip
        ctx.save_for_backward(grad_out, value, shapes, starts, locations, weights, reference, mask)
        ctx.options = num_points, method, needs
        inputs = (grad_out, value, shapes, starts, locations, weights, reference, mask)
        return _gradients(*inputs, num_points, method, sizes, backend, needs)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_out, value, shapes, starts, locations, weights, reference, mask = ctx.saved_tensors
        num_points, method, needs = ctx.options
        with torch.enable_grad():
            inputs = [
                None if x is None else x.detach().requires_grad_() for x in (value, locations, weights, reference)
            ]
            grad_out = grad_out.detach().requires_grad_()
            out = reference_attention(inputs[0], shapes, starts, *inputs[1:], mask, num_points, method)
            wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
            grads = torch.autograd.grad(out, wanted, grad_out, create_graph=True)
            given = [g for g, need in zip(grad_grads, needs, strict=True) if need]
            second = [x for x in (grad_out, *inputs) if x is not None]
            results = iter(torch.autograd.grad(grads, second, given, allow_unused=True))
        grad_grad_out, value, locations, weights, reference = (
            None if x is None else next(results) for x in (grad_out, *inputs)
        )
        return grad_grad_out, value, None, None, locations, weights, reference, None, None, None, None, None, None


def attention(value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend) -> Tensor:
    """`Attention.apply`, or what it does without its cost where no gradient can be asked for."""
    inputs = (value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend)
    if torch.is_grad_enabled():
        if value.requires_grad or locations.requires_grad or weights.requires_grad:
            return Attention.apply(*inputs)
        if reference is not None and reference.requires_grad:
            return Attention.apply(*inputs)
    return _result(*inputs)


def _result(value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend) -> Tensor:
    if backend == "triton":
        return _forward_op(value, shapes, starts, locations, weights, num_points, method, reference, mask, sizes)
    run = inductor_forward if backend == "inductor" else fallback_forward
    return run(value, shapes, starts, locations, weights, num_points, method)


def _gradients(
    grad_out, value, shapes, starts, locations, weights, reference, mask, num_points, method, sizes, backend, needs
):
    if backend == "triton":
        grads = _backward_op(
            grad_out, value, shapes, starts, locations, weights, num_points, method, reference, mask, sizes, needs
        )
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    run = inductor_backward if backend == "inductor" else fallback_backward
    grads = run(grad_out, value, shapes, starts, locations, weights, num_points, method, tuple(needs[:3]))
    return (*grads, None)


def locations_and_weights(
    spatial_shapes: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, num_points: list[int]
) -> tuple[Tensor, Tensor]:
    """Sampling locations [B, Q, M, K, 2] and softmax weights [B, Q, M, K] of the fused inputs, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(offsets.dtype, reference_points.dtype), torch.float32)
    offsets, reference = offsets.to(dtype), reference_points.to(dtype)
    level = level_of_point(spatial_shapes, num_points)
    reference = reference[
        :, :, None, level if reference.shape[2] > 1 else torch.zeros_like(level)
    ]  # [B, Q, 1, K, 2 or 4]
    if reference.shape[-1] == 2:
        locations = reference + offsets / spatial_shapes.flip(-1)[level]
    else:
        points = torch.tensor(num_points, device=offsets.device, dtype=dtype)[level, None]
        locations = reference[..., :2] + offsets * (reference[..., 2:] * 0.5 / points)
    return locations, logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def reference_attention(value, shapes, starts, locations, weights, reference, mask, num_points, method) -> Tensor:
    """The reference for both forms of input."""
    if reference is not None:
        locations, weights = locations_and_weights(shapes, locations, weights, reference, num_points)
    if mask is not None:
        value = value.masked_fill(mask[:, :, None, None], 0)
    return ms_deform_attn_reference(value, shapes, starts, locations, weights, num_points, method)


def set_autotune(enabled: bool) -> None:
    """Whether the first call with new sizes times every kernel configuration, which takes seconds.

    Off by default: a table decides. Under `torch.use_deterministic_algorithms(True)` it always does.
    """
    from msda_triton import tuning

    tuning.timing = enabled
