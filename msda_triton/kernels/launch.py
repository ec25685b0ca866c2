"""A call in, a result out: what the kernels are handed, where they write, and how they are run."""

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from msda_triton.call import Call
from msda_triton.constants import constant
from msda_triton.kernels import plan as plans
from msda_triton.kernels.backward import _msda_bwd_kernel
from msda_triton.kernels.bound import _msda_bound_kernel
from msda_triton.kernels.forward import _msda_fwd_kernel
from msda_triton.kernels.plan import Kind, Plan

MAX_IMAGES = 65535  # programs along the last axis of a grid
BOUND_PLAN = Plan(BLOCK_Q=32)  # one will do: the kernel reads a fraction of what the backward kernel does
Run = Callable[..., None]  # `run`, or a stand-in that sees what would be launched


def run(kernel, call: Call, arguments: dict, plan: Plan) -> None:
    """Launch a kernel on value's device, with those of the arguments and of the plan's constants that it has."""
    given = arguments | plan.constants
    with _on_device(call.value):
        kernel[plan.grid(call)](*[given[name] for name in kernel.arg_names], **plan.options)


def forward(call: Call, plan: Plan | None = None, *, run: Run = run, images: int = MAX_IMAGES) -> Tensor:
    """out [B, Q, M * D] in value's dtype.

    Args:
        plan: None takes the table's. images: at most so many in a launch.
    """
    B, _, M, D = call.value.shape
    Q = call.weights.shape[1]
    if images < B:
        return _joined([forward(part, plan, run=run, images=images) for (part,) in _batches(images, call)])
    out = torch.empty(B, Q, M * D, dtype=call.value.dtype, device=call.value.device)
    if out.numel():
        double = plans.is_double(call)
        arguments = _arguments(call, double)
        arguments["out_ptr"] = out
        if plan is None:
            launch = functools.partial(run, _msda_fwd_kernel, call, arguments)
            plan = _choose(plans.kind_of(call, "forward", double=double), arguments, launch)
        run(_msda_fwd_kernel, call, arguments, plan)
    return out


def backward(
    grad_out: Tensor,
    call: Call,
    needs: list[bool],
    plan: Plan | None = None,
    *,
    deterministic: bool | None = None,
    run: Run = run,
    images: int = MAX_IMAGES,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, locations, weights and reference points in their dtypes; None for those not asked for.

    Args:
        grad_out: [B, Q, M * D]. needs: of which of the four. plan: None takes the table's.
        deterministic: whether equal calls give equal bits; None asks `torch.are_deterministic_algorithms_enabled`.
        images: at most so many in a launch.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    B, S, M, D = call.value.shape
    Q = call.weights.shape[1]
    if images < B:
        options = {"deterministic": deterministic, "run": run, "images": images}
        grads = [backward(grad, part, needs, plan, **options) for part, grad in _batches(images, call, grad_out)]
        return tuple(None if parts[0] is None else _joined(parts) for parts in zip(*grads, strict=True))

    needs_value, needs_locations, needs_weights, needs_points = needs
    double = plans.is_double(call) or grad_out.dtype == torch.float64
    acc = torch.float64 if double else torch.float32
    grad_value = scale = grad_locations = grad_weights = grad_points = None
    if needs_value:
        grad_value = call.value.new_zeros(B, S, M, D, dtype=torch.int64 if deterministic else acc)
    if needs_locations or needs_points:
        grad_locations = torch.empty(call.locations.shape, dtype=call.locations.dtype, device=call.value.device)
    if needs_weights:
        grad_weights = torch.empty(call.weights.shape, dtype=call.weights.dtype, device=call.value.device)
    if needs_points:
        shape = (B, Q, M, len(call.num_points), call.reference_points.shape[-1])
        grad_points = torch.empty(shape, dtype=acc, device=call.value.device)
    if B * Q * M:
        arguments = _arguments(call, double) | {"grad_out_ptr": grad_out.contiguous()}
        if needs_value and deterministic:
            scale = _fixed_point_scale(call, arguments, run)
        arguments |= {
            "grad_value_ptr": grad_value,
            "scale_ptr": scale,
            "grad_loc_ptr": grad_locations,
            "grad_attn_ptr": grad_weights,
            "grad_ref_ptr": grad_points,
        }
        if plan is None:
            kind = plans.kind_of(call, "backward", deterministic=needs_value and deterministic, double=double)
            plan = _choose(kind, arguments, functools.partial(run, _msda_bwd_kernel, call, arguments))
        run(_msda_bwd_kernel, call, arguments, plan)
    if scale is not None:
        grad_value = grad_value.to(acc).div_(scale.view(B, 1, M, 1))
    if needs_value:
        grad_value = grad_value.to(call.value.dtype)
    if needs_points:
        grad_points = grad_points.sum(2)
        if call.reference_points.shape[2] == 1:
            grad_points = grad_points.sum(2, keepdim=True)
        grad_points = grad_points.to(call.reference_points.dtype)
    return grad_value, grad_locations if needs_locations else None, grad_weights, grad_points


def _arguments(call: Call, double: bool) -> dict:
    """What depends on the call alone, by the kernels' names for it.

    Args:
        double: whether to compute in float64.
    """
    S, M, D = call.value.shape[1:]
    Q, K = call.weights.shape[1], call.weights.shape[3]
    uniform = len(set(call.num_points)) == 1
    value = _readable(call.value)
    points, mask = call.reference_points, call.value_mask
    return {
        "value_ptr": value,
        "shapes_ptr": call.spatial_shapes.contiguous(),
        "starts_ptr": None if call.level_start_index is None else call.level_start_index.contiguous(),
        "num_points_ptr": None if uniform else constant(tuple(call.num_points), value, torch.int32),
        "loc_ptr": call.locations.contiguous(),
        "attn_ptr": call.weights.contiguous(),
        "ref_ptr": None if points is None else points.contiguous(),
        "mask_ptr": None if mask is None else mask.contiguous().view(torch.uint8),
        "S": S,
        "Q": Q,
        "stride_vb": value.stride(0),
        "stride_vm": value.stride(2),
        "STRIDE_VS": value.stride(1),
        "M": M,
        "D": D,
        "L": len(call.num_points),
        "P": call.num_points[0] if uniform else 0,
        "K": K,
        "REF_DIM": 0 if points is None else points.shape[-1],
        "REF_L": 1 if points is None else points.shape[2],
        "ACC": tl.float64 if double else tl.float32,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_K": triton.next_power_of_2(K),
    }


def _readable(value: Tensor) -> Tensor:
    """value with neighbouring channels; in bfloat16 as 32-bit words of two, if every row of channels begins at one."""
    if value.stride(-1) != 1:
        # of a tensor without elements any strides are contiguous
        value = value.contiguous() if value.numel() else value.new_empty(value.shape)
    if value.dtype != torch.bfloat16 or value.shape[-1] % 8 or value.storage_offset() % 2:
        return value
    return value if any(stride % 2 for stride in value.stride()[:-1]) else value.view(torch.int32)


def _fixed_point_scale(call: Call, arguments: dict, run: Run) -> Tensor:
    """[B, M] powers of two, such that the terms of one pixel sum to 62 bits at most.

    NaN for a gradient that is not finite, or larger by far than any number of the computation's dtype.
    """
    B, Q, M, K = call.weights.shape
    dtype = torch.float64 if arguments["ACC"] == tl.float64 else torch.float32
    weight, grad = torch.empty(2, B, Q, M, dtype=dtype, device=call.value.device)
    found = {"max_weight_ptr": weight, "max_grad_ptr": grad}
    run(_msda_bound_kernel, call, arguments | found, BOUND_PLAN)
    # every sample adds at most this to a pixel, once; in float64, as two finite numbers may have no product in float32
    largest = torch.where(weight >= 0, weight.double() * grad.double(), 0).amax(1)
    exponent = 62 - torch.log2(largest * (Q * K)).ceil()
    finest = 126 if dtype == torch.float32 else 1000  # powers of two that dtype has
    known = largest.isfinite() & (exponent >= -finest)
    return torch.where(known, torch.exp2(exponent.clamp(-finest, finest)), torch.nan).to(dtype)


_fastest: dict[tuple, Plan] = {}


def _choose(kind: Kind, arguments: dict, launch: Callable[[Plan], None]) -> Plan:
    """The table's plan; the fastest of `timed_plans` if `set_autotune` is on."""
    architecture = plans.architecture(arguments["value_ptr"].device)
    # another plan adds channels in another order: the last bit of a gradient would depend on the timing
    if plans.timing is None or plans.INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return plans.default_plan(kind, architecture)
    # every key is timed: of the image's size no more than a power of two
    sizes = triton.next_power_of_2(arguments["Q"]), *(arguments[name] for name in ("M", "L", "K", "REF_DIM"))
    key = kind, architecture, sizes, tuple(getattr(x, "dtype", None) for x in arguments.values())
    if key not in _fastest:
        _fastest[key] = plans.fastest(plans.timed_plans(kind, architecture), launch, plans.timing)
        if arguments.get("grad_value_ptr") is not None:
            arguments["grad_value_ptr"].zero_()  # every repetition added to it
    return _fastest[key]


def _batches(images: int, call: Call, *tensors: Tensor):
    """The call and the tensors [B, ...] in parts of so many images."""
    of_images = ("value", "locations", "weights", "reference_points", "value_mask")
    given = {name: x for name, x in call._asdict().items() if name in of_images and x is not None}
    for i in range(0, call.value.shape[0], images):
        part = slice(i, i + images)
        yield call.changed(**{name: x[part] for name, x in given.items()}), *(x[part] for x in tensors)


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, which autocast would hold to its dtype."""
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for i, part in zip(range(0, len(out), len(parts[0])), parts, strict=True):
        out[i : i + len(part)] = part
    return out


def _on_device(tensor: Tensor):
    """Context in which the tensor's device is the current one, where kernels are launched."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)
