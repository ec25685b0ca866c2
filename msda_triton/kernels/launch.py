"""A call in, a result out: what the kernels are handed, where they write, and how they are run."""

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from msda_triton.call import Call
from msda_triton.constants import real_constant
from msda_triton.kernels import plan as plans
from msda_triton.kernels import tuning
from msda_triton.kernels.backward import _msda_bwd_kernel
from msda_triton.kernels.bound import _msda_bound_kernel
from msda_triton.kernels.forward import _msda_fwd_kernel
from msda_triton.kernels.plan import Plan

MAX_IMAGES = 65535  # programs along the last axis of a grid
MAX_LAUNCHES = 4096  # that are kept
BOUND_PLAN = Plan(BLOCK_Q=32)  # one will do: the kernel reads a fraction of what the backward kernel does
Run = Callable[..., object]  # a stand-in for `run` that sees what would be launched


def run(kernel, call: Call, arguments: dict, plan: Plan):
    """Launch a kernel on value's device, with those of the arguments and of the plan's constants that it has.

    Returns:
        The compiled kernel; None if it is interpreted.
    """
    given = arguments | plan.constants
    with _on_device(call.value):
        return kernel[plan.grid(call)](*[given[name] for name in kernel.arg_names], **plan.options)


def repeated(kernel, call: Call, arguments: dict, plan: Plan, run: Run = run) -> Callable[[], object]:
    """Launch a kernel, and return what launches the same again: on value's device, for little of the host's time."""
    compiled = run(kernel, call, arguments, plan)
    if compiled is None:  # interpreted
        return lambda: run(kernel, call, arguments, plan)
    given = arguments | plan.constants
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in (given[name] for name in kernel.arg_names)]
    launch = compiled[plan.grid(call)]
    return lambda: launch(*values)


def forward(call: Call, plan: Plan | None = None, *, run: Run | None = None, images: int = MAX_IMAGES) -> Tensor:
    """out [B, Q, M * D] in value's dtype.

    Args:
        plan: None takes the table's. images: at most so many in a launch.
    """
    value = call.value
    B, _, M, D = value.shape
    if images < B:
        return _joined([forward(part, plan, run=run, images=images) for (part,) in _batches(images, call)])
    out = torch.empty(B, call.weights.shape[1], M * D, dtype=value.dtype, device=value.device)
    if out.numel():
        _launch(_msda_fwd_kernel, call, (*_inputs(call), out), plan, run)
    return out


def backward(
    grad_out: Tensor,
    call: Call,
    needs: list[bool],
    plan: Plan | None = None,
    *,
    deterministic: bool | None = None,
    run: Run | None = None,
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
    deterministic = deterministic and needs_value
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
        inputs, grad_out = _inputs(call), grad_out.contiguous()
        if deterministic:
            scale = _fixed_point_scale(call, (*inputs[1:], grad_out), acc, run)
        # no name for these tensors: sums that are converted below must not outlive it
        _launch(
            _msda_bwd_kernel, call,
            (*inputs, grad_out, grad_value, scale, grad_locations, grad_weights, grad_points), plan, run,
        )  # fmt: skip
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


def _inputs(call: Call) -> tuple[Tensor | None, ...]:
    """What the kernels read of a call, in the order of their arguments, laid out as they read it."""
    value, shapes, starts, locations, weights, num_points, sizes, first, points, mask = call
    if value.stride(3) != 1:
        # of a tensor without elements any strides are contiguous
        value = value.contiguous() if value.numel() else value.new_empty(value.shape)
    if starts is not None:
        starts = starts.contiguous()
    elif first:
        starts = real_constant(tuple(first), value)
    return (
        value,
        real_constant(tuple(sizes), value) if shapes is None else shapes.contiguous(),
        starts,
        None if plans.uniform(num_points) else real_constant(tuple(num_points), value, torch.int32),
        locations.contiguous(),
        weights.contiguous(),
        None if points is None else points.contiguous(),
        None if mask is None else mask.contiguous(),
    )


# What Triton does for every launch (specialise each argument, make a key of all, find the kernel) takes longer than
# many a kernel runs. What comes of it is kept by `_key`: how to launch a compiled kernel, and its arguments without the
# pointers. Triton's settings for the compiler (`triton.knobs`) and hooks before a run are not seen if they change after
# a first launch; the hooks around each launch, which profilers set, are.
_launches: dict[tuple, tuple[Callable, list]] = {}


def _launch(kernel, call: Call, tensors: tuple[Tensor | None, ...], plan: Plan | None, run: Run | None) -> None:
    """Launch a kernel with tensors as its first arguments. plan: None takes the table's."""
    if run is not None:
        _run(run, kernel, call, tensors, plan)
        return
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    key = _key(kernel, call, tensors, pointers, plan)
    found = _launches.get(key)
    if found is None:
        found = _run(_run_directly, kernel, call, tensors, plan)
        if found is not None:
            if len(_launches) >= MAX_LAUNCHES:
                _launches.clear()
            _launches[key] = found
        return
    launch, rest = found
    with _on_device(call.value):
        launch(*pointers, *rest)


_run_directly = run  # by a name that no argument has


def _key(kernel, call: Call, tensors: tuple, pointers: list[int | None], plan: Plan | None) -> tuple:
    """All that the launch of a kernel depends on, but the pointers themselves.

    That is what `plan.py` looks at, and what Triton specialises on: dtypes, strides, and which pointers are null or no
    multiple of 16.
    """
    points, unaligned = call.reference_points, 0
    for pointer in pointers:
        if pointer is not None:
            unaligned |= pointer
    return (
        kernel, plan, call.value.shape, tensors[0].stride(), call.value.device, call.weights.shape,
        tuple(call.num_points), call.spatial_shapes is None and tuple(call.level_sizes),
        None if points is None else points.shape, tuple([None if x is None else x.dtype for x in tensors]),
        unaligned & 15 and tuple([pointer and pointer & 15 for pointer in pointers]),
        tuning.table_decides(),
    )  # fmt: skip


def _run(run: Run, kernel, call: Call, tensors: tuple[Tensor | None, ...], plan: Plan | None) -> tuple | None:
    """Launch a kernel by way of Triton: what `_launches` keeps, None if there is nothing to keep."""
    arguments, keep = _arguments(kernel, call, tensors), True
    if plan is None:
        plan, keep = _choose(run, kernel, call, arguments)
    compiled = run(kernel, call, arguments, plan)
    if compiled is None or not keep:
        return None
    given = arguments | plan.constants
    return compiled[plan.grid(call)], [given[name] for name in kernel.arg_names[len(tensors) :]]


def _arguments(kernel, call: Call, tensors: tuple[Tensor | None, ...]) -> dict:
    """A kernel's arguments but the plan's constants, by name."""
    S, M, D = call.value.shape[1:]
    Q, num_points, points = call.weights.shape[1], call.num_points, call.reference_points
    arguments = dict(zip(kernel.arg_names, tensors, strict=False))
    mask = arguments["mask_ptr"]
    arguments |= {
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "S": S,
        "Q": Q,
        "M": M,
        "D": D,
        "L": len(num_points),
        "P": num_points[0] if plans.uniform(num_points) else 0,
        "K": sum(num_points),
        "REF_DIM": 0 if points is None else points.shape[-1],
        "REF_L": 1 if points is None else points.shape[2],
        "ACC": tl.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else tl.float32,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_K": triton.next_power_of_2(sum(num_points)),
    }
    if "value_ptr" in arguments:
        value = _packed(arguments["value_ptr"])
        # the axis of one image or head has any stride
        stride_vb, stride_vm = (value.stride(i) if value.shape[i] > 1 else 0 for i in (0, 2))
        unit = math.gcd(stride_vb, stride_vm, 16 // value.itemsize)
        strides = {"stride_vb": stride_vb // unit, "stride_vm": stride_vm // unit, "STRIDE_VS": value.stride(1)}
        arguments |= {"value_ptr": value, "STRIDE_UNIT": unit} | strides
    return arguments


def _packed(value: Tensor) -> Tensor:
    """bfloat16 value as 32-bit words of two, if every row of channels begins at one."""
    if value.dtype != torch.bfloat16 or value.shape[-1] % 8 or value.data_ptr() % 4 or value.storage_offset() % 2:
        return value
    return value if any(stride % 2 for stride in value.stride()[:-1]) else value.view(torch.int32)


def _fixed_point_scale(call: Call, inputs: tuple, dtype: torch.dtype, run: Run | None) -> Tensor:
    """[B, M] powers of two, such that the terms of one pixel sum to 62 bits at most.

    NaN for a gradient that is not finite, or larger by far than any number of the computation's dtype.

    Args:
        inputs: what the bound kernel reads. dtype: of the computation.
    """
    B, Q, M = call.weights.shape[:3]
    weight, grad = torch.empty(2, B, Q, M, dtype=dtype, device=call.value.device)
    _launch(_msda_bound_kernel, call, (*inputs, weight, grad), BOUND_PLAN, run)
    # every sample adds at most this to a pixel, once; in float64, as two finite numbers may have no product in float32
    largest = torch.where(weight >= 0, weight.double() * grad.double(), 0).amax(1)
    exponent = 62 - torch.log2(largest * (Q * sum(call.num_points))).ceil()
    finest = 126 if dtype == torch.float32 else 1000  # powers of two that dtype has
    known = largest.isfinite() & (exponent >= -finest)
    return torch.where(known, torch.exp2(exponent.clamp(-finest, finest)), torch.nan).to(dtype)


def _choose(run: Run, kernel, call: Call, arguments: dict) -> tuple[Plan, bool]:
    """The table's plan, or the fastest if `set_autotune` is on; and whether an equal call has the same."""
    direction = "forward" if kernel is _msda_fwd_kernel else "backward"
    deterministic = arguments.get("scale_ptr") is not None
    kind = plans.kind_of(call, direction, deterministic, arguments["ACC"] == tl.float64)
    device = call.value.device
    architecture = plans.architecture(device)
    if tuning.table_decides() or deterministic:
        return plans.default_plan(kind, architecture), True
    candidates = plans.timed_plans(kind, architecture)
    key = tuning.key_of(kernel, kind, arguments)
    plan = tuning.known(key, candidates)
    if plan is None:
        with _on_device(call.value):  # else another GPU's clock would be read
            if not tuning.may_time(device):
                return candidates[0], False
            start = functools.partial(repeated, kernel, call, arguments, run=run)
            plan = tuning.fastest(key, candidates, start, arguments)
    return (candidates[0], False) if plan is None else (plan, True)


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


_HERE = contextlib.nullcontext()


def _on_device(tensor: Tensor):
    """Context in which the tensor's device is the current one, where kernels are launched."""
    device = tensor.device
    if device.index is None or device.index == driver.active.get_current_device():  # None: of the CPU
        return _HERE
    return getattr(torch, device.type).device(device)
