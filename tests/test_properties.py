"""Sizes that only the device knows, thrown at the operators: whatever they are, nothing outside value is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msda_triton.call import Call
from msda_triton.reference import ms_deform_attn_reference


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(-(2**33), 2**33) | st.integers(-3, 9), min_size=4, max_size=4),
    starts=st.none() | st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 30), min_size=2, max_size=2),
)
def test_sizes_that_only_the_device_knows_never_reach_outside(backend, sizes, starts):
    """The operator, given sizes that do not fit: nothing outside value, where all is NaN, is read."""
    S = 20
    memory = torch.full((3, S, 2, 8), float("nan"))
    memory[1] = 1.0
    value = memory[1:2]
    locations = torch.rand(1, 3, 2, 4, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.full((1, 3, 2, 4), 0.25)
    shapes = torch.tensor(sizes).view(2, 2)
    first = None if starts is None else torch.tensor(starts)
    if backend == "reference":
        leaf = value.detach().requires_grad_()
        out = ms_deform_attn_reference(Call(leaf, shapes, first, locations, weights, [2, 2]))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    elif backend == "triton":
        arguments = (shapes, first, locations, weights, [2, 2], [], [], None, None)
        out = torch.ops.msda_triton.forward(value, *arguments)
        grad = torch.ops.msda_triton.backward(torch.ones(1, 3, 16), [True, True, True, False], value, *arguments)[0]
    else:
        arguments = (shapes, first, locations, weights, [2, 2], [], [])
        out = torch.ops.msda_triton.fallback_forward(value, *arguments)
        grad = torch.ops.msda_triton.fallback_backward(torch.ones(1, 3, 16), [True, True, True], value, *arguments)[0]
    assert out.isfinite().all()
    assert (out >= 0).all() and (out <= 1 + 1e-6).all()
    assert grad.shape == value.shape and grad.isfinite().all()
    assert grad.sum().item() == pytest.approx(out.sum().item(), abs=1e-3)
