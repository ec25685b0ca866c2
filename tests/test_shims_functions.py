"""Every stand-in by its own signature: results and gradients against grid_sample in float64, and what it refuses."""

import itertools

import pytest
import torch
from attention import gradients, make_inputs, oracle, oracle_gradients

import msda_triton
from msda_triton.shims import (
    c_extension,
    dcnv4,
    deformable_detr,
    deformops,
    detrex,
    mmcv,
    rfdetr,
    rtdetr,
    rziga,
    torch_ms_deform_attn,
    transformers,
)

SHAPES, STARTS = [(3, 5), (2, 3)], [0, 15]  # wider than high, so that no axis can be taken for the other
B, Q, M, D, L, P = 2, 5, 3, 4, 2, 2
shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)


def _by_levels(v):
    return v.permute(0, 2, 3, 1).split([15, 6], -1)


def _flat(x, a):
    return x.flatten(3, 4), a.flatten(3)


# name of what is stood in for: a call with value [B, S, M, D], locations [B, Q, M, L, P, 2] and weights [B, Q, M, L, P]
CALLS = {
    "MSDeformAttnFunction.apply (Deformable DETR, Mask2Former, OneFormer, DINO, LW-DETR, dinov3)": lambda v, x, a: (
        deformable_detr.MSDeformAttnFunction.apply(v, shapes, starts, x, a, 64)
    ),
    "MultiScaleDeformableAttnFunction.apply (mmcv)": lambda v, x, a: mmcv.MultiScaleDeformableAttnFunction.apply(
        v, shapes, starts, x, a, 64
    ),
    "MultiScaleDeformableAttnFunction.apply (detrex, groundingdino)": lambda v, x, a: (
        detrex.MultiScaleDeformableAttnFunction.apply(v, shapes, starts, x, a, 64)
    ),
    "MultiScaleDeformableAttnFunction_fp32.apply (BEVFormer)": lambda v, x, a: (
        mmcv.MultiScaleDeformableAttnFunction_fp32.apply(v, shapes, starts, x, a, 64)
    ),
    "MultiScaleDeformableAttnFunction_fp16.apply (BEVFormer)": lambda v, x, a: (
        mmcv.MultiScaleDeformableAttnFunction_fp16.apply(v, shapes, starts, x, a, 64)
    ),
    "MultiScaleDeformableAttentionFunction.apply (transformers 4)": lambda v, x, a: (
        transformers.MultiScaleDeformableAttentionFunction.apply(v, shapes, starts, x, a, 64)
    ),
    "multi_scale_deformable_attn_pytorch (mmcv)": lambda v, x, a: mmcv.multi_scale_deformable_attn_pytorch(
        v, shapes, x, a
    ),
    "multi_scale_deformable_attn_pytorch (detrex, groundingdino)": lambda v, x, a: (
        detrex.multi_scale_deformable_attn_pytorch(v, shapes, x, a)
    ),
    "ms_deform_attn_core_pytorch (Deformable DETR)": lambda v, x, a: deformable_detr.ms_deform_attn_core_pytorch(
        v, shapes, x, a
    ),
    "ms_deform_attn_core_pytorch (rf-detr, LW-DETR)": lambda v, x, a: rfdetr.ms_deform_attn_core_pytorch(
        v.permute(0, 2, 3, 1).contiguous(), shapes, x, a.flatten(3)
    ),
    "ms_deform_attn_core_pytorch (rfdetr 1.11, export)": lambda v, x, a: rfdetr.ms_deform_attn_core_pytorch(
        v.permute(0, 2, 3, 1).contiguous(), shapes, *_flat(x, a), value_spatial_shapes_hw=SHAPES
    ),
    "deformable_attention_core_func (RT-DETR)": lambda v, x, a: rtdetr.deformable_attention_core_func(v, SHAPES, x, a),
    "deformable_attention_core_func_v2 (RT-DETRv2)": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v, SHAPES, *_flat(x, a), [P] * L
    ),
    "deformable_attention_core_func_v2 (D-FINE)": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        _by_levels(v), SHAPES, *_flat(x, a), [P] * L
    ),
    "deformable_attention_core_func_v2 (DEIM, default)": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        _by_levels(v), SHAPES, *_flat(x, a), [P] * L, value_shape="default"
    ),
    "deformable_attention_core_func_v2 (DEIM, reshape)": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v, SHAPES, *_flat(x, a), [P] * L, value_shape="reshape"
    ),
    "multi_scale_deformable_attention (transformers)": lambda v, x, a: transformers.multi_scale_deformable_attention(
        v, SHAPES, x, a
    ),
    "multi_scale_deformable_attention_v2 (transformers)": lambda v, x, a: (
        transformers.multi_scale_deformable_attention_v2(v, SHAPES, *_flat(x, a), [P] * L)
    ),
    "MultiScaleDeformableAttention (transformers)": lambda v, x, a: transformers.MultiScaleDeformableAttention()(
        v, shapes, SHAPES, starts, x, a, 64
    ),
    "ms_deform_attn (torch-ms-deform-attn)": lambda v, x, a: torch_ms_deform_attn.ms_deform_attn(
        v, shapes, starts, x, a, check_cuda_metadata=True
    ),
    "ms_deform_attn_core_pytorch (torch-ms-deform-attn)": lambda v, x, a: (
        torch_ms_deform_attn.ms_deform_attn_core_pytorch(v, shapes, x, a)
    ),
    "msda (deformops 3)": lambda v, x, a: deformops.msda(v, shapes, starts, x, a.flatten(3), chunk_step=2),
    "deform2d_multiscale (deformops 2)": lambda v, x, a: deformops.deform2d_multiscale(v, shapes, starts, x, a),
    "multiscale_deformable_attention (rziga)": lambda v, x, a: rziga.multiscale_deformable_attention(
        v, shapes, x, a, "zeros", False
    ).flatten(2),
}
# these take logits, of which the weights are the softmax over all points
SOFTMAX_CALLS = {
    "FlashDeformAttnFunction.apply (DCNv4)": lambda v, x, a: dcnv4.FlashDeformAttnFunction.apply(
        v, shapes, starts, torch.cat([x.flatten(3), a.flatten(3)], -1), 64, P
    ),
    "msda, softmax (deformops 3)": lambda v, x, a: deformops.msda(v, shapes, starts, x, a, method="softmax"),
    "deform2d_multiscale_fused (deformops 2)": lambda v, x, a: deformops.deform2d_multiscale_fused(
        v, shapes, starts, x, a, points=P
    ),
}


def named(calls):
    return [pytest.param(call, marks=pytest.mark.entry_point(name), id=name) for name, call in calls.items()]


def assert_oracle(call, expected, inputs, tolerance=1e-5):
    grad_out = torch.randn(B, Q, M * D)
    got, want = gradients(call, inputs, grad_out), oracle_gradients(expected, inputs, grad_out)
    for name, x, y in zip(("out", "value", "locations", "weights"), got, want, strict=True):
        assert x.dtype == inputs[0].dtype and x.shape == y.shape, name
        limit = tolerance * max(1, y.abs().max().item())
        error = (x.double() - y).abs().max().item()
        assert error <= limit, f"{name}: error {error:.1e}, expected at most {limit:.1e}"


@pytest.mark.parametrize("call", named(CALLS))
def test_results_and_gradients(call):
    assert_oracle(call, lambda v, x, a: oracle(v, SHAPES, x, a), make_inputs(SHAPES, B, Q, M, D, P))


@pytest.mark.parametrize("call", named(SOFTMAX_CALLS))
def test_results_and_gradients_with_the_softmax(call):
    value, locations, _ = make_inputs(SHAPES, B, Q, M, D, P)
    logits = torch.randn(B, Q, M, L, P, requires_grad=True)
    assert_oracle(
        call,
        lambda v, x, a: oracle(v, SHAPES, x, a.flatten(3).softmax(-1).view_as(a)),
        (value, locations, logits),
    )


@pytest.mark.entry_point("MultiScaleDeformableAttention.ms_deform_attn_forward, _backward")
def test_the_functions_of_the_extension():
    value, locations, weights = make_inputs(SHAPES, B, Q, M, D, P)
    grad_out = torch.randn(M * D, Q, B).permute(2, 1, 0)  # not contiguous
    want = oracle_gradients(lambda v, x, a: oracle(v, SHAPES, x, a), (value, locations, weights), grad_out)
    with torch.no_grad():
        inputs = value, shapes, starts, locations, weights
        got = [
            c_extension.ms_deform_attn_forward(*inputs, 64),
            *c_extension.ms_deform_attn_backward(*inputs, grad_out, 64),
        ]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.entry_point("mmcv._ext.ms_deform_attn_forward, _backward (in place)")
def test_the_functions_of_mmcv():
    value, locations, weights = make_inputs(SHAPES, B, Q, M, D, P)
    grad_out = torch.randn(B, Q, M * D)
    want = oracle_gradients(lambda v, x, a: oracle(v, SHAPES, x, a), (value, locations, weights), grad_out)
    with torch.no_grad():
        inputs = value, shapes, starts, locations, weights
        out = mmcv.ms_deform_attn_forward(*inputs, im2col_step=64)
        grads = [torch.zeros_like(x) for x in (value, locations, weights)]
        assert mmcv.ms_deform_attn_backward(*inputs, grad_out, *grads, im2col_step=64) is None
    for x, y in zip((out, *grads), want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def discrete(value, points, locations, weights, clamp_both_with_height):
    """RT-DETRv2's discrete sampling in scalar Python, on [B, S, M, D], [B, Q, M, K, 2] and [B, Q, M, K]."""
    out = torch.zeros(B, Q, M, D, dtype=torch.float64)
    level = [l for l, n in enumerate(points) for _ in range(n)]
    for b, q, m, k in itertools.product(range(B), range(Q), range(M), range(len(level))):
        H, W = SHAPES[level[k]]
        x, y = (locations[b, q, m, k].double() * torch.tensor([W, H]) + 0.5).long().tolist()
        x = min(max(x, 0), (H if clamp_both_with_height else W) - 1)
        y = min(max(y, 0), H - 1)
        out[b, q, m] += weights[b, q, m, k].double() * value[b, STARTS[level[k]] + y * W + x, m].double()
    return out.flatten(2)


@pytest.mark.parametrize(
    ("call", "both"),
    [
        pytest.param(transformers.multi_scale_deformable_attention_v2, False, id="transformers"),
        pytest.param(rtdetr.deformable_attention_core_func_v2, True, id="RT-DETRv2"),
        pytest.param(
            lambda v, *rest: rtdetr.deformable_attention_core_func_v2(_by_levels(v), *rest), True, id="D-FINE"
        ),
    ],
)
def test_discrete_sampling_and_points_per_level(call, both):
    value, locations, weights = make_inputs(SHAPES, B, Q, M, D, 2)
    x, a, points = locations.flatten(3, 4)[:, :, :, :3], weights.flatten(3)[..., :3], [2, 1]
    out = call(value, SHAPES, x, a, points, "discrete")
    with torch.no_grad():
        want = discrete(value, points, x, a, both)
        # the two ways to clamp differ here, or this test would say nothing about it
        assert (want - discrete(value, points, x, a, not both)).abs().max() > 0.1
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), (value, locations, weights), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None and grads[2].abs().sum() > 0

    bilinear = call(value, SHAPES, x, a, points)
    without_the_fourth = weights.clone()
    without_the_fourth[..., 1, 1] = 0
    want = oracle(value, SHAPES, locations, without_the_fourth)
    torch.testing.assert_close(bilinear.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "align"),
    [
        pytest.param(p, a, marks=pytest.mark.entry_point(f"multiscale_deformable_attention (rziga, {p}, {a})"))
        for p, a in (("border", False), ("border", True), ("zeros", True))
    ],
)
def test_padding_and_corners_as_grid_sample_has_them(padding, align):
    inputs = make_inputs(SHAPES, B, Q, M, D, P)

    def expected(value, locations, weights):
        out = 0
        for l, (H, W) in enumerate(SHAPES):
            image = value[:, STARTS[l] : STARTS[l] + H * W].permute(0, 2, 3, 1).reshape(B * M, D, H, W)
            grid = 2 * locations[:, :, :, l].transpose(1, 2).reshape(B * M, Q, P, 2) - 1
            sampled = torch.nn.functional.grid_sample(image, grid, "bilinear", padding, align)
            out = out + (sampled * weights[:, :, :, l].transpose(1, 2).reshape(B * M, 1, Q, P)).sum(-1)
        return out.view(B, M * D, Q).transpose(1, 2)

    def call(v, x, a):
        out = rziga.multiscale_deformable_attention(v, shapes, x, a, padding, align)
        assert out.shape == (B, Q, M, D)
        return out.flatten(2)

    assert_oracle(call, expected, inputs, tolerance=2e-5)


def test_bevformer_casts_value_and_result_under_autocast_and_keeps_the_locations():
    big = [(60, 100)]
    value, locations, weights = make_inputs(big, 1, 40, 2, 8, 4)
    arguments = value, torch.tensor(big), torch.tensor([0]), locations, weights, 64
    with torch.autocast("cpu", torch.bfloat16):
        half = mmcv.MultiScaleDeformableAttnFunction_fp16.apply(*arguments)
        single = mmcv.MultiScaleDeformableAttnFunction_fp32.apply(value.half(), *arguments[1:])
    assert half.dtype == torch.float16 and single.dtype == torch.float32
    exact = oracle(value, big, locations, weights)
    error = (half.double() - exact).abs().max() / exact.abs().max()
    assert error < 2e-3  # float16 coordinates on a map of 100 pixels would give 1e-2 and more
    assert mmcv.MultiScaleDeformableAttnFunction_fp16.apply(*arguments).dtype == torch.float32


WRONG = {
    "three dimensions": lambda v, x, a: c_extension.ms_deform_attn_forward(
        v, torch.tensor([[3, 5, 1], [2, 3, 1]]), starts, torch.cat([x, x[..., :1]], -1), a, 64
    ),
    "three-dimensional sizes only": lambda v, x, a: c_extension.ms_deform_attn_forward(
        v, torch.tensor([[3, 5, 1], [2, 3, 1]]), starts, x, a, 64
    ),
    "a gradient of another shape": lambda v, x, a: c_extension.ms_deform_attn_backward(
        v, shapes, starts, x, a, torch.zeros(B, Q, M, D), 64
    ),
    "weights of another shape, backward": lambda v, x, a: c_extension.ms_deform_attn_backward(
        v, shapes, starts, x, a[:, 1:], torch.zeros(B, Q, M * D), 64
    ),
    "heads last": lambda v, x, a: deformable_detr.MSDeformAttnFunction.apply(
        v.transpose(2, 3), shapes, starts, x, a, 64
    ),
    "heads before tokens, of mmcv's function": lambda v, x, a: mmcv.multi_scale_deformable_attn_pytorch(
        v.permute(0, 2, 3, 1), shapes, x, a
    ),
    "neither layout of the core function": lambda v, x, a: deformable_detr.ms_deform_attn_core_pytorch(
        v.permute(0, 3, 1, 2), shapes, x, a
    ),
    "one level too few": lambda v, x, a: rtdetr.deformable_attention_core_func(v, SHAPES[:1], x, a),
    "levels for one tensor": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        _by_levels(v), SHAPES, *_flat(x, a), [P] * L, value_shape="reshape"
    ),
    "one tensor for levels": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v, SHAPES, *_flat(x, a), [P] * L, value_shape="default"
    ),
    "levels with the batch in the heads": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        [u.flatten(0, 1) for u in _by_levels(v)], SHAPES, *_flat(x, a), [P] * L
    ),
    "levels of other sizes": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v.permute(0, 2, 3, 1).split([6, 15], -1), SHAPES, *_flat(x, a), [P] * L
    ),
    "an unknown method": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v, SHAPES, *_flat(x, a), [P] * L, "nearest"
    ),
    "points of another number": lambda v, x, a: transformers.multi_scale_deformable_attention_v2(
        v, SHAPES, *_flat(x, a), [P, P + 1]
    ),
    "weights of another layout": lambda v, x, a: deformops.msda(v, shapes, starts, x, a.transpose(3, 4).flatten(2)),
    "packed by another K": lambda v, x, a: dcnv4.FlashDeformAttnFunction.apply(
        v, shapes, starts, torch.cat([x.flatten(3), a.flatten(3)], -1), 64
    ),
    "a mode of grid_sample that is not there": lambda v, x, a: rziga.multiscale_deformable_attention(
        v, shapes, x, a, "reflection", False
    ),
    "tokens that do not fill the levels": lambda v, x, a: torch_ms_deform_attn.ms_deform_attn(
        v[:, 1:], shapes, starts, x, a
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_another_layout_is_refused_by_name(call):
    with pytest.raises((ValueError, TypeError), match=r"^\w+: expected .*, got "):
        call(*make_inputs(SHAPES, B, Q, M, D, P))


def test_the_core_function_tells_its_two_layouts_apart_where_heads_and_channels_are_as_many():
    value, locations, weights = make_inputs(SHAPES, B, Q, 4, 4, P)
    want = oracle(value, SHAPES, locations, weights)
    for v in (value, value.permute(0, 2, 3, 1)):
        got = deformable_detr.ms_deform_attn_core_pytorch(v, shapes, locations, weights)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    square, locations, weights = make_inputs([(2, 2)], B, Q, 4, 4, P)
    with pytest.raises(ValueError, match="which is both"):
        deformable_detr.ms_deform_attn_core_pytorch(square, [(2, 2)], locations, weights)


def test_a_stand_in_is_what_the_package_exports():
    assert torch_ms_deform_attn.MSDeformAttnFunction is msda_triton.MSDeformAttnFunction


BY_LIST = {
    "transformers' layer": lambda v, x, a: transformers.MultiScaleDeformableAttention().forward(
        v, shapes, SHAPES, starts, x, a, 64
    ),
    "mask2former's and oneformer's": lambda v, x, a: transformers.multi_scale_deformable_attention(v, SHAPES, x, a),
    "rt_detr_v2's, d_fine's, deimv2's": lambda v, x, a: transformers.multi_scale_deformable_attention_v2(
        v, SHAPES, *_flat(x, a), [P] * L
    ),
    "RT-DETR's": lambda v, x, a: rtdetr.deformable_attention_core_func(v, SHAPES, x, a),
    "RT-DETRv2's, D-FINE's, DEIM's": lambda v, x, a: rtdetr.deformable_attention_core_func_v2(
        v, SHAPES, *_flat(x, a), [P] * L
    ),
    "rf-detr's and LW-DETR's": lambda v, x, a: deformable_detr.ms_deform_attn_core_pytorch(
        v, shapes.to("meta"), x, a, value_spatial_shapes_hw=SHAPES
    ),
    "torch_ms_deform_attn, checked": lambda v, x, a: torch_ms_deform_attn.ms_deform_attn(
        v, shapes, starts, x, a, check_cuda_metadata=True
    ),
}


@pytest.mark.parametrize("name", BY_LIST)
def test_sizes_that_the_host_has_reach_the_kernels_as_integers(name, monkeypatch):
    """So queries that are pixels are taken in rectangles, and graphs hold no constants."""
    seen = []
    attend = msda_triton.functional.attend
    monkeypatch.setattr(
        msda_triton.functional, "attend", lambda call, backend: (seen.append(call), attend(call, backend))[1]
    )
    BY_LIST[name](*(x.detach() for x in make_inputs(SHAPES, B=B, Q=Q, M=M, D=D, P=P)))
    assert [list(call.level_sizes) for call in seen] == [[3, 5, 2, 3]] and seen[0].spatial_shapes is None
