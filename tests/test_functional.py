"""Every error message, and the choice of a backend."""

import pytest
import torch
from attention import make_inputs, oracle, oracle_gradients, reference

from msda_triton import MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_fused

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
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD_FUSED, ids=[message for _, message, _ in BAD_FUSED])
def test_bad_fused_input(error, message, changes):
    with pytest.raises(error, match=message):
        fused(**changes)


@pytest.mark.parametrize(
    "shapes",
    [SHAPES, tuple(SHAPES), [list(row) for row in SHAPES], torch.tensor(SHAPES), torch.tensor(SHAPES).int()],
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
