"""The registered operators of `msda_triton::`, and the autograd functions around them.

`forward` and `backward` run the kernels, `fallback_forward` and `fallback_backward` the fallback for CPUs. Eager calls
go straight to what is behind them (`attend`), through the autograd functions `Attention` and `AttentionBackward` where
a gradient can be asked for: both cost less than the dispatcher. The operators have the same derivatives, for graphs
that hold them. Triton is imported when a kernel first runs.
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from msda_triton.call import Call
from msda_triton.constants import traced
from msda_triton.cpu.fallback import fallback_backward, fallback_forward
from msda_triton.cpu.inductor import inductor_backward, inductor_forward
from msda_triton.flops import tell_the_counter
from msda_triton.reference import ms_deform_attn_reference

# the fields of a Call, and those of plain ones, which the fallback has
_PLAIN = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor locations, Tensor weights, "
    "SymInt[] num_points, SymInt[] level_sizes, SymInt[] level_starts"
)
_FUSED = f"{_PLAIN}, Tensor? reference_points, Tensor? value_mask"
_library = torch.library.Library("msda_triton", "DEF")
for _schema in (
    f"forward({_FUSED}) -> Tensor",
    f"backward(Tensor grad_out, bool[] needs, {_FUSED}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"fallback_forward({_PLAIN}) -> Tensor",
    f"fallback_backward(Tensor grad_out, bool[] needs, {_PLAIN}) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_PLAIN_FIELDS = 8  # a Call's first ones, of which five are tensors
_PLAIN_TENSORS = 5


def _forward(*operands):
    return _kernels().forward(_for_kernels(_of_an_operator(operands)))


def _backward(grad_out, needs, *operands):
    call = _of_an_operator(operands, grad_out)
    return _without_none(call, _kernels().backward(grad_out, _for_kernels(call), needs))


def _fallback_forward(*operands):
    return fallback_forward(_of_an_operator(operands))


def _fallback_backward(grad_out, needs, *operands):
    call = _of_an_operator(operands)
    return tuple(grad.contiguous() for grad in _without_none(call, fallback_backward(grad_out, call, needs)))


@functools.cache
def _kernels():
    """The launchers, which need Triton."""
    from msda_triton.kernels import launch

    return launch


def _of_an_operator(operands, grad_out: Tensor | None = None) -> Call:
    """The call that an operator is asked for, perhaps by a graph, perhaps by hand."""
    call = Call(*operands)
    if call.spatial_shapes is None and len(call.level_sizes) != 2 * len(call.num_points):
        raise ValueError(
            f"level_sizes: expected {2 * len(call.num_points)} numbers, H and W of each level, or spatial_shapes; "
            f"got {list(call.level_sizes)}"
        )
    for name, x in (*zip(Call._fields, call, strict=True), ("grad_out", grad_out)):
        if isinstance(x, Tensor) and x.device != call.value.device:
            raise ValueError(f"{name}: expected on value's device {call.value.device}, got {x.device}")
    return call


def _for_kernels(call: Call) -> Call:
    """The call, whose memory a GPU can read: launches that are kept hand over pointers that nobody looks at."""
    device = call.value.device
    if not _has_kernels(device):
        raise ValueError(f"value: expected on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU), got {device}")
    return call


def _has_kernels(device: torch.device) -> bool:
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def _without_none(call: Call, grads) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an empty one stands for a gradient that nobody asked for."""
    return tuple(call.value.new_empty(0) if grad is None else grad for grad in grads)


def _with_none(grads, needs) -> tuple[Tensor | None, ...]:
    """The inverse of `_without_none`."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _forward_fake(*operands):
    call = Call(*operands)
    B, _, M, D = call.value.shape
    return call.value.new_empty(B, call.weights.shape[1], M * D)


def _backward_fake(grad_out, needs, *operands):
    call = Call(*operands)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else call.value.new_empty(0)
        for x, need in zip(_differentiable(call), needs, strict=False)  # the fallback has no fourth
    )


def _differentiable(call: Call) -> tuple[Tensor | None, ...]:
    return call.value, call.locations, call.weights, call.reference_points


def _save(ctx, call: Call, operands: Sequence, *tensors: Tensor) -> None:
    """Keep a call and some tensors besides, for `_saved`. operands: the call as a plain list or tuple."""
    # Dynamo of torch 2.7 cannot slice a named tuple, so the list is sliced
    ctx.save_for_backward(*operands[:_PLAIN_TENSORS], call.reference_points, call.value_mask, *tensors)
    ctx.numbers = operands[_PLAIN_TENSORS:_PLAIN_FIELDS]


def _saved(ctx) -> tuple:
    """The call and the tensors that were kept."""
    tensors = ctx.saved_tensors  # which torch.utils.checkpoint hands out once
    *plain, points, mask = tensors[: _PLAIN_TENSORS + 2]
    return Call(*plain, *ctx.numbers, points, mask), *tensors[_PLAIN_TENSORS + 2 :]


@functools.cache
def _ordinary(device: torch.device) -> set[int]:
    """Dispatch keys of ordinary tensors: with memory of their own, and of no class with a dispatch."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference), torch._C.DisableTorchFunction():
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return found


def _watched(call: Call, *tensors: Tensor) -> bool:
    """Whether somebody would see an operator: then it is called, and else what is behind it, which costs less.

    That is whoever traces; modes and classes of tensors with a `__torch_function__`; and a profiler, which shows its
    name. A tensor that is not ordinary is made so on the way: of batched gradients, of numbers that are another's,
    negated, of zeros without memory.
    """
    value, shapes, starts, locations, weights, _, _, _, points, mask = call
    tensors += (value, locations, weights)
    if shapes is not None or starts is not None or points is not None or mask is not None:
        tensors += tuple([x for x in (shapes, starts, points, mask) if x is not None])
    if traced(*tensors) or has_torch_function_variadic(*tensors) or torch.autograd._profiler_enabled():
        return True
    if torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0:  # of make_fx, which has a stack of its own for it
        return True
    ordinary, keys_of = _ordinary(value.device), torch._C._dispatch_keys
    for x in tensors:  # noqa: SIM110 - a call counts in microseconds
        if keys_of(x).raw_repr() not in ordinary:
            return True
    return False


class Attention(torch.autograd.Function):
    """Attention with one pass per direction: apply(*call, backend)."""

    @staticmethod
    def forward(ctx, *operands_and_backend):
        *operands, backend = operands_and_backend
        call = Call(*operands)
        _save(ctx, call, operands)
        ctx.backend = backend
        return attend(call, backend)

    @staticmethod
    def backward(ctx, grad_out):
        (call,) = _saved(ctx)
        # of a Call's fields and backend, of the fields alone (an operator), or of the plain ones (the fallback's)
        value, _, _, locations, weights, _, _, _, *fused = ctx.needs_input_grad
        needs = [value, locations, weights, call.reference_points is not None and fused[0]]
        if torch.is_grad_enabled():
            grads = AttentionBackward.apply(grad_out, needs, *call, ctx.backend)
        else:
            grads = attend_backward(grad_out, needs, call, ctx.backend)
        return *_in_their_places(grads), None


def attend(call: Call, backend: str) -> Tensor:
    """[B, Q, M * D] of a call, which autograd does not see."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(*_differentiable(call))
    if backend == "triton":
        return _forward_op(*call) if _watched(call) else _kernels().forward(call)
    if call.value.device.type != "cpu":
        return ms_deform_attn_reference(call)
    if traced(call.value, call.locations, call.weights):
        operands = list(call)
        return _fallback_forward_op(*operands[:_PLAIN_FIELDS])
    return inductor_forward(call) if backend == "inductor" else fallback_forward(call)


def attend_backward(grad_out: Tensor, needs: list[bool], call: Call, backend: str) -> tuple[Tensor | None, ...]:
    """Gradients of value, locations, weights and reference points, None for those that nobody needs."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(grad_out, *_differentiable(call))
    if backend == "triton":
        if _watched(call, grad_out):
            return _with_none(_backward_op(grad_out, needs, *call), needs)
        return _kernels().backward(grad_out, call, needs)
    needs = needs[:3]
    if call.value.device.type != "cpu":
        return *_reference_gradients(grad_out, call, needs), None
    if traced(call.value, call.locations, call.weights, grad_out):
        operands = list(call)
        return *_with_none(_fallback_backward_op(grad_out, needs, *operands[:_PLAIN_FIELDS]), needs), None
    run = inductor_backward if backend == "inductor" else fallback_backward
    return *run(grad_out, call, needs), None


class AttentionBackward(torch.autograd.Function):
    """The backward of `Attention`, whose own gradient goes through the differentiable reference.

    apply(grad_out, needs, *call, backend), with needs for value, locations, weights and reference points.
    """

    @staticmethod
    def forward(ctx, grad_out, needs, *operands_and_backend):
        *operands, backend = operands_and_backend
        call = Call(*operands)
        _save(ctx, call, operands, grad_out)
        ctx.needs = needs
        return attend_backward(grad_out, needs, call, backend)

    @staticmethod
    def backward(ctx, *grad_grads):
        call, grad_out = _saved(ctx)
        needs = ctx.needs
        if not any(needs):
            return (None,) * (2 + len(call) + 1)
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            grad_out, *inputs = (_leaf(x, higher) for x in (grad_out, *_differentiable(call)))
            value, locations, weights, points = inputs
            call = call.changed(value=value, locations=locations, weights=weights, reference_points=points)
            wanted = [x for x, need in zip(inputs, needs, strict=False) if need]  # the fallback has no fourth
            grads = torch.autograd.grad(ms_deform_attn_reference(call), wanted, grad_out, create_graph=True)
            given = [g for g, need in zip(grad_grads, needs, strict=True) if need]
            second = [x for x in (grad_out, *inputs) if x is not None]
            results = iter(torch.autograd.grad(grads, second, given, create_graph=higher, allow_unused=True))
        grad_grad_out, *grads = (None if x is None else next(results) for x in (grad_out, *inputs))
        return grad_grad_out, None, *_in_their_places(grads), None


def _in_their_places(grads) -> tuple[Tensor | None, ...]:
    """Gradients of value, locations, weights and reference points, as those of a Call's fields."""
    value, locations, weights, points = grads
    given = {"value": value, "locations": locations, "weights": weights, "reference_points": points}
    return tuple(given.get(name) for name in Call._fields)


def _leaf(x: Tensor | None, connected: bool) -> Tensor | None:
    """x as an input of its own, whatever it is computed from; connected: x gets the gradients of its gradients."""
    if x is None or (connected and x.requires_grad):
        return None if x is None else x.view_as(x)
    return x.detach().requires_grad_()


def _reference_gradients(grad_out: Tensor, call: Call, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Of value, locations and weights, on devices that neither the kernels nor the fallback are for."""
    inputs = [x.detach().requires_grad_(need) for x, need in zip(_differentiable(call), needs, strict=False)]
    value, locations, weights = inputs
    with torch.enable_grad():
        out = ms_deform_attn_reference(call.changed(value=value, locations=locations, weights=weights))
    wanted = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, materialize_grads=True) if wanted else ())
    return tuple(next(grads) if need else None for need in needs)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """An operator without a forward-mode derivative answers that it is zero, in silence."""
    tracing = torch.compiler.is_compiling()  # then inside of a jvp that is compiled too
    if tracing or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "multi-scale deformable attention has no forward-mode derivative (jvp, jacfwd): "
            "torch.autograd.grad has reverse-mode ones of every order"
        )


def needs_gradient(call: Call) -> bool:
    """Whether a gradient of a call can be asked for."""
    if not torch.is_grad_enabled():
        return False
    points = call.reference_points
    if call.value.requires_grad or call.locations.requires_grad or call.weights.requires_grad:
        return True
    return points is not None and points.requires_grad


def _keep_forward(ctx, inputs, output) -> None:
    _save(ctx, Call(*inputs), inputs)
    ctx.backend = "triton" if len(inputs) == len(Call._fields) else "torch"


def _keep_backward(ctx, inputs, output) -> None:
    grad_out, ctx.needs, *operands = inputs
    _save(ctx, Call(*operands), operands, grad_out)


def _register_derivatives() -> None:
    """The operators' own, by the autograd functions: without `backend`, and the fallback's without what is fused."""
    register = functools.partial(torch.library.register_autograd, lib=_library)

    def forward(ctx, grad_out):
        return Attention.backward(ctx, grad_out)[: len(Call._fields) if ctx.backend == "triton" else _PLAIN_FIELDS]

    def backward(ctx, *grads):
        grad_grad_out, _, *grads = AttentionBackward.backward(ctx, *grads)
        return grad_grad_out, None, *grads[: len(Call._fields) if len(ctx.needs) == 4 else _PLAIN_FIELDS]

    for name, derivative, keep in (("forward", forward, _keep_forward), ("backward", backward, _keep_backward)):
        register(f"msda_triton::{name}", derivative, setup_context=keep)
        register(f"msda_triton::fallback_{name}", derivative, setup_context=keep)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
_library.impl("fallback_forward", _fallback_forward, "CPU")
_library.impl("fallback_backward", _fallback_backward, "CPU")
torch.library.register_fake("msda_triton::forward", _forward_fake)
torch.library.register_fake("msda_triton::backward", _backward_fake)
torch.library.register_fake("msda_triton::fallback_forward", _forward_fake)
torch.library.register_fake("msda_triton::fallback_backward", _backward_fake)
_register_derivatives()
tell_the_counter()
_forward_op = torch.ops.msda_triton.forward.default
_backward_op = torch.ops.msda_triton.backward.default
_fallback_forward_op = torch.ops.msda_triton.fallback_forward.default
_fallback_backward_op = torch.ops.msda_triton.fallback_backward.default


def set_autotune(enabled: bool) -> None:
    """Whether the fastest of several kernel configurations is found by timing them. Off by default: a table decides.

    On, the first call of each class (forward or backward, dtypes, heads, channels, levels, points, few or many queries;
    no image size) takes seconds. What was found is kept in the user's cache folder for other processes that switch it
    on, for this GPU and these versions of torch, triton and this package: run a model once under it to tune ahead. A
    configuration whose results are not the table's is never taken. In a CUDA graph's capture and while PyTorch compiles
    nothing is timed: what is known runs, or the table's. Under `torch.use_deterministic_algorithms(True)` the table
    decides.

    Raises:
        TypeError: no bool. RuntimeError: Triton is not installed.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    try:
        from msda_triton.kernels import tuning
    except ModuleNotFoundError as error:
        raise RuntimeError("set_autotune: needs the package triton, which is not installed") from error
    tuning.timing = tuning.do_bench if enabled else None
