"""`ms_deform_attn_fused` and the module against softmax, locations and mask written out in float64."""

import math

import pytest
import torch
from attention import assert_error_budget, gradients, oracle, oracle_gradients

from msda_triton import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused

SHAPES = [(5, 7), (3, 4), (1, 2)]
S = 49
NAMES = ("out", "grad_value", "grad_reference_points", "grad_offsets", "grad_logits")


def make_inputs(dim, levels, P, D, dtype, device, B=2):
    value = torch.randn(B, S, 2, D, dtype=torch.float64).to(dtype)
    points = torch.rand(B, 21, levels, dim, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    offsets = (torch.randn(B, 21, 2, 3, P, 2, dtype=torch.float64) * 2).to(dtype)
    logits = torch.randn(B, 21, 2, 3, P, dtype=torch.float64).mul(3).to(dtype)
    return [x.to(device).requires_grad_() for x in (value, points, offsets, logits)]


def written_out(value, points, offsets, logits, mask, attend):
    """The fused operator in steps; `attend` is the plain one."""
    P = offsets.shape[4]
    sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=points.dtype, device=points.device)
    points = points[:, :, None, :, None]
    offsets, logits = offsets.to(points.dtype), logits.to(points.dtype)
    if points.shape[-1] == 2:
        locations = points + offsets / sizes[None, None, None, :, None]
    else:
        locations = points[..., :2] + offsets / P * points[..., 2:] * 0.5
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    if mask is not None:
        value = value * ~mask[:, :, None, None]
    return attend(value, SHAPES, locations, weights)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("dim", "levels", "masked"), [(2, 1, False), (2, 3, True), (4, 1, True), (4, 3, False)])
def test_output_and_gradients(dim, levels, masked, dtype, backend, device, poisoned_empty):
    B = 2 if dtype == torch.float32 else 1  # interpreted programs are slow
    inputs = make_inputs(dim, levels, P=2, D=16, dtype=dtype, device=device, B=B)
    mask = (torch.rand(B, S) < 0.3).to(device) if masked else None
    grad_out = torch.randn(B, 21, 32, dtype=torch.float64).to(dtype).to(device)
    got = gradients(
        lambda v, r, o, a: ms_deform_attn_fused(v, SHAPES, r, o, a, value_mask=mask, backend=backend), inputs, grad_out
    )
    in_dtype = lambda v, r, o, a: written_out(  # noqa: E731
        v, r, o, a, mask, lambda *x: ms_deform_attn(*x, backend="torch")
    )
    exact = lambda v, r, o, a: written_out(v, r, o, a, mask, oracle)  # noqa: E731
    assert_error_budget(got, gradients(in_dtype, inputs, grad_out), oracle_gradients(exact, inputs, grad_out), NAMES)


def test_large_logits_do_not_overflow(device):
    value, points, offsets, logits = make_inputs(2, 1, P=3, D=8, dtype=torch.float32, device=device)
    shifted = (logits.detach() + 300).requires_grad_()
    outs = [ms_deform_attn_fused(value, SHAPES, points, offsets, a, backend="triton") for a in (logits, shifted)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_saves_nothing_of_the_size_of_float32_locations(device):
    value, points, offsets, logits = make_inputs(2, 1, P=3, D=8, dtype=torch.bfloat16, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ms_deform_attn_fused(value, SHAPES, points, offsets, logits, backend="triton")
    floats = [x for x in saved if x.is_floating_point()]
    assert sum(x.nbytes for x in floats) == sum(x.nbytes for x in (value, points, offsets, logits))


def test_gradgradcheck(device):
    shapes = [(2, 2)]
    value = torch.randn(1, 4, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    points = torch.rand(1, 1, 1, 4, dtype=torch.float64, device=device, requires_grad=True)
    offsets = torch.randn(1, 1, 1, 1, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    logits = torch.randn(1, 1, 1, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    function = lambda *x: ms_deform_attn_fused(x[0], shapes, *x[1:], backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(function, (value, points, offsets, logits), nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, (value, points, offsets, logits), fast_mode=True, nondet_tol=1e-12)


def test_module_parameters_and_initialisation():
    module = MSDeformAttn(d_model=64, n_levels=3, n_heads=8, n_points=4)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (192, 64),
        "sampling_offsets.bias": (192,),
        "attention_weights.weight": (96, 64),
        "attention_weights.bias": (96,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
        "output_proj.weight": (64, 64),
        "output_proj.bias": (64,),
    }
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    assert not module.value_proj.bias.any() and not module.output_proj.bias.any()
    bias = module.sampling_offsets.bias.view(8, 3, 4, 2)
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for m, direction in enumerate(ring):
        for p in range(4):
            want = torch.tensor(direction).float() * (p + 1)
            torch.testing.assert_close(bias[m, :, p], want.expand(3, 2), rtol=0, atol=1e-5)
    bound = math.sqrt(6 / (64 + 64))  # xavier
    for projection in (module.value_proj, module.output_proj):
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_module_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="d_model: expected a multiple of n_heads = 8, got 60"):
        MSDeformAttn(d_model=60)


@pytest.mark.parametrize("dim", [2, 4])
def test_module_forward(dim):
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=3).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    query, source = torch.randn(2, 21, 16).double(), torch.randn(2, S, 16).double()
    points, mask = torch.rand(2, 21, 3, dim).double(), torch.rand(2, S) < 0.3
    shapes = torch.tensor(SHAPES)
    starts = torch.tensor([0, 35, 47])
    got = module(query, points, source, shapes, starts, mask)
    value = module.value_proj(source).view(2, S, 2, 8)
    offsets = module.sampling_offsets(query).view(2, 21, 2, 3, 3, 2)
    logits = module.attention_weights(query).view(2, 21, 2, 3, 3)
    want = module.output_proj(written_out(value, points, offsets, logits, mask, oracle))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_under_autocast(dtype):
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=3)
    query, source, points = torch.randn(2, 21, 16), torch.randn(2, S, 16), torch.rand(2, 21, 3, 2)
    exact = module(query, points, source, SHAPES)
    with torch.autocast("cpu", dtype=dtype):
        got = module(query, points, source, SHAPES)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0.03, atol=0.03)
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def check_finite_rule(backend, device, change, dim, shapes=SHAPES):
    """All gradients are those of the oracle with the samples that are not taken left out."""
    value, points, offsets, logits = make_inputs(dim, 3, P=2, D=8, dtype=torch.float64, device="cpu", B=1)
    with torch.no_grad():
        taken = change(points, offsets, logits)  # [B, Q, M, L, P]
    inputs = [value[:, : sum(h * w for h, w in shapes)].detach(), points, offsets, logits]
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad_out = torch.randn(1, inputs[2].shape[1], 16, dtype=torch.float64)
    function = lambda v, r, o, a: ms_deform_attn_fused(v, shapes, r, o, a, backend=backend)  # noqa: E731
    got = [
        x.cpu()
        for x in gradients(function, [x.detach().to(device).requires_grad_() for x in inputs], grad_out.to(device))
    ]

    clean = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        clean[1][~clean[1].isfinite()] = 0.5
        clean[2][~clean[2].isfinite()] = 0.5
    weights = clean[3].flatten(3).softmax(-1).view_as(logits)
    weights = torch.where(taken, weights, 0)
    sizes = torch.tensor([(max(w, 1), max(h, 1)) for h, w in shapes], dtype=torch.float64)
    middle = clean[1][:, :, None, :, None]
    if dim == 2:
        locations = middle + clean[2] / sizes[:, None]
    else:
        locations = middle[..., :2] + clean[2] / 2 * middle[..., 2:] * 0.5
    locations = torch.where(taken[..., None], locations, -9.0)
    present = [l for l, (h, w) in enumerate(shapes) if h * w]
    want = oracle(clean[0], [shapes[l] for l in present], locations[:, :, :, present], weights[:, :, :, present])
    want = [want, *torch.autograd.grad(want, clean, grad_out, materialize_grads=True, allow_unused=True)]
    for name, x, y in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=f"{{}} ({name})".format)


def all_but(offsets, *index):
    taken = torch.ones(offsets.shape[:-1], dtype=torch.bool)
    for i in index:
        taken[i] = False
    return taken


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_without_a_place_has_no_gradient(bad, dim, backend, device):
    def change(points, offsets, logits):
        offsets[0, 1, 1, 0, 1, 0] = bad
        points[0, 2, 1, 1] = bad
        return all_but(offsets, (0, 1, 1, 0, 1), (0, 2, slice(None), 1))

    check_finite_rule(backend, device, change, dim)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_box_whose_side_is_infinite(bad, backend, device):
    def change(points, offsets, logits):
        points[0, 3, 2, 3] = bad
        offsets[0, 3, 0, 2, 0, 1] = 0.0  # 0 * inf
        return all_but(offsets, (0, 3, slice(None), 2))

    check_finite_rule(backend, device, change, 4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("empty", [(0, 3), (3, 0), (0, 0)])
def test_a_level_of_no_pixels(empty, dim, backend, device):
    def change(points, offsets, logits):
        return all_but(offsets, (slice(None), slice(None), slice(None), 1))

    check_finite_rule(backend, device, change, dim, shapes=[(5, 7), empty, (1, 2)])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("double", range(4))
def test_one_float64_input_makes_all_computation_float64(double, backend, device):
    inputs = make_inputs(4, 1, P=2, D=8, dtype=torch.float32, device=device, B=1)
    inputs[double] = inputs[double].detach().double().requires_grad_()
    grad_out = torch.randn(1, 21, 16, dtype=inputs[0].dtype).to(device)
    got = gradients(lambda v, r, o, a: ms_deform_attn_fused(v, SHAPES, r, o, a, backend=backend), inputs, grad_out)
    exact = oracle_gradients(lambda v, r, o, a: written_out(v, r, o, a, None, oracle), inputs, grad_out)
    for name, x, y in zip(NAMES, got, exact, strict=True):
        # results in float32 are rounded once, from float64
        tolerance = 1e-12 if x.dtype == torch.float64 else 2.0**-24
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=1e-12, msg=f"{{}} ({name})".format)


def with_hooks(module):
    """Weights that a hook brings and casts, as offloading and layerwise casting do."""
    module.half()
    for layer in (module.sampling_offsets, module.attention_weights, module.value_proj, module.output_proj):
        layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(layer.weight.dtype),))


CHANGED = {
    "another layer": lambda module: setattr(module, "value_proj", torch.nn.Sequential(module.value_proj)),
    "a lazy layer": lambda module: setattr(module, "value_proj", torch.nn.LazyLinear(16)),
    "a parametrized layer": lambda module: torch.nn.utils.parametrizations.spectral_norm(module.value_proj),
    "hooks": with_hooks,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_module_takes_whatever_stands_in_for_its_layers(change):
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=3)
    change(module)
    out = module(torch.randn(2, 21, 16), torch.rand(2, 21, 3, 2), torch.randn(2, S, 16), SHAPES)
    assert out.shape == (2, 21, 16) and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "levels"), [(2, 1), (2, 3), (4, 1), (4, 3)])
def test_locations_and_weights_of_the_module(dim, levels, dtype):
    """By the paper's formulas in float64; and the plain operator on them gives what the module gives."""
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=2, backend="torch").to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    query, source = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, S, 16, dtype=dtype)
    points = torch.rand(2, 5, levels, dim, dtype=torch.promote_types(dtype, torch.float32))
    shapes = SHAPES if levels == 1 else torch.tensor(SHAPES)
    with torch.no_grad():
        locations, weights = module.locations_and_weights(query, points, shapes)
        expected = module(query, points, source, shapes)
        value = module.value_proj(source).view(2, S, 2, 8)
        offsets = module.sampling_offsets(query).view(2, 5, 2, 3, 2, 2).double()
        logits = module.attention_weights(query).view(2, 5, 2, 3, 2).double()
        assert locations.dtype == weights.dtype == torch.promote_types(dtype, torch.float32)
        by_formula = written_out(value, points.double(), offsets, logits, None, lambda v, s, x, a: (x, a))
        for got, want in zip((locations, weights), by_formula, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        out = module.output_proj(ms_deform_attn(value, SHAPES, locations, weights))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 5, 8)}, r"query: expected shape \(B, Q, 16\), got \(2, 5, 8\)"),
        ({"reference_points": torch.zeros(2, 5, 2, 2)}, r"reference_points: expected shape \(2, 5, 3 or 1, 2 or 4\)"),
        ({"input_spatial_shapes": SHAPES[:2]}, "spatial_shapes: expected 3 x 2 integers"),
        ({"input_spatial_shapes": [(-5, 7), *SHAPES[1:]]}, "spatial_shapes: expected sizes of at least 0"),
        (
            {"input_spatial_shapes": torch.tensor([(5, 7), (3, 4), (1, -2)])},
            "spatial_shapes: expected sizes of at least 0",
        ),
        ({"input_spatial_shapes": torch.zeros(2, 2, dtype=torch.long)}, r"spatial_shapes: expected shape \(3, 2\)"),
    ],
)
def test_bad_input_of_locations_and_weights(changes, message):
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=2)
    given = {
        "query": torch.zeros(2, 5, 16),
        "reference_points": torch.zeros(2, 5, 3, 2),
        "input_spatial_shapes": SHAPES,
    }
    with pytest.raises(ValueError, match=message):
        module.locations_and_weights(**given | changes)


def test_a_graph_made_without_gradients_has_finite_ones():
    """The gradient of a sample that is not taken is zero, also where nobody asked for gradients at export."""

    class Model(torch.nn.Module):
        def forward(self, value, points, offsets, logits):
            return ms_deform_attn_fused(value, SHAPES, points, offsets, logits, backend="torch")

    inputs = make_inputs(4, 3, P=2, D=8, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        exported = torch.export.export(Model(), tuple(x.detach() for x in inputs)).module()
        inputs[2][0, 0, 0, 0, 0] = float("inf")
    assert all(x.isfinite().all() for x in gradients(exported, inputs, torch.randn(2, 21, 16)))


def test_the_modules_layers_run_in_the_originals_order():
    """Hooks and dropout in the place of a layer see it."""
    module, order = MSDeformAttn(d_model=16, n_levels=3, n_heads=2, n_points=3), []
    for name, layer in module.named_children():
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
    module(torch.randn(2, 21, 16), torch.rand(2, 21, 3, 2), torch.randn(2, S, 16), SHAPES)
    assert order == ["value_proj", "sampling_offsets", "attention_weights", "output_proj"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_gradient_of_the_reference_points_alone(backend, device):
    value, offsets = torch.randn(1, 47, 2, 8, device=device), torch.randn(1, 3, 2, 2, 2, 2, device=device)
    logits = torch.randn(1, 3, 2, 2, 2, device=device)
    points = torch.rand(1, 3, 1, 2, device=device, requires_grad=True)
    out = ms_deform_attn_fused(value, [(5, 7), (3, 4)], points, offsets, logits, backend=backend)
    (got,) = torch.autograd.grad(out.square().sum(), points)
    exact = points.detach().double().requires_grad_()
    sizes = torch.tensor([(7.0, 5.0), (4.0, 3.0)], dtype=torch.float64, device=device)
    locations = exact[:, :, None, :, None] + offsets.double() / sizes[:, None]
    weights = logits.double().flatten(3).softmax(-1).view(logits.shape)
    (want,) = torch.autograd.grad(oracle(value, [(5, 7), (3, 4)], locations, weights).square().sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
