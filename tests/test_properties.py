"""Random sizes, dtypes, strides and contents, thrown at every backend and compared with the specification."""

import pytest
import torch
from attention import reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from msda_triton import ms_deform_attn

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, -0.0, 1e-40, 0.0, 1.0, 0.5]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@st.composite
def calls(draw):
    """value, shapes, starts or None, locations, weights."""
    L = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=L, max_size=L))
    B, Q, M, P = (draw(st.integers(1, n)) for n in (2, 5, 2, 3))
    D = draw(st.sampled_from([1, 3, 4, 8, 16, 24]))
    dtype, location_dtype = draw(DTYPES), draw(DTYPES)
    S = sum(h * w for h, w in shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    value = torch.randn(B, S, M, D, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["plain", "head-major", "padded", "shifted"]))
    if layout == "head-major":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "padded":
        value = torch.nn.functional.pad(value, (0, 3))[..., :D]
    elif layout == "shifted":
        value = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    locations = (torch.rand(B, Q, M, L, P, 2, generator=generator) * 2 - 0.5).to(location_dtype)
    weights = torch.rand(B, Q, M, L, P, generator=generator).to(dtype)
    for tensor, values in ((locations, SPECIAL), (weights, SPECIAL[:3]), (value, SPECIAL[:3])):
        for i in draw(st.lists(st.integers(0, tensor.numel() - 1), max_size=3)):
            index = torch.unravel_index(torch.tensor(i), tensor.shape)
            tensor[index] = draw(st.sampled_from(values))
    starts = None
    if draw(st.booleans()):
        starts = torch.tensor([draw(st.integers(0, S - h * w)) for h, w in shapes])
    return value, shapes, starts, locations, weights


@pytest.mark.parametrize("backend", ["torch", "triton"])
@settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(call=calls())
def test_agrees_with_the_specification(backend, call):
    value, shapes, starts, locations, weights = call
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    got = ms_deform_attn(inputs[0], shapes, *inputs[1:], level_start_index=starts, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference(exact[0], shapes, *exact[1:], starts)
    pairs = [("out", got, want)]
    seed = torch.ones_like(want)
    grads = torch.autograd.grad(got, inputs, seed.to(got.dtype)), torch.autograd.grad(want, exact, seed)
    pairs += zip(("grad_value", "grad_locations", "grad_weights"), *grads, strict=True)
    for name, x, y in pairs:
        finite = y.isfinite()
        assert (x.isfinite() | ~finite | (y.abs() > 6e4)).all(), f"{name}: not finite where the specification is"
        if name == "out":  # in a gradient, inf - inf may come about on one side only
            assert (x.isnan() | ~y.isnan()).all(), f"{name}: a number where the specification is NaN"
        scale = y[finite].abs().max().item() if finite.any() else 0.0
        if scale < 6e4:
            dtype = max((x.dtype, value.dtype, locations.dtype), key=lambda d: TOLERANCE[d])
            error = (x.double() - y)[finite].abs().max().item() if finite.any() else 0.0
            assert error <= TOLERANCE[dtype] * max(scale, 1), f"{name}: error {error:.3g} at scale {scale:.3g}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
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
    if backend == "triton":
        arguments = (shapes, first, locations, weights, [2, 2], None, None, [])
        out = torch.ops.msda_triton.forward(value, *arguments)
        grad = torch.ops.msda_triton.backward(torch.ones(1, 3, 16), value, *arguments, [True, True, True, False])[0]
    else:
        from msda_triton.fallback import fallback_backward, fallback_forward

        arguments = (shapes, first, locations, weights, [2, 2])
        out = fallback_forward(value, *arguments)
        grad = fallback_backward(torch.ones(1, 3, 16), value, *arguments, (True, True, True))[0]
    assert out.isfinite().all()
    assert (out >= 0).all() and (out <= 1 + 1e-6).all()
    assert grad.shape == value.shape and grad.isfinite().all()
    assert grad.sum().item() == pytest.approx(out.sum().item(), abs=1e-3)
