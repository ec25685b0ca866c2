"""The kernels (interpreted without a GPU) against the float64 oracle: forward and every gradient."""

import functools

import pytest
import torch
from attention import assert_error_budget, gradients, make_inputs, oracle, oracle_gradients, reference
from planned import attend
from torch.utils._python_dispatch import TorchDispatchMode

from msda_triton import ms_deform_attn, ms_deform_attn_fused
from msda_triton.checks import fused_call, plain_call
from msda_triton.kernels import launch
from msda_triton.kernels.plan import CONFIGS, Config

NAMES = ("out", "grad_value", "grad_locations", "grad_weights")
SHAPES = [(6, 9), (3, 5), (2, 2), (1, 1), (4, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def check(shapes, inputs, function=None):
    """Output and gradients of the kernels within the error budget of the oracle."""
    B, _, M, D = inputs[0].shape
    grad_out = torch.randn(B, inputs[1].shape[1], M * D, dtype=torch.float64).to(inputs[0].dtype).to(inputs[0].device)
    function = function or functools.partial(ms_deform_attn, backend="triton")
    got = gradients(lambda v, x, a: function(v, shapes, x, a), inputs, grad_out)
    rounded = gradients(lambda v, x, a: reference(v, shapes, x, a), inputs, grad_out)
    exact = oracle_gradients(lambda v, x, a: oracle(v, shapes, x, a), inputs, grad_out)
    assert_error_budget(got, rounded, exact, NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 2, 8, 24, 30, 32, 64, 71])
def test_channels(D, dtype, device, poisoned_empty):
    B = 2 if dtype == torch.float32 else 1  # interpreted programs are slow
    check(SHAPES[:2], make_inputs(SHAPES[:2], B=B, Q=19 if D < 64 else 5, D=D, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("L", "P"), [(L, P) for L in range(1, 6) for P in range(1, 9) if L in (1, 5) or P in (1, 4, 8)]
)
def test_levels_and_points(L, P, device, poisoned_empty):
    check(SHAPES[:L], make_inputs(SHAPES[:L], B=1, Q=5, M=1, P=P, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", sorted({*CONFIGS["forward"], *CONFIGS["backward"]}))
def test_every_configuration(name, fused, device, poisoned_empty):
    """Interpreted, other calls run a configuration of the interpreter's own. Queries are pixels: rectangles are
    cut. With 32 channels chunks are rotated in two orders (plain, bfloat16) and in four (fused, float32)."""
    shapes = [(3, 9)]
    dtype = torch.float32 if fused else torch.bfloat16
    inputs = make_inputs(shapes, B=1, Q=27, M=1, D=32, P=4, dtype=dtype, device=device)
    configs = {direction: of.get(name, of["many"]) for direction, of in CONFIGS.items()}
    if not fused:
        check(shapes, inputs, lambda *inputs: attend(plain_call(*inputs), configs))
        return
    grad_out = torch.randn(1, 27, 32, device=device)
    # boxes at zero, eight times the map: an offset moves by 8 / 2 / P = 1, and is the location
    points = torch.tensor([0.0, 0.0, 8.0, 8.0], device=device).expand(1, 27, 1, 4)
    got = gradients(lambda v, x, a: attend(fused_call(v, shapes, points, x, a), configs), inputs, grad_out)
    exact = oracle_gradients(
        lambda v, x, a: oracle(v, shapes, x, a.flatten(3).softmax(-1).view_as(a)), inputs, grad_out
    )
    for name, x, y in zip(NAMES, got, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("Q", [1, 31, 32, 33, 128, 130, 257])
@pytest.mark.parametrize("D", [1, 32])
def test_queries(Q, D, device, poisoned_empty):
    check(SHAPES[:2], make_inputs(SHAPES[:2], B=1, Q=Q, M=1, D=D, dtype=torch.float32, device=device))


@pytest.mark.parametrize(
    ("num_points", "fused", "D"),
    [([4, 4], False, 32), ([4, 4], True, 32), ([8, 8], False, 30), ([3, 3], False, 4), ([4, 8], True, 4)],
)
def test_points_of_a_query_spread_over_rows(num_points, fused, D, device, poisoned_empty):
    """An order of work, taken where it divides the points of a level."""
    B, M, Q = 1, 2, 5
    value = torch.randn(B, 69, M, D, device=device)
    inputs = [
        torch.randn(B, Q, M, sum(num_points), 2, device=device),
        torch.randn(B, Q, M, sum(num_points), device=device),
    ]
    if fused:
        inputs = [torch.rand(B, Q, 2, 4, device=device), *inputs]
    function = ms_deform_attn_fused if fused else ms_deform_attn
    call = (fused_call if fused else plain_call)(value, SHAPES[:2], *inputs, num_points=num_points)
    sums = []
    for split in (4, 1):
        sums.append(attend(call, Config(tile=512, lane=8, unroll=1, width=2, warps=1, split=split)))
    expected = function(value.double(), SHAPES[:2], *inputs, num_points=num_points, backend="torch")
    for out in sums:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, 2, 8])
@pytest.mark.parametrize(
    ("shapes", "starts"), [(SHAPES[:2], None), ([(9, 1), (1, 9)], None), ([(3, 5), (4, 4)], [16, 0])]
)
def test_pixels_as_queries_are_taken_in_rectangles(shapes, starts, width, device, poisoned_empty):
    """An order of work: every query once, whatever the sizes and the order of the levels in memory."""
    config, grids = Config(tile=256, lane=8, unroll=1, width=width, warps=1), []

    def run(kernel, call, arguments, plan):
        grids.append(plan.grid(call)[0])
        launch.run(kernel, call, arguments, plan)

    def function(value, shapes, locations, weights, level_start_index=None):
        return attend(plain_call(value, shapes, locations, weights, level_start_index), config, run=run)

    S = sum(h * w for h, w in shapes)
    inputs = make_inputs(shapes, B=1, Q=S, M=1, D=16, P=1, device=device)  # 16 rows a program
    if starts is None:
        check(shapes, inputs, function)
    else:
        swapped = torch.cat([inputs[0][:, 15:], inputs[0][:, :15]], 1)
        got = function(swapped, shapes, *inputs[1:], level_start_index=starts)
        torch.testing.assert_close(got, reference(inputs[0], shapes, *inputs[1:]))
    tiles = sum(-(-h // (16 // width)) * -(-w // width) for h, w in shapes) if width else -(-S // 16)
    assert set(grids) == {tiles}


def test_more_images_than_a_grid_has_room_for(device, poisoned_empty):
    batches = []

    def run(kernel, call, arguments, plan):
        batches.append(plan.grid(call)[2])
        launch.run(kernel, call, arguments, plan)

    function = lambda *inputs: attend(plain_call(*inputs), run=run, images=2)  # noqa: E731
    inputs = make_inputs(SHAPES[:2], B=5, Q=3, M=2, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.float16):  # PyTorch refuses to concatenate bfloat16 there
        check(SHAPES[:2], inputs, function)
    assert batches == [2, 2, 1, 2, 2, 1]
    call = plain_call(inputs[0].detach(), SHAPES[:2], inputs[1], inputs[2])
    whole, joined = (
        launch.backward(torch.ones(5, 3, 16, device=device), call, [True, True, True, False], images=images)
        for images in (5, 2)
    )
    assert [x.stride() for x in whole[:3]] == [x.stride() for x in joined[:3]]


@pytest.mark.parametrize("D", [256, 1025, 2048])
def test_many_channels(D, device, poisoned_empty):
    check(SHAPES[:1], make_inputs(SHAPES[:1], B=1, Q=3, M=1, D=D, P=1, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("location_dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, location_dtype, device, poisoned_empty):
    inputs = make_inputs(SHAPES[:2], B=1, M=1, D=16, dtype=dtype, location_dtype=location_dtype, device=device)
    check(SHAPES[:2], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [4, 6])
@pytest.mark.parametrize("skipped", [0, 1])
def test_neighbouring_numbers_are_one_load_where_memory_is_aligned(skipped, P, dtype, device):
    """Locations and weights may begin at any element of their storage: only then are they loaded one by one."""
    pairs = []

    def run(kernel, call, arguments, plan):
        pairs.append(plan.PAIRS)
        launch.run(kernel, call, arguments, plan)

    def moved(x):
        memory = torch.empty(x.numel() + skipped, dtype=x.dtype, device=device)
        return memory[skipped:].view(x.shape).copy_(x.detach()).requires_grad_()

    value, *rest = make_inputs(SHAPES[:2], B=1, Q=5, M=1, D=16, P=P, dtype=dtype, device=device)
    config = Config(tile=512, lane=8, unroll=2, width=2, warps=1)
    check(SHAPES[:2], (value, *map(moved, rest)), lambda *inputs: attend(plain_call(*inputs), config, run=run))
    assert pairs == [0 if skipped or dtype == torch.float64 else 2, 0]  # the backward loads one by one


@pytest.mark.parametrize(("P", "unroll", "pairs", "turn"), [(6, 1, 1, 2), (6, 2, 2, 1), (4, 1, 1, 4), (4, 2, 2, 2)])
def test_points_in_pairs_and_in_turned_orders(P, unroll, pairs, turn, device):
    """The same numbers, whether the weights of two points are one load, and whatever point a row begins with."""
    inputs = make_inputs(SHAPES[:2], B=1, Q=5, M=1, D=16, P=P, device=device)
    seen = []

    def run(kernel, call, arguments, plan):
        seen.append((plan.PAIRS, plan.TURN))
        launch.run(kernel, call, arguments, plan)

    config = Config(tile=512, lane=8, unroll=unroll, width=2, warps=1, turn=True)
    check(SHAPES[:2], inputs, lambda *inputs: attend(plain_call(*inputs), config, run=run))
    assert seen == [(pairs, turn), (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_border_and_integer_positions(dtype, device):
    """Every multiple of a quarter pixel from two pixels left of the map to two right of it, on both axes."""
    H, W = 4, 8  # powers of two: (x + 0.5) / W is exact
    x, y = torch.arange(-2, W + 1.25, 0.25), torch.arange(-2, H + 1.25, 0.25)
    grid = torch.stack(torch.meshgrid((x + 0.5) / W, (y + 0.5) / H, indexing="xy"), -1).view(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, H * W, 1, 8, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    locations = grid.to(device).requires_grad_()
    weights = torch.ones(1, grid.shape[1], 1, 1, 1, dtype=dtype, device=device, requires_grad=True)
    check([(H, W)], (value, locations, weights))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3.4e38, -0.0, 1e-42])
def test_strange_locations(bad, device, poisoned_empty):
    inputs = make_inputs(SHAPES[:2], D=32, device=device)
    with torch.no_grad():
        inputs[1][0, 3, 0, 0, 1, 0] = bad
        inputs[1][1, 5, 1, 1, 0, 1] = bad
        inputs[1][1, 7, 1, 1, 0] = bad
    check(SHAPES[:2], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_values_stay_where_they_are(dtype, device):
    """NaN or infinity in a pixel or a weight reaches exactly the outputs that the specification says."""
    shapes = SHAPES[:2]
    inputs = make_inputs(shapes, D=8, dtype=dtype, device=device)
    with torch.no_grad():
        inputs[0][0, 0, 0, 2] = float("nan")
        inputs[0][0, 7, 1, 5] = float("inf")
        inputs[0][1, 54, 1, 0] = -float("inf")
        inputs[2][1, 3, 0, 1, 1] = float("nan")
    got = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2], backend="triton").float()
    want = reference(inputs[0], shapes, inputs[1], inputs[2]).float()
    torch.testing.assert_close(got.nan_to_num(7, 8, 9), want.nan_to_num(7, 8, 9), rtol=1e-2, atol=1e-2)
    assert (got.isnan() == want.isnan()).all()
    assert (got.isinf() == want.isinf()).all()


@pytest.mark.parametrize("D", [2, 30, 71, 1025])
def test_gradcheck_on_the_shapes_of_the_original(D, device):
    """N, M = 1, 2; two queries, levels and points; maps (6, 4) and (3, 2): the test of the CUDA extension.

    A GPU adds in any order: two runs may differ in the last bit.
    """
    shapes = [(6, 4), (3, 2)]
    value = (torch.rand(1, 30, 2, D, dtype=torch.float64, device=device) * 0.01).requires_grad_()
    locations = torch.rand(1, 2, 2, 2, 2, 2, dtype=torch.float64, device=device).requires_grad_()
    weights = torch.rand(1, 2, 2, 2, 2, dtype=torch.float64, device=device) + 1e-5
    weights = (weights / weights.sum((-1, -2), keepdim=True)).requires_grad_()
    function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(function, (value, locations, weights), fast_mode=True, nondet_tol=1e-12)


def test_gradcheck_of_every_entry_and_gradgradcheck(device):
    shapes = [(2, 2)]
    inputs = make_inputs(shapes, B=1, Q=1, M=1, D=2, P=2, dtype=torch.float64, device=device)
    function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("B, Q", [(0, 3), (2, 0), (0, 0)])
def test_empty(B, Q, device):
    inputs = make_inputs([(3, 4)], B=B, Q=Q, device=device)
    grads = gradients(
        lambda v, x, a: ms_deform_attn(v, [(3, 4)], x, a, backend="triton"), inputs, torch.ones(B, Q, 16, device=device)
    )
    assert grads[0].shape == (B, Q, 16)
    for x, grad in zip(inputs, grads[1:], strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("B, shapes", [(0, [(3, 4)]), (2, [(0, 3)])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_and_strided(dtype, B, shapes, device):
    """PyTorch calls a tensor without elements contiguous, whatever its strides."""
    value, locations, weights = make_inputs(shapes, B=B, Q=3, D=16, dtype=dtype, device=device)
    strided = value.detach().new_empty(*value.shape, 2)[..., 0].requires_grad_()
    function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, backend="triton")  # noqa: E731
    grad_out = torch.ones(B, 3, 32, dtype=dtype, device=device)
    assert not any(x.any() for x in gradients(function, (strided, locations, weights), grad_out))


def test_no_tokens(device):
    value = torch.zeros(1, 0, 2, 8, device=device)
    _, locations, weights = make_inputs([(0, 3)], B=1, Q=4, device=device)
    out = ms_deform_attn(value, [(0, 3)], locations, weights, backend="triton")
    assert out.shape == (1, 4, 16)
    assert not out.any()


VIEWS = {
    "head-major": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence-first": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of a packed projection": lambda v: torch.cat([v, v * 2, v * 3], -1)[..., v.shape[-1] : 2 * v.shape[-1]],
    "every other token": lambda v: v.repeat_interleave(2, 1)[:, ::2],
    "expanded batch": lambda v: v[:1].expand(2, -1, -1, -1),
    "channels strided": lambda v: v.repeat_interleave(2, -1)[..., ::2],
    "odd offset": lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape),
    "odd stride": lambda v: torch.nn.functional.pad(v, (0, 1))[..., :-1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_value(view, dtype, device, poisoned_empty):
    M = 2 if dtype == torch.float32 else 1  # interpreted programs are slow
    value, locations, weights = make_inputs(SHAPES[:2], M=M, D=16, dtype=dtype, device=device)
    value = VIEWS[view](value.detach()).requires_grad_()
    check(SHAPES[:2], (value, locations, weights))


def test_contiguous_last_dimension_is_read_in_place(device, monkeypatch):
    value, locations, weights = make_inputs(SHAPES[:2], D=16, device=device)
    head_major = VIEWS["head-major"](value.detach())
    seen = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, *a, **k: seen.append(self.shape) or self)
    ms_deform_attn(head_major, SHAPES[:2], locations, weights, backend="triton")
    assert head_major.shape not in seen


def test_level_start_index_out_of_order(device, poisoned_empty):
    shapes = [(3, 5), (6, 9)]
    value, locations, weights = make_inputs(shapes, device=device)
    swapped = torch.cat([value[:, 15:], value[:, :15]], 1)
    got = ms_deform_attn(swapped, shapes, locations, weights, level_start_index=[54, 0], backend="triton")
    torch.testing.assert_close(got, reference(value, shapes, locations, weights))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c])
def test_only_the_gradients_asked_for(needs, device):
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.msda_triton.backward.default:
                calls.append(result)
            return result

    inputs = make_inputs(SHAPES[:2], B=1, M=1, D=16, device=device)
    full = gradients(
        lambda v, x, a: ms_deform_attn(v, SHAPES[:2], x, a, backend="triton"),
        inputs,
        torch.ones(1, 19, 16, device=device),
    )
    some = [x.detach().requires_grad_(bool(n)) for x, n in zip(inputs, needs, strict=True)]
    out = ms_deform_attn(some[0], SHAPES[:2], *some[1:], backend="triton")
    with Watch():
        out.backward(torch.ones_like(out))
    # an operator returns an empty tensor for a gradient that nobody asked for
    assert [g.numel() > 0 for g in calls[0][:3]] == [bool(n) for n in needs]
    for x, n, grad in zip(some, needs, full[1:], strict=True):
        if n:
            torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-6)
        else:
            assert x.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_sample_off_the_map_has_no_gradient_where_that_of_its_row_is_not_finite(backend, bad, device):
    if backend == "torch":
        device = "cpu"
    inputs = make_inputs(SHAPES[:2], B=1, Q=4, M=2, D=8, device=device, span=0.8)
    grad_out = torch.randn(1, 4, 16, device=device)
    grad_out[0, 2, 3] = bad
    with torch.no_grad():
        inputs[1][0, 2, 0, 1, 0] = 3.0
    _, _, locations, weights = gradients(
        lambda v, x, a: ms_deform_attn(v, SHAPES[:2], x, a, backend=backend), inputs, grad_out
    )
    assert not locations[0, 2, 0, 1, 0].any() and not weights[0, 2, 0, 1, 0].any()
    finite = torch.ones(4, 2, dtype=torch.bool, device=device)
    finite[2, 0] = False
    assert torch.equal(locations[0].isfinite().all((-1, -2, -3)), finite)
    assert torch.equal(weights[0].isfinite().all((-1, -2)), finite)
