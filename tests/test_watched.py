"""A call goes past PyTorch's dispatcher, unless somebody watches there: who does sees the operators as before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention import gradients, make_inputs, reference
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from msda_triton import ms_deform_attn, ms_deform_attn_fused, op

ROOT = Path(__file__).parent.parent
SHAPES = [(3, 4), (2, 2)]
OPERATORS = torch.ops.msda_triton


def attend(value, locations, weights):
    return ms_deform_attn(value, SHAPES, locations, weights, backend="triton")


def inputs_on(device, **options):
    return make_inputs(SHAPES, B=1, Q=3, M=2, D=8, device=device, **options)


@pytest.fixture
def dispatched(monkeypatch):
    """The operators that were called, by name."""
    called = []
    for name in ("forward", "backward"):
        operator = getattr(op, f"_{name}_op")
        called_as = lambda *args, name=name, operator=operator: (called.append(name), operator(*args))[1]  # noqa: E731
        monkeypatch.setattr(op, f"_{name}_op", called_as)
    return called


def run(inputs):
    return gradients(attend, inputs, torch.ones(1, 3, 16, device=inputs[0].device))


def test_nobody_watches(device, dispatched):
    inputs = inputs_on(device)
    with torch.no_grad():
        attend(*inputs)
    run(inputs)
    with torch.inference_mode():
        attend(*inputs)
    parameters = [torch.nn.Parameter(x.detach()) for x in inputs]
    run(parameters)
    with torch.autocast(device, dtype=torch.bfloat16):
        run(inputs)
    assert dispatched == []


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        seen.append(function)
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        seen.append(function)
        return function(*args, **(kwargs or {}))


seen = []


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operators(mode, device, dispatched):
    inputs = inputs_on(device)
    want = run(inputs)
    seen.clear()
    with mode():
        got = run(inputs)
    # a function mode is off within the function that it handles, here torch.autograd.grad
    names = ["forward"] if mode is Functions else ["forward", "backward"]
    assert dispatched == names
    assert {getattr(OPERATORS, name).default for name in names} <= set(seen)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_a_profiler_shows_the_operators_names(device, dispatched):
    inputs = inputs_on(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(inputs)
    names = {event.key for event in profile.key_averages()}
    assert {"msda_triton::forward", "msda_triton::backward"} <= names
    with torch.autograd.profiler.profile() as profile:
        run(inputs)
    assert "msda_triton::forward" in {event.name for event in profile.function_events}
    assert dispatched == ["forward", "backward"] * 2
    run(inputs)
    assert len(dispatched) == 4


class Named(torch.Tensor):
    """A class with a `__torch_function__` only."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A class with a `__torch_dispatch__`, around another tensor."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device, strides=x.stride())

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        seen.append(function)
        unwrapped = torch.utils._pytree.tree_map(lambda x: x.x if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        return function(*unwrapped[0], **unwrapped[1])


@pytest.mark.parametrize("place", range(3), ids=["value", "locations", "weights"])
@pytest.mark.parametrize("kind", [Named, Wrapped])
def test_classes_of_tensors_see_the_operator(kind, place, device, dispatched):
    inputs = [x.detach() for x in inputs_on(device)]
    want = attend(*inputs)
    make = kind if kind is Wrapped else lambda x: x.as_subclass(Named)
    inputs[place] = make(inputs[place])
    seen.clear()
    out = attend(*inputs)
    assert dispatched == ["forward"] and OPERATORS.forward.default in seen
    assert kind is Wrapped or type(out) is Named
    torch.testing.assert_close(out.as_subclass(torch.Tensor), want)


def test_the_counter_of_flops_is_told_when_it_is_imported():
    """After the package; the tests of this file import it before."""
    looked = "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')"  # which imports nothing
    code = f"import msda_triton; {looked}; import torch.utils.flop_counter"
    code += "; operators, told = torch.ops.msda_triton, torch.utils.flop_counter.flop_registry"
    names = "forward", "backward", "fallback_forward", "fallback_backward"
    code += f"; print([getattr(operators, name) in told for name in {names}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * 4), done.stderr


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_flops_are_counted(backend, device):
    B, Q, M, D, K = 1, 2, 1, 4, 5
    once = 2 * 4 * D * (B * Q * M * K)  # a product and a sum for each channel of four pixels
    device = "cpu" if backend == "torch" else device
    sizes = (B, 6, M, D), (B, Q, M, K, 2), (B, Q, M, K)
    value, locations, weights = (torch.rand(size, device=device) for size in sizes)
    options = {"num_points": [2, 3], "backend": backend}

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        return result, counter.get_total_flops()

    for inputs, backward in (([value], 1), ([locations, weights], 1), ([value, locations], 2)):
        leaves = [x.requires_grad_(any(x is y for y in inputs)) for x in (value, locations, weights)]
        out, flops = counted(lambda leaves=leaves: ms_deform_attn(leaves[0], [(2, 2), (1, 2)], *leaves[1:], **options))
        assert flops == once
        _, flops = counted(lambda out=out, inputs=inputs: torch.autograd.grad(out.sum(), inputs))
        assert flops == backward * once
    if backend == "triton":
        points = torch.rand(B, Q, 1, 2, device=device)
        call = lambda: ms_deform_attn_fused(value, [(2, 2), (1, 2)], points, locations, weights, **options)  # noqa: E731
        assert counted(call)[1] == once


@pytest.mark.parametrize("save", [True, False])
def test_selective_checkpointing_may_save_the_operator(save, device, dispatched):
    """A policy names operators: what it saves is not computed again."""
    policies = checkpoint.CheckpointPolicy

    def policy(context, function, *args, **kwargs):
        mine = function is OPERATORS.forward.default
        return policies.MUST_SAVE if mine and save else policies.PREFER_RECOMPUTE

    contexts = lambda: checkpoint.create_selective_checkpoint_contexts(policy)  # noqa: E731
    inputs = inputs_on(device)
    kernels = []
    launch = op._kernels().forward

    class Counted:
        forward = staticmethod(lambda *args: (kernels.append(1), launch(*args))[1])
        backward = staticmethod(op._kernels().backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_kernels", lambda: Counted)
        function = lambda *x: attend(*x).sin()  # noqa: E731
        out = checkpoint.checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
        got = torch.autograd.grad(out.sum(), inputs)
    assert len(kernels) == (1 if save else 2)
    want = torch.autograd.grad(reference(inputs[0], SHAPES, *inputs[1:]).sin().sum(), inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", range(3), ids=["value", "locations", "weights"])
def test_numbers_that_memory_has_negated(place, device, dispatched):
    """The imaginary part of a conjugate is the memory of the original with a sign that is not in it."""
    inputs = [x.detach() for x in inputs_on(device)]
    want = attend(*inputs)
    plain = inputs[place]
    inputs[place] = torch.complex(torch.zeros_like(plain), -plain).conj().imag
    assert inputs[place].is_neg() and torch.equal(inputs[place], plain)
    torch.testing.assert_close(attend(*inputs), want)
    assert dispatched == ["forward"]


def test_a_negated_gradient_and_one_without_memory(device, dispatched):
    inputs = inputs_on(device)
    grad_out = torch.randn(1, 3, 16, device=device)
    want = torch.autograd.grad(attend(*inputs), inputs, grad_out)
    negated = torch.complex(torch.zeros_like(grad_out), -grad_out).conj().imag
    for x, y in zip(torch.autograd.grad(attend(*inputs), inputs, negated), want, strict=True):
        torch.testing.assert_close(x, y)
    zeros = torch._efficientzerotensor((1, 3, 16), device=device)
    for x in torch.autograd.grad(attend(*inputs), inputs, zeros):
        assert not x.any()
    assert dispatched == ["backward"] * 2


def test_the_other_operands_are_watched_too(device, dispatched):
    value, offsets, logits = (x.detach() for x in inputs_on(device))
    points, mask = torch.rand(1, 3, 2, 2, device=device), torch.zeros(1, 16, dtype=torch.bool, device=device)
    call = lambda points, mask: ms_deform_attn_fused(  # noqa: E731
        value, SHAPES, points, offsets, logits, value_mask=mask, backend="triton"
    )
    want = call(points, mask)
    for watched in (points.as_subclass(Named), torch.complex(points, -points).conj().imag, Wrapped(points)):
        torch.testing.assert_close(call(watched, mask).as_subclass(torch.Tensor), want)
    zeros = torch._efficientzerotensor(mask.shape, dtype=torch.bool, device=device)
    for watched in (mask.as_subclass(Named), Wrapped(mask), zeros):
        torch.testing.assert_close(call(points, watched).as_subclass(torch.Tensor), want)
    assert dispatched == ["forward"] * 6


def test_batched_gradients(device, dispatched):
    inputs = inputs_on(device)
    out = attend(*inputs)
    several = torch.randn(3, *out.shape, device=device)
    batched = torch.autograd.grad(out, inputs, several, is_grads_batched=True, retain_graph=True)
    assert dispatched == ["backward"]
    for i, grad_out in enumerate(several):
        for x, y in zip(torch.autograd.grad(out, inputs, grad_out, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(x, y[i])


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_both_operators(pre_dispatch, device, dispatched):
    inputs = [x.detach() for x in inputs_on(device)]

    def gradient(value, locations, weights):
        value = value.detach().requires_grad_()
        return torch.autograd.grad(attend(value, locations, weights).sum(), value)[0]

    graph = make_fx(gradient, pre_dispatch=pre_dispatch)(*inputs)
    targets = {node.target for node in graph.graph.nodes}
    assert {OPERATORS.forward.default, OPERATORS.backward.default} <= targets
    torch.testing.assert_close(graph(*inputs), gradient(*inputs))
