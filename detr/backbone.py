"""Convolutional backbones: torchvision's ResNets with frozen batch norms, and two small ones to train from scratch."""

from typing import Any
from urllib.error import URLError

import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detr.config import SMALL_BACKBONES, ModelConfig
from detr.errors import DownloadError


class ResNetBackbone(nn.Module):
    """torchvision ResNet with random weights; stem and layer1 are frozen, as in DETR.

    Its parameters are named as in torchvision, below `body`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        body = torchvision.models.get_model(
            config.backbone,
            weights=None,
            replace_stride_with_dilation=[False, False, config.dilation],
            norm_layer=FrozenBatchNorm2d,
        )
        stages = (body.layer2, body.layer3, body.layer4)[-config.n_levels :]
        self.channels = [stage[-1].conv2.out_channels * stage[-1].expansion for stage in stages]
        del body.avgpool, body.fc
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
        self.body = body

    def freeze(self) -> None:
        """Train nothing of it."""
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of the last one to three stages of [B, 3, H, W]: strides 8, 16, 32, or with dilation 8, 16, 16."""
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        features = []
        for stage in (body.layer2, body.layer3, body.layer4):
            x = stage(x)
            features.append(x)
        return features[-len(self.channels) :]


class BatchNorm(nn.BatchNorm2d):
    """Takes a single value a channel too, which PyTorch's own refuses in training: by the running statistics."""

    def __init__(self, channels: int):
        # a batch of eight says little: each step moves the running statistics by 3 %
        super().__init__(channels, momentum=0.03)
        self.num_batches_tracked = None  # which only another rule for the momentum needs

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        # weights that come as a plain dict have no version, and the oldest one would be given that counter
        super()._load_from_state_dict(state_dict, prefix, local_metadata | {"version": 2}, *rest)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class SmallBackbone(nn.Module):
    """Eight 3x3 convolutions, "small" with BatchNorm and SiLU, "tiny" with GroupNorm and ReLU.

    What GroupNorm computes does not depend on the other images of a batch; with BatchNorm a model learns more from few
    photographs in a short time, see docs/learning.md. Its statistics in training are those of the images that a process
    computes at a time: of a micro-batch, if batches are accumulated. The running ones are means over all processes.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.frozen = False
        widths = (64, 96, 128)
        block = _small if config.backbone == "small" else _tiny
        self.stem = nn.Sequential(*block(3, 16, stride=2), *block(16, 32, stride=2))
        self.stages = nn.ModuleList(
            nn.Sequential(*block(before, width, stride=2), *block(width, width))
            for before, width in zip((32, *widths), widths, strict=False)
        )
        self.channels = list(widths[-config.n_levels :])

    def freeze(self) -> None:
        """Train nothing of it; its statistics stay as they are."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "SmallBackbone":
        """As of every module; a frozen one stays as it evaluates."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of strides 8, 16 and 32, or of the last of them, of images [B, 3, H, W]."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[-len(self.channels) :]


def _tiny(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(before, after, stride), nn.GroupNorm(8, after), nn.ReLU(inplace=True)]


def _small(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(before, after, stride), BatchNorm(after), nn.SiLU(inplace=True)]


def _conv(before: int, after: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def build_backbone(config: ModelConfig) -> nn.Module:
    """The backbone of `config.backbone`; its `channels` has one entry for each feature map it returns."""
    return (SmallBackbone if config.backbone in SMALL_BACKBONES else ResNetBackbone)(config)


def load_imagenet(backbone: nn.Module, name: str) -> None:
    """Give a ResNet the ImageNet weights that DETR started from, downloaded by torchvision; small ones stay random.

    Args:
        name: `ModelConfig.backbone`.

    Raises:
        DownloadError: there is no way to the weights.
    """
    if name in SMALL_BACKBONES:
        return
    try:
        # torchvision's newer weights were trained differently
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(check_hash=True)
    except URLError as error:
        raise DownloadError(
            f"pretrained_backbone: the ImageNet weights of {name} could not be downloaded ({error.reason}); "
            "--no-pretrained starts without them, --weights from a file"
        ) from error
    backbone.body.load_state_dict({key: tensor for key, tensor in weights.items() if not key.startswith("fc.")})
