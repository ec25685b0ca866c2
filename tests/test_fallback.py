"""The CPU fallback against `reference.py`: every output, every dtype and layout, and whatever is not finite."""

import math
import subprocess
import sys

import pytest
import torch

from msda_triton.call import Call
from msda_triton.cpu import bags, fallback
from msda_triton.cpu.fallback import fallback_backward, fallback_forward
from msda_triton.reference import ms_deform_attn_reference

LEVELS = [(7, 5), (1, 1), (3, 6)]
NAMES = ("out", "grad_value", "grad_locations", "grad_weights")


def make_inputs(levels=LEVELS, B=2, Q=5, M=3, D=8, points=(2, 3, 1), dtype=torch.float64, spread=1.5, seed=0):
    """Random inputs whose locations lie in the maps and, for spread > 1, around them."""
    rng = torch.Generator().manual_seed(seed)
    S, K = sum(h * w for h, w in levels), sum(points)
    value = torch.randn(B, S, M, D, generator=rng, dtype=torch.float64).to(dtype)
    locations = (torch.rand(B, Q, M, K, 2, generator=rng, dtype=torch.float64) - 0.5) * spread + 0.5
    weights = torch.randn(B, Q, M, K, generator=rng, dtype=torch.float64).softmax(-1)
    return [value, torch.tensor(levels), None, locations.to(dtype), weights.to(dtype), list(points)]


def expected(inputs, grad_out, dtype=torch.float64):
    """out and the three gradients by autograd through the specification, computed in dtype."""
    value, shapes, starts, locations, weights, points = inputs
    leaves = [t.detach().to(dtype).requires_grad_() for t in (value, locations, weights)]
    out = ms_deform_attn_reference(Call(leaves[0], shapes, starts, leaves[1], leaves[2], points))
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype), materialize_grads=True)


def computed(inputs, grad_out):
    return fallback_forward(Call(*inputs)), *fallback_backward(grad_out, Call(*inputs), (True, True, True))


def grad_like(inputs, seed=1):
    B, _, M, D = inputs[0].shape
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(B, inputs[3].shape[1], M * D, generator=rng, dtype=torch.float64).to(inputs[0].dtype)


def check(inputs, rtol=1e-10, atol=1e-12, grad_out=None):
    grad_out = grad_like(inputs) if grad_out is None else grad_out
    for name, got, want in zip(NAMES, computed(inputs, grad_out), expected(inputs, grad_out), strict=True):
        # infinity may be NaN on one side only, by inf - inf where a sum has its terms in another order
        assert torch.equal(got.isfinite(), want.isfinite()), name
        numbers = [torch.where(want.isfinite(), t.double(), 0) for t in (got, want)]
        torch.testing.assert_close(*numbers, rtol=rtol, atol=atol, msg=f"{{}} ({name})".format)


def set_dense_tokens(monkeypatch, number):
    monkeypatch.setattr(fallback, "_DENSE_TOKENS", number)


@pytest.fixture
def fast(monkeypatch):
    """Fails the test if anything is computed again with care."""

    def refuse(*args):
        raise AssertionError("the fast way was not taken")

    monkeypatch.setattr(fallback, "_careful_bags", refuse)


@pytest.mark.parametrize("D", [1, 8, 30, 33])
@pytest.mark.parametrize("points", [(1, 1, 1), (4, 4, 4), (0, 3, 1)])
def test_float64(D, points, fast):
    check(make_inputs(D=D, points=points))


@pytest.mark.parametrize("chunk", [1, 40, 200])
@pytest.mark.parametrize("dense_tokens", [0, 6, 64])
def test_chunks_of_queries(chunk, dense_tokens, monkeypatch, fast):
    monkeypatch.setattr(fallback, "_CHUNK_FORWARD", chunk)
    monkeypatch.setattr(fallback, "_CHUNK_BACKWARD", chunk)
    monkeypatch.setattr(fallback, "_CHUNK_DENSE", 20 * chunk)
    set_dense_tokens(monkeypatch, dense_tokens)
    check(make_inputs(Q=7))


PARTS = {  # tokens of a dense level for each of its points: where the parts of the backward begin
    "all sorted": (0, [(7, 5), (2, 2), (3, 6)], None, [(0, 6, False)]),
    "all dense": (64, [(7, 5), (2, 2), (3, 6)], None, [(0, 6, True)]),
    "coarse levels dense": (6, [(7, 5), (2, 2), (3, 2)], None, [(0, 2, False), (2, 6, True)]),
    "fine levels between": (6, [(2, 2), (7, 5), (3, 2)], None, [(0, 2, True), (2, 5, False), (5, 6, True)]),
    "dense, not neighbours in memory": (6, [(2, 2), (3, 2)], [6, 0], [(0, 2, True), (2, 5, True)]),
    "overlapping": (64, [(2, 2), (3, 2)], [0, 1], [(0, 2, True), (2, 5, True)]),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_dense_and_sorted_parts(case, needs, monkeypatch, fast):
    dense_tokens, levels, starts, parts = PARTS[case]
    set_dense_tokens(monkeypatch, dense_tokens)
    inputs = make_inputs(levels=levels, points=(2, 3, 1)[: len(levels)])
    inputs[2] = None if starts is None else torch.tensor(starts)
    geometry, _ = bags.geometry_of(Call(*inputs))
    found = bags.parts_of(geometry, inputs[0].shape[1], dense_tokens)
    assert [(part.points.start, part.points.stop, part.dense) for part in found] == parts
    grad_out = grad_like(inputs)
    got = fallback_backward(grad_out, Call(*inputs), needs)
    for need, grad, want in zip(needs, got, expected(inputs, grad_out)[1:], strict=True):
        assert (grad is not None) == need
        if need:
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_against_float64(dtype, fast):
    inputs = make_inputs(dtype=dtype, Q=40, spread=1.2)
    grad_out = grad_like(inputs)
    exact = expected(inputs, grad_out)
    spec = expected(inputs, grad_out, torch.float32)
    for name, got, want, other in zip(NAMES, computed(inputs, grad_out), exact, spec, strict=True):
        assert got.dtype == dtype, name
        budget = 2 * (other.to(dtype).double() - want).norm() + 1e-7 * want.norm()
        assert (got.double() - want).norm() <= budget, name


def test_mixed_dtypes():
    inputs = make_inputs(dtype=torch.float32)
    inputs[0], inputs[4] = inputs[0].bfloat16(), inputs[4].half()
    grad_out = grad_like(inputs)
    got = computed(inputs, grad_out)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    for name, t, want, tolerance in zip(NAMES, got, expected(inputs, grad_out), (8e-3, 8e-3, 1e-5, 1e-3), strict=True):
        torch.testing.assert_close(t.double(), want, rtol=tolerance, atol=tolerance, msg=f"{{}} ({name})".format)


EDGES = [-1.0, -0.75, -0.5, -1e-9, 0.0, 0.25, 1.0, 2.5, 3.0, 3.5, 3.999, 4.0, 4.25, 1e30, -1e30]


def test_positions_at_and_beyond_the_border(fast):
    # pixel positions along x for a map 4 wide, y inside, and the other way round
    H, W = 4, 4
    at = torch.tensor(EDGES, dtype=torch.float64)
    inside = torch.full_like(at, 1.3)
    pixels = torch.stack((torch.stack((at, inside), -1), torch.stack((inside, at), -1), torch.stack((at, at), -1)))
    inputs = make_inputs(levels=[(H, W)], B=1, Q=3, M=1, points=(len(EDGES),))
    inputs[3] = ((pixels + 0.5) / W).view(1, 3, 1, len(EDGES), 2)
    check(inputs)


LAYOUTS = {
    "head-major": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "token-major": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of channels": lambda v: torch.cat((v + 1, v), 3)[..., v.shape[3] :],
    "slice that is no whole row": lambda v: torch.cat((v, v[..., :1]), 3)[..., : v.shape[3]],
    "channels strided": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "every other token": lambda v: torch.stack((v, -v), 2).flatten(1, 2)[:, ::2],
    "broadcast batch": lambda v: v[:1].expand_as(v),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_value(layout, fast):
    inputs = make_inputs()
    inputs[0] = LAYOUTS[layout](inputs[0])
    check(inputs)


def test_noncontiguous_locations_weights_and_grad(fast):
    inputs = make_inputs()
    inputs[3] = inputs[3].movedim(-1, 0).contiguous().movedim(0, -1)
    inputs[4] = inputs[4].transpose(1, 3).contiguous().transpose(1, 3)
    check(inputs, grad_out=torch.ones(1, dtype=torch.float64).expand(2, 5, 24))


@pytest.mark.parametrize("starts", [[0, 35, 36], [19, 18, 0], [0, 0, 0], [3, 2, 1]])
def test_level_start_index(starts, fast):
    inputs = make_inputs()
    inputs[2] = torch.tensor(starts)
    check(inputs)


@pytest.mark.parametrize(
    "levels, starts",
    [
        ([(7, 5), (1, 1), (3, 7)], None),
        ([(7, 5), (0, 5), (3, 6)], None),
        ([(7, 5), (-1, -1), (3, 6)], None),
        ([(7, 5), (1, 1), (3, 6)], [0, -1, 36]),
        ([(7, 5), (1, 1), (3, 6)], [0, 54, 36]),
        ([(2**31, 2**31), (1, 1), (3, 6)], None),
    ],
)
def test_levels_that_do_not_fit(levels, starts):
    inputs = make_inputs()
    inputs[1] = torch.tensor(levels)
    inputs[2] = None if starts is None else torch.tensor(starts)
    check(inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "locations", "weights", "weights beyond the map", "grad_out"])
def test_not_finite(bad, where):
    inputs = make_inputs(Q=9)
    grad_out = grad_like(inputs)
    if where == "value":
        inputs[0][0, 0, 0, 0] = bad  # a corner pixel, where neighbours outside must not read it
        inputs[3][0, 0, 0, 0] = -0.01
        inputs[3][0, 1, 0, 0] = 5.0
    elif where == "locations":
        inputs[3][0, 0, 0, :, 0] = bad
        inputs[3][1, 2, 1, 1, 1] = bad
    elif where == "weights":
        inputs[4][0, 0, 0, 0], inputs[3][0, 0, 0, 0] = bad, 0.4
    elif where == "weights beyond the map":
        inputs[4][0, 0, 0, 0], inputs[3][0, 0, 0, 0] = bad, 3.0
    else:
        grad_out[0, 0, 0] = bad
    want = expected(inputs, grad_out)
    assert any(not t.isfinite().all() for t in want) == (where not in ("locations", "weights beyond the map"))
    check(inputs, grad_out=grad_out)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_strange_locations_cost_nothing(bad, fast):
    inputs = make_inputs(Q=9, dtype=torch.float32)
    inputs[3][0, 0, 0, :, 0] = bad
    inputs[3][1, 2, 1, 1, 1] = bad
    if abs(bad) < math.inf:
        inputs[3][1, 3, 1, 1, 1] = bad  # that their sum is infinite
    check(inputs, rtol=1e-4, atol=1e-5)


def test_a_large_sum_of_small_numbers_in_half_precision_is_finite(fast):
    inputs = make_inputs(Q=300, M=2, levels=[(9, 9)], points=(2,), dtype=torch.float16)
    grad_out = torch.full((2, 300, 16), 1000.0, dtype=torch.float16)
    assert not inputs[3].sum().isinf() and grad_out.sum().isinf()
    want = expected(inputs, grad_out)[1]
    torch.testing.assert_close(computed(inputs, grad_out)[1].double(), want, rtol=1e-3, atol=1)


@pytest.mark.parametrize("where", [None, "value", "weights", "grad_out"])
def test_levels_without_pixels(where):
    """Their points take part in nothing, whatever their weights are."""
    inputs = make_inputs(levels=[(0, 3), (7, 5), (4, 0), (3, 6)], points=(2, 3, 1, 2))
    grad_out = grad_like(inputs)
    inputs[4][..., 0] = math.nan
    inputs[4][..., 5] = math.inf
    if where == "grad_out":
        grad_out[0, 0, 0] = math.inf
    elif where:
        inputs[0 if where == "value" else 4][0, 0, 0, 3] = math.nan
    check(inputs, grad_out=grad_out)
    _, _, locations, weights = computed(inputs, grad_out)
    for grad in (locations, weights):
        assert not grad[:, :, :, [0, 1, 5]].any()


def test_a_value_next_to_the_map_is_not_read():
    # level 0 ends where level 1 begins: NaN in level 1 must not reach samples of level 0 at its last row
    inputs = make_inputs(levels=[(3, 3), (2, 2)], B=1, Q=1, M=1, points=(1, 1))
    inputs[0][:, 9:] = math.nan
    inputs[3][..., 0, :], inputs[3][..., 1, :] = 0.99, 7.0
    out = fallback_forward(Call(*inputs))
    x = 0.99 * 3 - 0.5 - 2
    torch.testing.assert_close(out[0, 0], inputs[0][0, 8, 0] * (1 - x) ** 2 * inputs[4][0, 0, 0, 0])


@pytest.mark.parametrize("axis", ["B", "Q", "M", "D", "K", "S"])
def test_empty(axis):
    sizes = {"B": 2, "Q": 3, "M": 2, "D": 4}
    levels, points = LEVELS, (2, 1, 1)
    if axis == "K":
        points = (0, 0, 0)
    elif axis == "S":
        levels = [(0, 0)] * 3
    else:
        sizes[axis] = 0
    inputs = make_inputs(levels=levels, points=points, **sizes)
    shapes = [t.shape for t in (inputs[0], inputs[3], inputs[4])]
    out, *grads = computed(inputs, grad_like(inputs))
    assert out.shape == (sizes["B"], sizes["Q"], sizes["M"] * sizes["D"]) and not out.any()
    assert [g.shape for g in grads] == shapes and not any(g.any() for g in grads)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_only_what_is_needed(needs, fast):
    inputs = make_inputs()
    grad_out = grad_like(inputs)
    full = fallback_backward(grad_out, Call(*inputs), (True, True, True))
    part = fallback_backward(grad_out, Call(*inputs), needs)
    for need, p, f in zip(needs, part, full, strict=True):
        assert (p is not None) == need
        assert p is None or torch.equal(p, f)


@pytest.mark.parametrize("where", [0, 3, 4])
def test_needs_are_kept_where_not_all_is_finite(where):
    inputs = make_inputs()
    inputs[where].view(-1)[0] = math.nan
    grad_out = grad_like(inputs)
    value, locations, weights = fallback_backward(grad_out, Call(*inputs), (False, True, False))
    assert value is None and weights is None
    torch.testing.assert_close(locations, expected(inputs, grad_out)[2], equal_nan=True)
    assert fallback_backward(grad_out, Call(*inputs), (False, False, False)) == (None, None, None)


def test_inputs_stay_as_they_are_and_results_repeat():
    inputs = make_inputs(dtype=torch.float32, B=2, Q=300, levels=[(9, 9)], points=(4,))
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]
    grad_out = grad_like(inputs)
    first, second = computed(inputs, grad_out), computed(inputs, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True) if isinstance(a, torch.Tensor))


def test_no_warning_reaches_the_user():
    # in its own process, because torch gives some warnings once
    code = """
import torch
from msda_triton.call import Call
from msda_triton.cpu.fallback import fallback_backward
locations, weights = torch.rand(1, 3, 1, 2, 2), torch.rand(1, 3, 1, 2)
inputs = torch.ones(1, 4, 1, 2), torch.tensor([(2, 2)]), None, locations, weights, [2]
fallback_backward(torch.ones(1, 3, 2), Call(*inputs), (True, True, True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_compiles_as_one_graph_for_all_sizes():
    torch._dynamo.reset()
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    operators = torch.ops.msda_triton

    def both(value, shapes, locations, weights, grad_out):
        inputs = (value, shapes, None, locations, weights, [2, 3, 1], [], [])
        return operators.fallback_forward(*inputs), operators.fallback_backward(grad_out, [True, True, True], *inputs)

    compiled = torch.compile(both, backend=backend, fullgraph=True, dynamic=True)
    for Q, levels in ((5, LEVELS), (11, [(4, 4), (2, 3), (2, 2)])):
        inputs = make_inputs(Q=Q, levels=levels)
        grad_out = grad_like(inputs)
        out, grads = compiled(inputs[0], inputs[1], inputs[3], inputs[4], grad_out)
        for got, want in zip((out, *grads), expected(inputs, grad_out), strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1
