"""The backward under `torch.use_deterministic_algorithms`: the same bits, and the right ones."""

import math

import pytest
import torch
from attention import gradients, make_inputs, oracle, oracle_gradients
from test_kernels import DTYPES, check

from msda_triton import ms_deform_attn, ms_deform_attn_fused


def with_and_without(run, value, size) -> list[torch.Tensor]:
    """The gradient of value, where that of every result is size: by sums of floats, and by deterministic ones."""
    grads = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            out = run()
            grads += torch.autograd.grad(out, value, torch.full_like(out, size))
        finally:
            torch.use_deterministic_algorithms(False)
    return grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_backward(dtype, device):
    """The same bits whatever the order of the additions: here the queries are reversed, which reverses every sum."""
    torch.use_deterministic_algorithms(True)
    try:
        shapes = [(2, 3), (1, 1)]
        inputs = make_inputs(shapes, B=1, Q=300, M=1, D=8, dtype=dtype, device=device)
        grad_out = torch.randn(1, 300, 8, dtype=torch.float64).to(dtype).to(device)
        check(shapes, inputs)
        function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, backend="triton")  # noqa: E731
        _, forwards, *_ = gradients(function, inputs, grad_out)
        mirrored = [inputs[0], *(x.detach().flip(1).requires_grad_() for x in inputs[1:])]
        _, backwards, *_ = gradients(function, mirrored, grad_out.flip(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(forwards, backwards)


def test_deterministic_backward_passes_nan_on(device):
    torch.use_deterministic_algorithms(True)
    try:
        inputs = make_inputs([(2, 3)], B=1, Q=4, M=2, D=8, device=device)
        grad_out = torch.ones(1, 4, 16, device=device)
        grad_out[0, 2, 3] = float("nan")
        _, grad_value, *_ = gradients(
            lambda v, x, a: ms_deform_attn(v, [(2, 3)], x, a, backend="triton"), inputs, grad_out
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad_value[:, :, 0].isnan().all()
    assert grad_value[:, :, 1].isfinite().all()


@pytest.mark.parametrize("near", [-1.0, -1.005, 8.0, 8.005])
@pytest.mark.parametrize("bad", [1e30, float("nan")])
def test_deterministic_sums_know_a_sample_just_off_the_map(bad, near, device):
    torch.use_deterministic_algorithms(True)
    try:
        value = torch.ones(1, 8, 1, 1, device=device, requires_grad=True)
        locations = torch.tensor([[(near + 0.5) / 8, 0.5], [1.5 / 8, 0.5]], device=device).view(1, 2, 1, 1, 1, 2)
        weights = torch.tensor([bad, 1.0], device=device).view(1, 2, 1, 1, 1)
        out = ms_deform_attn(value, [(1, 8)], locations, weights, backend="triton")
        (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad.flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("size", "weight"), [(1e38, 4.0), (1e-28, 1.0), (1e-31, 1.0), (1e-36, 1.0)])
def test_deterministic_sums_of_very_large_and_very_small_gradients(size, weight, device):
    value = torch.randn(1, 12, 1, 4, device=device, requires_grad=True)
    locations = torch.tensor([0.5, 1 / 3], device=device).view(1, 1, 1, 1, 1, 2)
    weights = torch.full((1, 1, 1, 1, 1), weight, device=device)
    run = lambda: ms_deform_attn(value, [(3, 4)], locations, weights, backend="triton")  # noqa: E731
    grads = with_and_without(run, value, size)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-6, atol=2.0**-126)


@pytest.mark.parametrize(("weight", "size"), [(1e20, 1e20), (-1e30, 1e12), (1e38, 1e38), (1e10, -3e38)])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_deterministic_sums_of_infinite_terms(queries, weight, size, device):
    """A product beyond float32 is infinite, as in sums of floats; one of 1e76, which no unit serves, is NaN."""
    value = torch.ones(1, 2, 1, 1, device=device, requires_grad=True)
    locations = torch.tensor([0.25, 0.5], device=device).expand(1, queries, 1, 1, 1, 2)
    weights = torch.full((1, queries, 1, 1, 1), weight, device=device)
    run = lambda: ms_deform_attn(value, [(1, 2)], locations, weights, backend="triton")  # noqa: E731
    grads = with_and_without(run, value, size)
    # at the centre of the first pixel: the second one gets zero times that
    assert grads[0][0, 0] == math.copysign(math.inf, weight * size)
    if weight * size == pytest.approx(1e76):
        assert grads[1].isnan().all()
    else:
        assert grads[1].flatten().tolist() == [grads[0][0, 0], 0]


def test_deterministic_sums_know_the_padding(device):
    """A query of NaN that touches a hidden pixel only."""
    torch.use_deterministic_algorithms(True)
    try:
        value = torch.ones(1, 4, 1, 1, device=device, requires_grad=True)
        points = torch.tensor([[3.5 / 4, 0.5], [0.5 / 4, 0.5]], device=device).view(1, 2, 1, 2)
        zeros = torch.zeros(1, 2, 1, 1, 1, 2, device=device)
        mask = torch.tensor([[False, False, False, True]], device=device)
        out = ms_deform_attn_fused(value, [(1, 4)], points, zeros, zeros[..., 0], value_mask=mask, backend="triton")
        (grad,) = torch.autograd.grad(out, value, torch.tensor([float("nan"), 1.0], device=device).view(1, 2, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad.flatten().tolist() == [1, 0, 0, 0]


def test_deterministic_sums_on_a_level_of_a_million_columns(device):
    """Samples and their bound agree on who is taken, whatever float32 makes of large coordinates."""
    W = 2**20
    value = torch.ones(1, W, 1, 1, device=device, requires_grad=True)
    points = torch.tensor([1 - 2**-21, 0.5], device=device).view(1, 1, 1, 2)
    offsets = torch.tensor([0.94, 0.0], device=device).view(1, 1, 1, 1, 1, 2)
    run = lambda: ms_deform_attn_fused(value, [(1, W)], points, offsets, offsets[..., 1], backend="triton")  # noqa: E731
    grads = with_and_without(run, value, 1e-3)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["off the map", "in a level without pixels"])
def test_deterministic_gradients_keep_their_precision_beside_a_weight_that_does_not_count(where, bad, device):
    torch.use_deterministic_algorithms(True)
    try:
        shapes = [(2, 3), (0, 4)] if where == "in a level without pixels" else [(2, 3), (1, 2)]
        value, locations, weights = make_inputs(shapes, B=1, Q=6, M=2, D=8, device=device)
        grad_out = torch.randn(1, 6, 16, device=device)
        with torch.no_grad():
            weights[0, 3, 0, 1, 0] = bad
            if where == "off the map":
                locations[0, 3, 0, 1, 0] = 3.0
            grad_out[0, 4] = bad  # of a query all of whose samples are off the map
            locations[0, 4] = -2.0
        function = lambda v: ms_deform_attn(v, shapes, locations, weights, backend="triton")  # noqa: E731
        (got,) = torch.autograd.grad(function(value), value, grad_out)
        with torch.no_grad():
            weights[0, 3, 0, 1, 0] = grad_out[0, 4] = 0
        present = [0] if where == "in a level without pixels" else [0, 1]
        used = locations[:, :, :, present].detach(), weights[:, :, :, present].detach()
        _, want = oracle_gradients(lambda v: oracle(v, [shapes[l] for l in present], *used), [value], grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B, Q", [(0, 3), (2, 0)])
def test_deterministic_and_empty(B, Q, device):
    torch.use_deterministic_algorithms(True)
    try:
        inputs = make_inputs([(3, 4)], B=B, Q=Q, device=device)
        function = lambda v, x, a: ms_deform_attn(v, [(3, 4)], x, a, backend="triton")  # noqa: E731
        assert not any(grad.any() for grad in gradients(function, inputs, torch.ones(B, Q, 16, device=device))[1:])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_deterministic_and_channels_that_are_no_neighbours(dtype, device):
    """Every other channel of memory: value is copied before any kernel reads it."""
    value, locations, weights = make_inputs([(3, 4), (2, 2)], B=1, Q=3, M=2, D=16, dtype=dtype, device=device)
    value = value.detach()[..., ::2].requires_grad_()
    run = lambda: ms_deform_attn(value, [(3, 4), (2, 2)], locations, weights, backend="triton")  # noqa: E731
    plain, deterministic = with_and_without(run, value, 1.0)
    torch.testing.assert_close(deterministic, plain)
    assert plain.any()


def test_deterministic_and_a_head_without_samples(device):
    """None of its samples adds anything, and its gradient is zero; the other head's is as ever."""
    value, locations, weights = make_inputs([(2, 3)], B=1, Q=5, M=2, D=8, device=device)
    with torch.no_grad():
        locations[:, :, 1] = 7.0
    run = lambda: ms_deform_attn(value, [(2, 3)], locations, weights, backend="triton")  # noqa: E731
    plain, deterministic = with_and_without(run, value, 1.0)
    assert not deterministic[:, :, 1].any() and deterministic[:, :, 0].any()
    torch.testing.assert_close(deterministic, plain)
