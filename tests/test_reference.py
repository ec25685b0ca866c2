"""The specification against grid_sample, against scalar Python and against values worked out by hand."""

import pytest
import torch
from attention import brute_force, make_inputs, oracle, oracle_gradients, reference

SHAPES = [(5, 7), (3, 4), (1, 1)]
# pixel coordinates around the first and the last pixel of a map of W = 8: where implementations differ
BOUNDARY = [-1.25, -1.0, -0.999, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 3.0, 6.5, 7.0, 7.25, 7.5, 7.999, 8.0, 8.25]


def test_equals_grid_sample_forward_and_gradients():
    inputs = make_inputs(SHAPES, D=5, P=3, dtype=torch.float64)
    grad_out = torch.randn(2, 19, 10, dtype=torch.float64)
    got = oracle_gradients(lambda v, x, a: reference(v, SHAPES, x, a), inputs, grad_out)
    exact = oracle_gradients(lambda v, x, a: oracle(v, SHAPES, x, a), inputs, grad_out)
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("starts", [None, [16, 0, 4]], ids=["in-order", "out-of-order"])
def test_equals_scalar_python(starts):
    shapes = [(2, 2), (3, 4), (4, 4)] if starts is None else [(4, 4), (2, 2), (3, 4)]
    value, locations, weights = (x.detach() for x in make_inputs(shapes, B=2, Q=4, D=3, P=2, dtype=torch.float64))
    got = reference(value, shapes, locations, weights, None if starts is None else torch.tensor(starts))
    torch.testing.assert_close(got, brute_force(value, shapes, locations, weights, starts), rtol=1e-13, atol=1e-14)


def test_worked_example():
    # a 2 x 2 map 1 2 / 3 4: its centre is the mean; (0.25, 0.25) is the first pixel; the corner (0, 0) a quarter of it
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    locations = torch.tensor([[0.5, 0.5], [0.25, 0.25], [0.0, 0.0], [-0.25, 0.5]]).view(1, 4, 1, 1, 1, 2)
    weights = torch.full((1, 4, 1, 1, 1), 2.0)
    assert reference(value, [(2, 2)], locations, weights).flatten().tolist() == [5.0, 2.0, 0.5, 0.0]


@pytest.mark.parametrize("x", BOUNDARY)
def test_boundary(x):
    value = torch.arange(1.0, 9.0, dtype=torch.float64).view(1, 8, 1, 1)
    location = torch.tensor([(x + 0.5) / 8, 0.5], dtype=torch.float64).view(1, 1, 1, 1, 1, 2).requires_grad_()
    out = reference(value, [(1, 8)], location, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out, location)
    padded = [0.0, *range(1, 9), 0.0, 0.0]
    taken = -1 < x < 8
    low = int(x // 1)
    want = padded[low + 1] * (low + 1 - x) + padded[low + 2] * (x - low) if taken else 0.0
    slope = (padded[low + 2] - padded[low + 1]) * 8 if taken else 0.0  # the right-hand derivative at a pixel centre
    assert out.item() == pytest.approx(want, abs=1e-12)
    assert grad.flatten()[0].item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3.4e38])
@pytest.mark.parametrize("axis", [0, 1])
def test_location_off_the_map_contributes_nothing(bad, axis):
    inputs = make_inputs([(3, 4)], B=1, Q=2, M=1, D=3, P=2)
    with torch.no_grad():
        inputs[1][0, 0, 0, 0, 1, axis] = bad
        inputs[2][0, 0, 0, 0, 1] = float("nan")  # not even a weight that is NaN
    kept = [inputs[0], inputs[1][:, :1, :, :, :1], inputs[2][:, :1, :, :, :1]]
    out = reference(inputs[0], [(3, 4)], inputs[1][:, :1], inputs[2][:, :1])
    torch.testing.assert_close(out, reference(kept[0], [(3, 4)], kept[1], kept[2]), rtol=0, atol=0)
    _, grad_locations, grad_weights = torch.autograd.grad(out.sum(), inputs)
    assert grad_locations[0, 0, 0, 0, 1].tolist() == [0.0, 0.0]
    assert grad_weights[0, 0, 0, 0, 1].item() == 0.0


def test_gradcheck_and_gradgradcheck():
    inputs = make_inputs([(3, 4), (2, 2)], B=1, Q=2, M=2, D=2, P=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, x, a: reference(v, [(3, 4), (2, 2)], x, a), inputs)
    assert torch.autograd.gradgradcheck(lambda v, x, a: reference(v, [(3, 4), (2, 2)], x, a), inputs)


@pytest.mark.parametrize(
    ("shapes", "starts"),
    [([(3, 4), (50, 50)], None), ([(3, 4), (2, 2)], [0, 14]), ([(3, 4), (2, 2)], [-1, 0]), ([(-3, 4), (3, 4)], [0, 0])],
)
def test_a_level_that_does_not_fit_holds_nothing(shapes, starts):
    value, locations, weights = make_inputs([(3, 4), (2, 2)], B=1, Q=3, dtype=torch.float64)
    starts_tensor = None if starts is None else torch.tensor(starts)
    got = reference(value, shapes, locations, weights, starts_tensor)
    S = value.shape[1]
    starts = starts or [0, shapes[0][0] * shapes[0][1]]
    fits = [s >= 0 and h >= 0 and w >= 0 and s + h * w <= S for s, (h, w) in zip(starts, shapes, strict=True)]
    assert fits.count(True) == 1
    l = fits.index(True)
    want = brute_force(value, [shapes[l]], locations[:, :, :, l : l + 1], weights[:, :, :, l : l + 1], [starts[l]])
    torch.testing.assert_close(got, want)
