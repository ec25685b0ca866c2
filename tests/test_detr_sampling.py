"""Sampling points: what the hook recomputes is what the attention used."""

import numpy as np
import pytest
import torch
from PIL import Image

from detr.model import build_model
from detr.presets import preset
from detr.sampling import draw_sampling_points, sampling_points
from msda_triton import ms_deform_attn

SMALL = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 6, "enc_layers": 1, "dec_layers": 2}


@pytest.mark.parametrize("changes", [{"refine": False}, {}, {"two_stage": True}], ids=["points", "boxes", "two_stage"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_points_and_weights_give_the_result_of_the_attention(changes, layer):
    torch.manual_seed(0)
    model = build_model(preset("tiny", **{"two_stage": False} | SMALL | changes), 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    attention = model.transformer.decoder.layers[layer].cross_attn
    calls = []
    attention.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    _, locations, weights = sampling_points(model, torch.randn(3, 48, 80), layer)
    assert locations.shape == (6, 2, 3, 2, 2) and weights.shape == (6, 2, 3, 2)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(6, 2))
    [((_, _, memory, shapes), expected)] = calls
    with torch.no_grad():
        value = attention.value_proj(memory).view(1, -1, 2, 16)
        out = attention.output_proj(ms_deform_attn(value, shapes, locations[None], weights[None]))
    torch.testing.assert_close(out, expected)
    assert not attention._forward_pre_hooks  # nothing is left in the model


def test_global_attention_has_no_points():
    model = build_model(
        preset("tiny", two_stage=False, **SMALL, attention="global", n_levels=1, refine=False), 2
    ).eval()
    with pytest.raises(ValueError, match="attention: a model with global attention has no sampling points"):
        sampling_points(model, torch.randn(3, 48, 80))


def test_heavy_points_are_red_and_lie_where_they_are():
    picture = Image.fromarray(np.full((100, 200, 3), 255, np.uint8))
    locations = torch.tensor([[[[0.25, 0.5], [0.75, 0.5]]]])  # [M, L, P, 2]
    weights = torch.tensor([[[0.9, 0.1]]])
    drawn = np.asarray(draw_sampling_points(picture, locations, weights, [10.0, 70.0, 60.0, 90.0], 0, "x", 0.5))
    assert drawn[50, 50].tolist() == [255, 0, 0]
    assert drawn[50, 150, 2] > 200 and drawn[50, 150, 0] < 60
    assert drawn[20, 100].tolist() == [255, 255, 255]
