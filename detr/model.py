"""The model: backbone, projections, transformer and heads."""

import copy
import math

import torch
from torch import Tensor, nn

from detr.backbone import build_backbone
from detr.config import ModelConfig
from detr.errors import ArgumentError
from detr.transformer import Transformer, in_float32, unseen_by_each_other

PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)  # a class score starts at 0.01 (focal loss, arXiv 1708.02002, section 3.3)


class GroupNorm(nn.GroupNorm):
    """Takes a group of a single value too, which PyTorch's own refuses: a map of one pixel with 32 channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    """Three linear layers that end in a box's four numbers."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, after) for after in (channels, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class DeformableDETR(nn.Module):
    """Deformable DETR with its variants, or plain DETR, as the config says; built by `build_model`.

    Heads are lists with one entry for each decoder layer, and one more for the proposals of a two-stage model. Without
    box refinement all entries are one module, as in the original and its checkpoints.
    """

    def __init__(self, config: ModelConfig, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ArgumentError(f"num_classes: expected at least 1, got {num_classes}")
        self.config, self.num_classes = config, num_classes
        C = config.d_model
        self.backbone = build_backbone(config)
        self.input_proj = nn.ModuleList(_projections(self.backbone.channels, config))
        self.transformer = Transformer(config)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.n_queries, 2 * C if config.attention == "deformable" else C)
        elif config.query_selection == "mixed":
            self.query_embed = nn.Embedding(config.n_queries, C)

        class_head = nn.Linear(C, num_classes + (config.class_loss == "softmax"))
        bbox_head = MLP(C)
        if config.class_loss != "softmax":
            nn.init.constant_(class_head.bias, PRIOR_BIAS)
        if config.attention == "deformable":
            nn.init.zeros_(bbox_head.layers[-1].weight)
            nn.init.zeros_(bbox_head.layers[-1].bias)
        n_heads = config.dec_layers + config.two_stage
        if config.refine:
            self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(n_heads))
            self.bbox_embed = nn.ModuleList(copy.deepcopy(bbox_head) for _ in range(n_heads))
        else:
            self.class_embed = nn.ModuleList([class_head] * n_heads)
            self.bbox_embed = nn.ModuleList([bbox_head] * n_heads)
        if config.attention == "deformable" and not config.two_stage:
            # boxes start with sides of sigmoid(-2) = 0.12; proposals have sizes of their own
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def forward(self, images: Tensor, mask: Tensor, noised: Tensor | None = None) -> dict:
        """Detect objects.

        Args:
            images: [B, 3, H, W], normalised, padded with zeros at the bottom and the right.
            mask: [B, H, W] bool, True on padding.
            noised: [B, D, 4] (cx, cy, w, h), boxes that the decoder also corrects, each by itself; a model with one
                stage ignores them.
        Returns:
            logits [B, N, K] and boxes [B, N, 4] (cx, cy, w, h) in [0, 1] of the unpadded image, both float32; aux, a
            list of dicts with these two for all decoder layers but the last (empty without `config.aux_loss`);
            proposals, such a dict with one box for each token, if the model has two stages; denoised, if `noised`
            was given: what became of it in each of R decoder layers, [R, B, D, 4]; and softmax, True if logits have a
            column K for "no object". N is n_queries, or for two stages the number of tokens if that is less.
        """
        memory = self.transformer.encode(self._pyramid(images), mask)
        outputs, unseen = {"softmax": self.config.class_loss == "softmax"}, None
        if self.config.two_stage:
            outputs["proposals"], boxes = self.transformer.propose(memory, self.class_embed[-1], self.bbox_embed[-1])
            content = self.query_embed.weight if self.config.query_selection == "mixed" else None
            queries = self.transformer.proposed_queries(boxes, content)
            N = boxes.shape[1]
            if noised is not None:
                # their content is that of the best proposal
                more = self.transformer.proposed_queries(noised, None if content is None else content[:1])
                queries = [torch.cat(pair, 1) for pair in zip(queries, more, strict=True)]
                unseen = unseen_by_each_other(N, noised.shape[1], images.device)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight, images.shape[0])
        hidden, boxes = self.transformer.decoder(*queries, memory, self.bbox_embed, unseen)
        if unseen is not None:
            outputs["denoised"] = torch.stack([box[:, N:] for box in boxes])
            hidden, boxes = ([x[:, :N] for x in each] for each in (hidden, boxes))
        first = 0 if self.config.aux_loss else len(hidden) - 1
        predictions = [
            {"logits": in_float32(self.class_embed[l], hidden[l]), "boxes": boxes[l]} for l in range(first, len(hidden))
        ]
        return outputs | predictions[-1] | {"aux": predictions[:-1]}

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, H, W] of all levels."""
        features = self.backbone(images)
        levels = [project(feature) for project, feature in zip(self.input_proj, features, strict=False)]
        x = features[-1]  # the first level below the backbone's comes from its raw features
        for project in self.input_proj[len(features) :]:
            x = project(x)
            levels.append(x)
        return levels


def _projections(channels: list[int], config: ModelConfig) -> list[nn.Module]:
    C = config.d_model
    if config.attention == "global":
        return [nn.Sequential(nn.Conv2d(channels[-1], C, 1))]
    projections = [nn.Sequential(nn.Conv2d(before, C, 1), GroupNorm(32, C)) for before in channels]
    for l in range(len(channels), config.n_levels):
        before = channels[-1] if l == len(channels) else C
        projections.append(nn.Sequential(nn.Conv2d(before, C, 3, stride=2, padding=1), GroupNorm(32, C)))
    for conv, _ in projections:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
    return projections


def build_model(config: ModelConfig, num_classes: int) -> DeformableDETR:
    """The model of `config` with the original's initialisation, for classes 0 .. num_classes - 1.

    Of a `Config` it sees the fields of a `ModelConfig` only.
    """
    return DeformableDETR(config.model, num_classes)


def first_not_finite(weights: dict[str, Tensor]) -> str | None:
    """What is wrong with weights that are NaN or infinite: a sentence that names the first such tensor, or None."""
    name = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    return name and f"{name}: expected finite numbers, got NaN or infinity: the weights are of no use"
