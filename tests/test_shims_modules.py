"""The modules of Deformable DETR, rf-detr, mmcv, detrex and groundingdino: against their formula in float64."""

import pytest
import torch
from attention import oracle
from torch import nn

import msda_triton
from msda_triton.shims import deformable_detr, detrex, mmcv

SHAPES, STARTS = [(3, 5), (2, 3)], [0, 15]
B, Q, S, C, M, L, P = 2, 7, 21, 24, 3, 2, 2
KEYS = {f"{name}.{kind}" for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for kind in ("weight", "bias")}  # fmt: skip


def formula(module, query, value, reference, mask):
    """Projections, locations and softmax in float64 from the module's weights; all tensors batch first."""
    state = {key: x.double() for key, x in module.state_dict().items()}

    def linear(x, name):
        return x.double() @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    projected = linear(value, "value_proj").masked_fill(mask[..., None], 0).view(B, S, M, -1)
    offsets = linear(query, "sampling_offsets").view(B, Q, M, L, P, 2)
    weights = linear(query, "attention_weights").view(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
    reference = reference.double()[:, :, None, :, None]
    if reference.shape[-1] == 2:
        locations = reference + offsets / torch.tensor(SHAPES).flip(-1)[:, None]
    else:
        locations = reference[..., :2] + offsets / P * reference[..., 2:] * 0.5
    return linear(oracle(projected, SHAPES, locations, weights), "output_proj")


@pytest.fixture(params=[2, 4], ids=["points", "boxes"])
def inputs(request):
    """query, value, position [B, ., C], reference [B, Q, L, 2 or 4] and the padding mask, True on padding."""
    return (
        torch.randn(B, Q, C),
        torch.randn(B, S, C),
        torch.randn(B, Q, C),
        torch.rand(B, Q, L, request.param),
        torch.rand(B, S) < 0.3,
    )


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def assert_close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def assert_trains(module, out):
    gradients = torch.autograd.grad(out.square().sum(), module.parameters())
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.entry_point("MSDeformAttn (Deformable DETR, Mask2Former, OneFormer, DINO, LW-DETR, rf-detr, dinov3)")
def test_deformable_detr(inputs):
    query, value, _, reference, mask = inputs
    module = randomised(deformable_detr.MSDeformAttn(C, L, M, P))
    assert module.state_dict().keys() == KEYS and isinstance(module, msda_triton.MSDeformAttn)
    want = formula(module, query, value, reference, mask)
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
    out = module(query, reference, value, shapes, starts, mask)
    assert_close(out, want)
    assert_trains(module, out)
    assert_close(module(query, reference, value, shapes, starts, mask, input_spatial_shapes_hw=SHAPES), want)
    one_level = reference[:, :, :1]
    module.export()
    program = torch.export.export(module, (query, one_level, value, shapes, starts, mask, SHAPES))
    got = program.module()(query, one_level, value, shapes, starts, mask, SHAPES)
    assert_close(got, formula(module, query, value, one_level.expand(-1, -1, L, -1), mask))


@pytest.mark.entry_point("mmcv.ops.MultiScaleDeformableAttention")
@pytest.mark.parametrize("batch_first", [False, True])
def test_mmcv(inputs, batch_first):
    query, value, position, reference, mask = inputs
    identity = torch.randn(B, Q, C)
    module = randomised(mmcv.MultiScaleDeformableAttention(C, M, L, P, batch_first=batch_first, value_proj_ratio=0.5))
    assert module.state_dict().keys() == KEYS and module.value_proj.out_features == C // 2
    module.eval()

    def run(**tensors):
        swap = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
        out = module(
            **{key: swap(x) for key, x in tensors.items()}, key_padding_mask=mask, reference_points=reference,
            spatial_shapes=torch.tensor(SHAPES), level_start_index=torch.tensor(STARTS),
        )  # fmt: skip
        return swap(out)

    attended = formula(module, query + position, value, reference, mask)
    out = run(query=query, value=value, query_pos=position)
    assert_close(out, attended + query)
    assert_trains(module, out)
    assert_close(run(query=query, value=value, query_pos=position, identity=identity), attended + identity)
    with pytest.warns(DeprecationWarning, match="identity"):
        assert_close(run(query=query, value=value, query_pos=position, residual=identity), attended + identity)
    module.train()
    module.dropout.p = 1.0
    assert torch.equal(run(query=query, value=value, identity=identity), identity)
    module.init_weights()
    assert module.sampling_offsets.weight.abs().sum() == 0 and module.sampling_offsets.bias.abs().max() == P


@pytest.mark.parametrize(
    ("kind", "residual"),
    [
        pytest.param(
            detrex.MultiScaleDeformableAttention, True, id="detrex",
            marks=pytest.mark.entry_point("detrex.layers.MultiScaleDeformableAttention"),
        ),
        pytest.param(
            detrex.GroundingDINOAttention, False, id="groundingdino",
            marks=pytest.mark.entry_point("groundingdino ms_deform_attn.MultiScaleDeformableAttention"),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch_first", [False, True])
def test_detrex_and_groundingdino(inputs, kind, residual, batch_first):
    query, value, position, reference, mask = inputs
    module = randomised(kind(embed_dim=C, num_heads=M, num_levels=L, num_points=P, batch_first=batch_first)).eval()
    assert module.state_dict().keys() == KEYS
    swap = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    out = module(
        swap(query), None, swap(value), query_pos=swap(position), key_padding_mask=mask, reference_points=reference,
        spatial_shapes=torch.tensor(SHAPES), level_start_index=torch.tensor(STARTS),
    )  # fmt: skip
    want = formula(module, query + position, value, reference, mask)
    assert_close(swap(out), want + query if residual else want)
    assert_trains(module, out)
    if residual:
        identity = torch.randn(B, Q, C)
        again = module(
            swap(query), None, swap(value), swap(identity), swap(position), mask, reference, torch.tensor(SHAPES)
        )
        assert_close(swap(again), want + identity)


def test_a_query_that_is_its_own_value():
    module = randomised(mmcv.MultiScaleDeformableAttention(C, M, L, P, dropout=0.0, batch_first=True))
    source, reference = torch.randn(B, S, C), torch.rand(B, S, L, 2)
    out = module(source, reference_points=reference, spatial_shapes=torch.tensor(SHAPES))
    explicit = module(source, value=source, reference_points=reference, spatial_shapes=torch.tensor(SHAPES))
    torch.testing.assert_close(out, explicit, rtol=0, atol=0)
