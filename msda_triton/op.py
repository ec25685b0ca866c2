"""The registered operators of `msda_triton::`, and the autograd functions around them.

`forward` and `backward` run the kernels, `fallback_forward` and `fallback_backward` the fallback for CPUs. Eager calls
pass through the autograd functions `Attention` and `AttentionBackward`, which cost less than the dispatcher; the
operators have the same derivatives, for graphs that hold them. Triton is imported when a kernel first runs.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msda_triton.constants import traced
from msda_triton.fallback import fallback_backward, fallback_forward
from msda_triton.inductor import inductor_backward, inductor_forward
from msda_triton.reference import ms_deform_attn_reference, reference_attention

_PLAIN = (
    "Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor locations, Tensor weights, "
    "SymInt[] num_points"
)
_INPUTS = f"{_PLAIN}, Tensor? reference_points, Tensor? value_mask, SymInt[] query_sizes"
_library = torch.library.Library("msda_triton", "DEF")
for _schema in (
    f"forward({_INPUTS}) -> Tensor",
    f"backward(Tensor grad_out, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    f"fallback_forward({_PLAIN}) -> Tensor",
    f"fallback_backward(Tensor grad_out, {_PLAIN}, bool[] needs) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward(value, shapes, starts, locations, weights, num_points, points, mask, sizes):
    from msda_triton.forward import launch_forward
    from msda_triton.launch import on_device

    with on_device(value):
        return launch_forward(value, shapes, starts, locations, weights, num_points, points, mask, sizes)


def _backward(grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs):
    from msda_triton.backward import launch_backward
    from msda_triton.launch import on_device

    with on_device(value):
        grads = launch_backward(
            grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs
        )
    return _without_none(value, grads)


def _fallback_backward(grad_out, value, shapes, starts, locations, weights, num_points, needs):
    grads = fallback_backward(grad_out, value, shapes, starts, locations, weights, num_points, tuple(needs))
    return tuple(grad.contiguous() for grad in _without_none(value, grads))


def _without_none(value: Tensor, grads) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an empty one stands for a gradient that nobody asked for."""
    return tuple(value.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(value, shapes, starts, locations, weights, *_):
    return value.new_empty(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


def _backward_fake(grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs):
    return _empty_gradients(value, (value, locations, weights, points), needs)


def _fallback_backward_fake(grad_out, value, shapes, starts, locations, weights, num_points, needs):
    return _empty_gradients(value, (value, locations, weights), needs)


def _empty_gradients(value: Tensor, inputs, needs) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else value.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _leaf(x: Tensor | None, connected: bool) -> Tensor | None:
    """x as an input of its own, whatever it is computed from; connected: x gets the gradients of its gradients."""
    if x is None or (connected and x.requires_grad):
        return None if x is None else x.view_as(x)
    return x.detach().requires_grad_()


class Attention(torch.autograd.Function):
    """Attention with one pass per direction. Locations are offsets and weights logits if reference points are given."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, num_points, points, mask, sizes, backend):
        ctx.save_for_backward(value, shapes, starts, locations, weights, points, mask)
        ctx.options = num_points, sizes, backend
        return _result(value, shapes, starts, locations, weights, num_points, points, mask, sizes, backend)

    @staticmethod
    def backward(ctx, grad_out):
        value, shapes, starts, locations, weights, points, mask = ctx.saved_tensors
        num_points, sizes, backend = ctx.options
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)] + [points is not None and ctx.needs_input_grad[6]]
        run = AttentionBackward.apply if torch.is_grad_enabled() else _gradients
        grads = run(
            grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs, backend
        )
        grad_value, grad_locations, grad_weights, grad_points = grads
        return grad_value, None, None, grad_locations, grad_weights, None, grad_points, None, None, None


class AttentionBackward(torch.autograd.Function):
    """The backward of `Attention`, whose own gradient goes through the differentiable reference."""

    @staticmethod
    def forward(
        ctx, grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs, backend
    ):
        ctx.save_for_backward(grad_out, value, shapes, starts, locations, weights, points, mask)
        ctx.options = num_points, needs
        return _gradients(
            grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs, backend
        )

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_out, value, shapes, starts, locations, weights, points, mask = ctx.saved_tensors
        num_points, needs = ctx.options
        if not any(needs):
            return (None,) * 12
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            grad_out, *inputs = (_leaf(x, higher) for x in (grad_out, value, locations, weights, points))
            out = reference_attention(inputs[0], shapes, starts, *inputs[1:3], num_points, inputs[3], mask)
            wanted = [x for x, need in zip(inputs, needs, strict=False) if need]  # the fallback has no fourth
            grads = torch.autograd.grad(out, wanted, grad_out, create_graph=True)
            given = [g for g, need in zip(grad_grads, needs, strict=True) if need]
            second = [x for x in (grad_out, *inputs) if x is not None]
            results = iter(torch.autograd.grad(grads, second, given, create_graph=higher, allow_unused=True))
        grad_grad_out, value, locations, weights, points = (
            None if x is None else next(results) for x in (grad_out, *inputs)
        )
        return grad_grad_out, value, None, None, locations, weights, None, points, None, None, None, None


def attention(value, shapes, starts, locations, weights, num_points, points, mask, sizes, backend) -> Tensor:
    """`Attention.apply`, or what it does without its cost where no gradient can be asked for."""
    inputs = (value, shapes, starts, locations, weights, num_points, points, mask, sizes, backend)
    if torch.is_grad_enabled():
        if value.requires_grad or locations.requires_grad or weights.requires_grad:
            return Attention.apply(*inputs)
        if points is not None and points.requires_grad:
            return Attention.apply(*inputs)
    return _result(*inputs)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """An operator without a forward-mode derivative answers that it is zero, in silence."""
    tracing = torch.compiler.is_compiling()  # then inside of a jvp that is compiled too
    if tracing or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "multi-scale deformable attention has no forward-mode derivative (jvp, jacfwd): "
            "torch.autograd.grad has reverse-mode ones of every order"
        )


def _result(value, shapes, starts, locations, weights, num_points, points, mask, sizes, backend) -> Tensor:
    inputs = (value, shapes, starts, locations, weights, num_points)
    if forward_ad._current_level >= 0:
        _refuse_tangents(value, locations, weights, points)
    if backend == "triton":
        return _forward_op(*inputs, points, mask, sizes)
    if value.device.type != "cpu":
        return ms_deform_attn_reference(*inputs)
    if traced(value, locations, weights):
        return _fallback_forward_op(*inputs)
    return (inductor_forward if backend == "inductor" else fallback_forward)(*inputs)


def _gradients(
    grad_out, value, shapes, starts, locations, weights, num_points, points, mask, sizes, needs, backend
) -> tuple[Tensor | None, ...]:
    inputs = (grad_out, value, shapes, starts, locations, weights, num_points)
    if forward_ad._current_level >= 0:
        _refuse_tangents(grad_out, value, locations, weights, points)
    if backend == "triton":
        return _with_none(_backward_op(*inputs, points, mask, sizes, needs), needs)
    if value.device.type != "cpu":
        return *_reference_gradients(*inputs, needs[:3]), None
    if traced(value, locations, weights, grad_out):
        return *_with_none(_fallback_backward_op(*inputs, needs[:3]), needs[:3]), None
    run = inductor_backward if backend == "inductor" else fallback_backward
    return *run(*inputs, tuple(needs[:3])), None


def _with_none(grads, needs) -> tuple[Tensor | None, ...]:
    """The inverse of `_without_none`."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _reference_gradients(grad_out, value, shapes, starts, locations, weights, num_points, needs):
    """Of value, locations and weights, on devices that neither the kernels nor the fallback are for."""
    inputs = [x.detach().requires_grad_(need) for x, need in zip((value, locations, weights), needs, strict=True)]
    with torch.enable_grad():
        out = ms_deform_attn_reference(inputs[0], shapes, starts, *inputs[1:], num_points)
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, materialize_grads=True) if wanted else ())
    return tuple(next(grads) if need else None for need in needs)


def _keep_forward(ctx, inputs, output) -> None:
    value, shapes, starts, locations, weights, num_points, *fused = inputs
    points, mask, sizes = fused or (None, None, [])
    ctx.save_for_backward(value, shapes, starts, locations, weights, points, mask)
    ctx.options = num_points, sizes, "triton" if fused else "torch"


def _keep_backward(ctx, inputs, output) -> None:
    *tensors, num_points, points, mask, _, needs = inputs
    ctx.save_for_backward(*tensors, points, mask)
    ctx.options = num_points, needs


def _keep_fallback_backward(ctx, inputs, output) -> None:
    *tensors, num_points, needs = inputs
    ctx.save_for_backward(*tensors, None, None)
    ctx.options = num_points, needs


def _register_derivatives() -> None:
    """The operators' own, by the autograd functions; they lack `backend`, and the fallback's all that is fused."""
    register = functools.partial(torch.library.register_autograd, lib=_library)
    first, second = Attention.backward, AttentionBackward.backward
    register("msda_triton::forward", lambda ctx, grad: first(ctx, grad)[:9], setup_context=_keep_forward)
    register("msda_triton::fallback_forward", lambda ctx, grad: first(ctx, grad)[:6], setup_context=_keep_forward)
    register("msda_triton::backward", lambda ctx, *grads: second(ctx, *grads)[:11], setup_context=_keep_backward)
    register(
        "msda_triton::fallback_backward",
        lambda ctx, *grads: (*second(ctx, *grads)[:7], None),
        setup_context=_keep_fallback_backward,
    )


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
_library.impl("fallback_forward", fallback_forward, "CPU")
_library.impl("fallback_backward", _fallback_backward, "CPU")
torch.library.register_fake("msda_triton::forward", _forward_fake)
torch.library.register_fake("msda_triton::backward", _backward_fake)
torch.library.register_fake("msda_triton::fallback_forward", _forward_fake)
torch.library.register_fake("msda_triton::fallback_backward", _fallback_backward_fake)
_register_derivatives()
_forward_op = torch.ops.msda_triton.forward.default
_backward_op = torch.ops.msda_triton.backward.default
_fallback_forward_op = torch.ops.msda_triton.fallback_forward.default
_fallback_backward_op = torch.ops.msda_triton.fallback_backward.default


def set_autotune(enabled: bool) -> None:
    """Whether the first call with new sizes times every kernel configuration, which takes seconds.

    Off by default: a table decides. Under `torch.use_deterministic_algorithms(True)` it always does.

    Raises:
        TypeError: no bool. RuntimeError: Triton is not installed.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    try:
        from msda_triton import tuning
    except ModuleNotFoundError as error:
        raise RuntimeError("set_autotune: needs the package triton, which is not installed") from error
    tuning.timing = enabled
