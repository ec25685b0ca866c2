"""The backbones: torchvision's features, and the norms of the small one."""

import math

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from detr.backbone import BatchNorm
from detr.learner import Learner
from detr.model import build_model
from detr.presets import preset


@pytest.mark.parametrize(
    ("dilation", "n_levels", "strides"), [(False, 4, (8, 16, 32)), (True, 1, (16,)), (False, 2, (16, 32))]
)
def test_resnet_features_are_torchvisions(dilation, n_levels, strides):
    config = preset("deformable_detr_r50", dilation=dilation, n_levels=n_levels, pretrained_backbone=False)
    torch.manual_seed(0)
    backbone = build_model(config, 2).backbone.eval().double()
    with torch.no_grad():
        for buffer in backbone.buffers():
            buffer += 0.1 * torch.rand_like(buffer)
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, dilation]).eval().double()
    missing, unexpected = reference.load_state_dict(backbone.body.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("fc.") or "num_batches_tracked" in key for key in missing)
    names = ["layer2", "layer3", "layer4"][-len(strides) :]
    body = create_feature_extractor(reference, names)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features, expected = backbone(images), list(body(images).values())
    assert backbone.channels == [512, 1024, 2048][-len(strides) :]
    for feature, wanted, stride in zip(features, expected, strides, strict=True):
        assert feature.shape[-2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(feature, wanted, rtol=1e-9, atol=1e-9)


def test_weights_of_a_norm_as_a_plain_dict():
    source, target = (build_model(preset("tiny"), 3) for _ in range(2))
    weights = dict(source.state_dict())
    assert not any("num_batches_tracked" in name for name in weights)
    target.load_state_dict(weights)
    assert torch.equal(target.backbone.stem[1].running_var, source.backbone.stem[1].running_var)


def test_a_norm_of_a_single_value():
    norm = BatchNorm(4).train()
    norm.running_mean += 1
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), (x - 1) / math.sqrt(1 + norm.eps))
    assert (norm.running_mean == 1).all()
    many = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(norm(many), torch.nn.BatchNorm2d(4)(many))
    torch.testing.assert_close(norm.running_mean, 0.97 + 0.03 * many.mean((0, 2, 3)))


def test_statistics_of_a_frozen_backbone_stay():
    for rate, moves in ((0.0, False), (1e-3, True)):
        model = build_model(preset("tiny", backbone="small"), 3)
        Learner(model, preset("tiny", backbone="small", lr_backbone=rate))
        norm = model.backbone.stem[1]
        before = norm.running_mean.clone()
        model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
        assert torch.equal(norm.running_mean, before) is not moves
        assert model.training and norm.training is moves
