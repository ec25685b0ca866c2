"""Every error message, and the choice of a backend."""

import numpy as np
import pytest
import torch
from attention import make_inputs, oracle, oracle_gradients, reference

from msda_triton import MSDeformAttn, MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_fused, set_autotune
from msda_triton.checks import INTEGERS
from msda_triton.functional import ms_deform_attn_backward

SHAPES = [(3, 4), (2, 2)]
DTYPES = "expected float16, bfloat16, float32 or float64, got torch"
S = 16


def call(**changes):
    torch.manual_seed(0)
    value, locations, weights = make_inputs(SHAPES, B=2, Q=3, M=2, D=4, P=2)
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    arguments.update({name: f(arguments.get(name)) if callable(f) else f for name, f in changes.items()})
    return ms_deform_attn(**arguments)


def fused(**changes):
    value, locations, weights = make_inputs(SHAPES, B=2, Q=3, M=2, D=4, P=2)
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "reference_points": torch.rand(2, 3, 2, 2),
        "sampling_offsets": locations,
        "attention_logits": weights,
    }
    arguments.update({name: f(arguments.get(name)) if callable(f) else f for name, f in changes.items()})
    return ms_deform_attn_fused(**arguments)


BAD = [
    (ValueError, "value: expected 4 dimensions", {"value": lambda v: v[0]}),
    (TypeError, "value: expected a tensor", {"value": lambda v: v.tolist()}),
    (TypeError, f"value: {DTYPES}.int64", {"value": lambda v: v.long()}),
    (ValueError, "value: expected at least one head", {"value": lambda v: v[..., :0]}),
    (ValueError, "value's device|meta", {"value": lambda v: v.to("meta")}),
    (ValueError, "sampling_locations: expected 6 dimensions", {"sampling_locations": lambda x: x[..., 0]}),
    (TypeError, f"sampling_locations: {DTYPES}", {"sampling_locations": lambda x: x.long()}),
    (ValueError, "sampling_locations: expected shape .2, Q, 2", {"sampling_locations": lambda x: x[:1]}),
    (ValueError, "sampling_locations: expected shape", {"sampling_locations": lambda x: x[..., :1]}),
    (ValueError, "sampling_locations: expected shape", {"value": lambda v: v[:, :, :1]}),
    (ValueError, "attention_weights: expected 5 dimensions", {"attention_weights": lambda x: x[..., None]}),
    (ValueError, "attention_weights: expected shape .2, 3, 2, 2, 2.", {"attention_weights": lambda x: x[:, :, :, :1]}),
    (ValueError, "attention_weights: expected shape", {"attention_weights": lambda x: x[:, :2]}),
    (TypeError, f"attention_weights: {DTYPES}", {"attention_weights": lambda x: x > 0}),
    (ValueError, "spatial_shapes: expected 2 x 2 integers", {"spatial_shapes": [(3, 4)]}),
    (ValueError, "spatial_shapes: expected 2 x 2 integers", {"spatial_shapes": [(3, 4, 1), (2, 2, 1)]}),
    (TypeError, "spatial_shapes: expected integers, got", {"spatial_shapes": [(3.5, 4), (2, 2)]}),
    (TypeError, "level_start_index: expected integers, got", {"level_start_index": [0, 12.5]}),
    (ValueError, r"spatial_shapes: expected shape \(2, 2\)", {"spatial_shapes": torch.ones(3, 2, dtype=torch.long)}),
    (TypeError, "spatial_shapes: expected an integer dtype", {"spatial_shapes": torch.ones(2, 2)}),
    (ValueError, "spatial_shapes: expected areas that sum to S = 16", {"spatial_shapes": [(3, 4), (2, 3)]}),
    (ValueError, "spatial_shapes: expected areas that sum", {"spatial_shapes": torch.tensor([[3, 4], [3, 3]])}),
    (ValueError, "spatial_shapes: expected sizes of at least 0", {"spatial_shapes": [(-3, -4), (2, 2)]}),
    (ValueError, "level_start_index: expected levels inside the S = 16", {"level_start_index": [0, 13]}),
    (ValueError, "level_start_index: expected levels inside", {"level_start_index": [-1, 12]}),
    (ValueError, "level_start_index: expected 2 integers", {"level_start_index": [0]}),
    (TypeError, "level_start_index: expected an integer", {"level_start_index": torch.tensor([0.0, 12.0])}),
    (ValueError, "backend: expected one of .*'cuda'", {"backend": "cuda"}),
    (ValueError, "method: expected one of .*'nearest'", {"method": "nearest"}),
    (ValueError, "num_points: expected at least one point", {"num_points": []}),
    (ValueError, "num_points: expected at least one point", {"num_points": [4, 0]}),
    (ValueError, "sampling_locations: expected 5 dimensions", {"num_points": [2, 2]}),
    (TypeError, "num_points: expected the number of points of each level, as integers, got 4", {"num_points": 4}),
    (TypeError, "num_points: expected the number .*, got '22'", {"num_points": "22"}),
    (TypeError, r"num_points: expected the number .*, got \[2.0, 2\]", {"num_points": [2.0, 2]}),
    (TypeError, "num_points: expected the number .*, got {2: 2}", {"num_points": {2: 2}}),
    (TypeError, "spatial_shapes: expected an integer tensor .L, 2. or a pair .* got 24", {"spatial_shapes": 24}),
    (TypeError, "spatial_shapes: expected an integer tensor .* got None", {"spatial_shapes": None}),
    (TypeError, "spatial_shapes: expected an integer tensor .* got '22'", {"spatial_shapes": "22"}),
    (TypeError, "spatial_shapes: expected an integer tensor .* got 3", {"spatial_shapes": [3, 4, 2, 2]}),
    (TypeError, "spatial_shapes: expected an integer tensor .* got {", {"spatial_shapes": {(3, 4): 0, (2, 2): 0}}),
    (TypeError, "spatial_shapes: expected integers, got .*True", {"spatial_shapes": [(True, 12), (2, 2)]}),
    (TypeError, "spatial_shapes: expected integers, got ", {"spatial_shapes": [([3], 4), (2, 2)]}),
    (TypeError, "spatial_shapes: expected integers, got array", {"spatial_shapes": np.array(SHAPES, dtype=float)}),
    (ValueError, "spatial_shapes: .* below 2.31, got .*9223372036854775808", {"spatial_shapes": [(2**63, 0), (4, 4)]}),
    (ValueError, "spatial_shapes: .* below 2.31", {"spatial_shapes": [(2**63, 1), (2, 2)]}),
    (ValueError, "spatial_shapes: expected a dense tensor", {"spatial_shapes": torch.tensor(SHAPES).to_sparse()}),
    (TypeError, "level_start_index: expected 2 integers, got 0", {"level_start_index": 0}),
    (TypeError, "level_start_index: expected 2 integers, got '00'", {"level_start_index": "00"}),
    (TypeError, "level_start_index: expected integers, got .*True", {"level_start_index": [0, True]}),
    (ValueError, "level_start_index: expected levels inside", {"level_start_index": [0, 2**63]}),
    (ValueError, "value: expected a dense tensor, got torch.sparse_coo", {"value": lambda v: v.detach().to_sparse()}),
    (ValueError, "value: .* got a nested one", {"value": lambda v: torch.nested.nested_tensor(list(v.detach()))}),
    (TypeError, f"value: {DTYPES}.float8_e4m3fn", {"value": lambda v: v.to(torch.float8_e4m3fn)}),
    (TypeError, f"value: {DTYPES}.complex64", {"value": lambda v: v.to(torch.complex64)}),
    (TypeError, f"sampling_locations: {DTYPES}.float8_e5m2", {"sampling_locations": lambda x: x.to(torch.float8_e5m2)}),
    (TypeError, f"attention_weights: {DTYPES}.float8_e5m2", {"attention_weights": lambda x: x.to(torch.float8_e5m2)}),
    (ValueError, "backend: expected one of .*None", {"backend": None}),
    (ValueError, "backend: expected one of .* got array", {"backend": np.array("auto")}),
    (ValueError, "method: expected one of .*None", {"method": None}),
    (ValueError, "method: expected one of .* got array", {"method": np.array("default")}),
    (TypeError, "spatial_shapes: expected an integer dtype", {"spatial_shapes": torch.empty(2, 2, dtype=torch.bits8)}),
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, changes):
    with pytest.raises(error, match=message):
        call(**changes)


BAD_FUSED = [
    (
        ValueError,
        r"reference_points: expected shape \(2, 3, 2 or 1, 2 or 4\)",
        {"reference_points": torch.rand(2, 3, 2)},
    ),
    (ValueError, "reference_points: expected shape", {"reference_points": torch.rand(2, 3, 2, 3)}),
    (ValueError, "reference_points: expected shape", {"reference_points": torch.rand(2, 3, 3, 2)}),
    (TypeError, f"reference_points: {DTYPES}", {"reference_points": torch.ones(2, 3, 2, 2).long()}),
    (TypeError, "value_mask: expected a bool tensor", {"value_mask": torch.ones(2, 16)}),
    (ValueError, r"value_mask: expected shape \(2, 16\)", {"value_mask": torch.ones(2, 15).bool()}),
    (ValueError, "sampling_offsets: expected 6 dimensions", {"sampling_offsets": lambda x: x.flatten(3, 4)}),
    (ValueError, "attention_logits: expected shape", {"attention_logits": lambda x: x[..., :1]}),
    (TypeError, "value_mask: expected a tensor, got list", {"value_mask": [[False] * 16] * 2}),
    (TypeError, "value_mask: expected a tensor, got ndarray", {"value_mask": np.zeros((2, 16), dtype=bool)}),
    (ValueError, "value_mask: expected a dense", {"value_mask": torch.zeros(2, 16, dtype=torch.bool).to_sparse()}),
    (TypeError, f"reference_points: {DTYPES}.float8", {"reference_points": lambda x: x.to(torch.float8_e5m2)}),
]


BAD_MODULE = [
    (ValueError, "n_heads: expected at least 1, got 0", {"n_heads": 0}),
    (ValueError, "n_levels: expected at least 1, got -1", {"n_levels": -1}),
    (ValueError, "n_points: expected at least 1, got 0", {"n_points": 0}),
    (TypeError, "d_model: expected an integer, got 16.0", {"d_model": 16.0}),
    (TypeError, "n_heads: expected an integer, got True", {"n_heads": True}),
    (ValueError, "backend: expected one of .*'cuda'", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD_MODULE, ids=[message for _, message, _ in BAD_MODULE])
def test_bad_arguments_of_the_module(error, message, arguments):
    with pytest.raises(error, match=message):
        MSDeformAttn(**arguments)


BAD_FORWARD = [
    (ValueError, r"query: expected shape \(B, Q, 8\), got \(3, 8\)", {"query": torch.rand(3, 8)}),
    (ValueError, r"query: expected shape \(B, Q, 8\), got \(2, 3, 4\)", {"query": torch.rand(2, 3, 4)}),
    (TypeError, "query: expected a tensor, got NoneType", {"query": None}),
    (TypeError, f"query: {DTYPES}.int64", {"query": torch.ones(2, 3, 8).long()}),
    (TypeError, "query: expected torch.float32 like .* got torch.float64", {"query": torch.rand(2, 3, 8).double()}),
    (ValueError, "query: expected on the module's device cpu, got meta", {"query": torch.rand(2, 3, 8, device="meta")}),
    (TypeError, "input_flatten: expected torch.float32 like", {"input_flatten": torch.rand(2, 16, 8).half()}),
    (ValueError, r"input_flatten: expected shape \(2, S, 8\), got \(1, 16", {"input_flatten": torch.rand(1, 16, 8)}),
    (ValueError, r"input_flatten: expected shape \(2, S, 8\), got \(2, 16, 4", {"input_flatten": torch.rand(2, 16, 4)}),
    (ValueError, "reference_points: expected shape", {"reference_points": torch.rand(1, 3, 2, 2)}),
    (TypeError, "spatial_shapes: expected an integer tensor", {"input_spatial_shapes": None}),
    (TypeError, "level_start_index: expected 2 integers, got 0", {"input_level_start_index": 0}),
    (TypeError, "input_padding_mask: expected a tensor, got list", {"input_padding_mask": [[False] * 16] * 2}),
    (ValueError, "input_padding_mask: expected shape", {"input_padding_mask": torch.zeros(2, 15).bool()}),
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD_FORWARD, ids=[message for _, message, _ in BAD_FORWARD])
def test_bad_input_of_the_module(error, message, changes):
    inputs = {"query": torch.rand(2, 3, 8), "reference_points": torch.rand(2, 3, 2, 2)}
    inputs |= {"input_flatten": torch.rand(2, 16, 8), "input_spatial_shapes": SHAPES}
    with pytest.raises(error, match=message):
        MSDeformAttn(8, 2, 2, 2)(**inputs | changes)


@pytest.mark.parametrize(
    ("error", "message", "grad_out"),
    [
        (TypeError, "grad_out: expected a tensor, got list", [1.0]),
        (TypeError, f"grad_out: {DTYPES}.int64", torch.ones(2, 3, 8).long()),
        (ValueError, "grad_out: expected shape", torch.ones(2, 3, 7)),
    ],
)
def test_bad_grad_out(error, message, grad_out):
    value, locations, weights = make_inputs(SHAPES, B=2, Q=3, M=2, D=4, P=2)
    with pytest.raises(error, match=message):
        ms_deform_attn_backward(grad_out, value, SHAPES, locations, weights)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_in_float64_makes_the_backward_float64(backend):
    value, locations, weights = (x.detach() for x in make_inputs(SHAPES, B=1, Q=3, M=1, D=4, P=2))
    grad_out = torch.randn(1, 3, 4, dtype=torch.float64) * 1e60
    weights *= 1e-30
    got = ms_deform_attn_backward(grad_out, value, SHAPES, locations, weights, backend=backend)
    want = ms_deform_attn_backward(grad_out, value.double(), SHAPES, locations, weights, backend=backend)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("enabled", ["yes", 1, None])
def test_autotune_is_on_or_off(enabled):
    with pytest.raises(TypeError, match="enabled: expected True or False, got "):
        set_autotune(enabled)


@pytest.mark.parametrize(("error", "message", "changes"), BAD_FUSED, ids=[message for _, message, _ in BAD_FUSED])
def test_bad_fused_input(error, message, changes):
    with pytest.raises(error, match=message):
        fused(**changes)


@pytest.mark.parametrize(
    "shapes",
    [
        *(SHAPES, tuple(SHAPES), [list(row) for row in SHAPES], [torch.Size(s) for s in SHAPES]),
        *(np.array(SHAPES), [(np.int64(3), 4), (2, np.int32(2))]),
        *(torch.tensor(SHAPES, dtype=getattr(torch, name)) for name in ("int64", "int32", "int16", "uint8", "uint16")),
    ],
)
def test_forms_of_spatial_shapes(shapes):
    torch.testing.assert_close(call(spatial_shapes=shapes), call())
    torch.testing.assert_close(call(spatial_shapes=shapes, level_start_index=[0, 12]), call())
    torch.testing.assert_close(call(spatial_shapes=shapes, level_start_index=torch.tensor([0, 12])), call())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_training_after_inference_with_the_same_shapes(backend):
    shapes = [(3, 7), (2, 1)]  # of no other test: its tensors are made in inference mode here
    inputs = make_inputs(shapes)
    with torch.inference_mode():
        before = ms_deform_attn(inputs[0], shapes, *inputs[1:], backend=backend)
    out = ms_deform_attn(inputs[0], shapes, *inputs[1:], backend=backend)
    assert torch.equal(out, before)
    exact = oracle_gradients(lambda *x: oracle(x[0], shapes, *x[1:]), inputs, torch.ones_like(out))
    for got, want in zip(torch.autograd.grad(out.sum(), inputs), exact[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_original_autograd_function():
    value, locations, weights = make_inputs(SHAPES, B=3, Q=3, M=2, D=4, P=2)  # 3 is no multiple of im2col_step
    starts = torch.tensor([0, 12])
    got = MSDeformAttnFunction.apply(value, torch.tensor(SHAPES), starts, locations, weights, 2)
    torch.testing.assert_close(got, reference(value, SHAPES, locations, weights))
    got.sum().backward()
    assert value.grad is not None and locations.grad is not None and weights.grad is not None


def test_triton_without_a_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: 'triton' needs tensors on cuda or xpu, got cpu"):
        call(backend="triton")


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr("msda_triton.functional.TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        call(backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_points", [[2, 2], [1, 3], [3, 1]])
@pytest.mark.parametrize("method", ["default", "discrete", "discrete_h"])
def test_points_per_level_and_methods_agree_with_the_reference(backend, num_points, method):
    """Ragged points sample their own levels; "discrete" is an index computed here."""
    shapes = [(3, 5), (4, 2)]
    value = torch.randn(2, 23, 2, 8, dtype=torch.float64)
    locations = torch.rand(2, 6, 2, 4, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 6, 2, 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn(value, shapes, locations, weights, num_points=num_points, method=method, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    want, first, start = 0, 0, 0
    for (H, W), n in zip(shapes, num_points, strict=True):
        points = slice(first, first + n)
        level, loc, attn = value[:, start : start + H * W], locations[:, :, :, points], weights[:, :, :, points]
        if method == "default":
            want = want + reference(level, [(H, W)], loc[:, :, :, None], attn[:, :, :, None])
        else:
            x_last = (H if method == "discrete_h" else W) - 1
            x = (loc[..., 0] * W + 0.5).long().clamp(0, x_last)
            y = (loc[..., 1] * H + 0.5).long().clamp(0, H - 1)
            inside = x < W  # "discrete_h" on a tall map: there is nothing to read
            b, m = torch.arange(2).view(2, 1, 1, 1), torch.arange(2).view(1, 1, 2, 1)
            pixel = level[b, (y * W + x).clamp(max=H * W - 1), m] * inside[..., None]
            want = want + (attn[..., None] * pixel).sum(3).flatten(2)
        first, start = first + n, start + H * W
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    want_grads = torch.autograd.grad(want.square().sum(), inputs, allow_unused=True)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_areas_that_the_sizes_dtype_does_not_hold(method, dtype):
    """20 x 20 pixels are more than a uint8 counts to, and 200 x 200 more than an int16."""
    shapes = [(200, 200) if dtype == torch.int16 else (20, 20), (1, 2)]
    inputs = make_inputs(shapes, B=1, Q=4, M=1, D=2, dtype=torch.float64)
    grads = []
    for sizes in (torch.tensor(shapes, dtype=dtype), shapes):
        out = ms_deform_attn(inputs[0], sizes, *inputs[1:], method=method)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        grads.append((out, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)))
    for x, y in zip(*grads, strict=True):
        assert x.abs().max() > 0 or method == "discrete"
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton", "inductor"])
@pytest.mark.parametrize("method", ["discrete", "discrete_h"])
def test_discrete_is_one_formula_with_derivatives_of_every_order(method, backend):
    shapes = [(3, 5), (4, 2)]
    inputs = make_inputs(shapes, B=1, Q=3, M=2, D=3, dtype=torch.float64)
    function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, method=method, backend=backend)  # noqa: E731
    assert torch.equal(function(*inputs), ms_deform_attn(inputs[0], shapes, *inputs[1:], method=method))
    weighed = lambda v, a: function(v, inputs[1].detach(), a)  # noqa: E731
    assert torch.autograd.gradcheck(weighed, (inputs[0], inputs[2]))
    assert torch.autograd.gradgradcheck(weighed, (inputs[0], inputs[2]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dim", [2, 4])
def test_fused_sizes_of_every_integer_dtype(dim, backend):
    inputs = (
        torch.randn(1, 16, 1, 4),
        torch.rand(1, 3, 2, dim),
        torch.randn(1, 3, 1, 2, 2, 2),
        torch.randn(1, 3, 1, 2, 2),
    )
    run = lambda shapes: ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], backend=backend)  # noqa: E731
    for dtype in INTEGERS:
        assert torch.equal(run(torch.tensor(SHAPES).to(dtype)), run(SHAPES)), dtype


def test_sizes_of_inference_mode_serve_for_training():
    with torch.inference_mode():
        shapes = torch.tensor(SHAPES)
    inputs = make_inputs(SHAPES, B=1, Q=3, M=1, D=4)
    ms_deform_attn(inputs[0], shapes, *inputs[1:]).sum().backward()
    assert inputs[0].grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_discrete_where_only_the_locations_ask_for_a_gradient(backend):
    value, locations, weights = make_inputs(SHAPES, B=2, Q=3, M=2, D=4, P=2)
    with torch.no_grad():
        locations[0, 0, 0, 0, 0], locations[0, 1, 0, 0, 0] = float("nan"), 3e38
    out = ms_deform_attn(value.detach(), SHAPES, locations, weights.detach(), method="discrete", backend=backend)
    out.backward(torch.full_like(out, float("inf")))
    assert torch.equal(locations.grad, torch.zeros_like(locations))
