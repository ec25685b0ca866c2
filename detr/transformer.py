"""Encoder and decoder of Deformable DETR (arXiv 2010.04159, section 4), and of plain DETR (arXiv 2005.12872).

Shapes: B batch, S tokens of all levels, Q queries, C channels, L levels. Modules are named as in the original.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detr.boxes import cxcywh_to_xyxy, inverse_sigmoid, suppressed
from detr.config import ModelConfig
from detr.position import sine_embedding, sine_position
from msda_triton import MSDeformAttn

_CANDIDATES = 4  # proposals that are thinned, for each query


class Memory(NamedTuple):
    """What queries attend to: the image as tokens, level after level, and where each token lies."""

    tokens: Tensor  # [B, S, C]
    position: Tensor  # [B, S, C], position and level encoding
    mask: Tensor  # [B, S] bool, True on padding
    shapes: list[tuple[int, int]]  # (H, W) of each level
    centres: Tensor  # [B, S, 2] pixel centres (x, y); 1 is the edge of the unpadded image
    valid_ratios: Tensor  # [B, L, 2] (x, y): the part of each level that is not padding

    def on_levels(self, reference: Tensor) -> Tensor:
        """Points or boxes [B, Q, 2 or 4] of the unpadded image as [B, Q, L, 2 or 4] of the padded levels."""
        return reference[:, :, None] * self.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]


def _attention(config: ModelConfig, n_levels: int, n_points: int) -> nn.Module:
    if config.attention == "global":
        return nn.MultiheadAttention(config.d_model, config.n_heads, config.dropout, batch_first=True)
    return MSDeformAttn(config.d_model, n_levels, config.n_heads, n_points, backend=config.backend)


def _attend(attention: nn.Module, query: Tensor, reference: Tensor | None, memory: Memory) -> Tensor:
    """What `query` [B, Q, C] gathers around `reference` [B, Q, 2 or 4], or from everywhere if there is none."""
    if reference is None:
        key = memory.tokens + memory.position
        return attention(query, key, memory.tokens, key_padding_mask=memory.mask, need_weights=False)[0]
    reference = memory.on_levels(reference)
    return attention(query, reference, memory.tokens, memory.shapes, input_padding_mask=memory.mask)


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` in float32 under autocast too: rounding a box to bfloat16 would move it by pixels."""
    if not torch.is_autocast_enabled(x.device.type):
        return module(x)
    with torch.autocast(x.device.type, enabled=False):
        return module(x.float())


def _run(layer: nn.Module, recompute: bool, *args) -> Tensor:
    """`layer(*args)`; its activations are recomputed in the backward instead of kept, if so wanted while training."""
    if recompute and layer.training:
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class EncoderLayer(nn.Module):
    """Every token attends to the tokens of all levels, or of its own; then the feed-forward block. Post-norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.own_level_only = config.own_level_only
        self.self_attn = _attention(config, 1 if config.own_level_only else config.n_levels, config.enc_points)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, memory: Memory) -> Tensor:
        """The new tokens [B, S, C]."""
        query = memory.tokens + memory.position
        if self.own_level_only:
            update = self._attend_own_level(query, memory)
        elif isinstance(self.self_attn, MSDeformAttn):
            update = _attend(self.self_attn, query, memory.centres, memory)
        else:
            update = _attend(self.self_attn, query, None, memory)
        x = self.norm1(memory.tokens + self.dropout(update))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))

    def _attend_own_level(self, query: Tensor, memory: Memory) -> Tensor:
        sizes = [H * W for H, W in memory.shapes]
        per_level = (x.split(sizes, 1) for x in (query, memory.centres, memory.tokens, memory.mask))
        updates = []
        for l, (query_l, centres_l, tokens_l, mask_l) in enumerate(zip(*per_level, strict=True)):
            reference = (centres_l * memory.valid_ratios[:, l : l + 1])[:, :, None]
            shape = memory.shapes[l : l + 1]
            updates.append(self.self_attn(query_l, reference, tokens_l, shape, input_padding_mask=mask_l))
        return torch.cat(updates, 1)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.recompute = config.grad_checkpointing
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.enc_layers))

    def forward(self, memory: Memory) -> Memory:
        for layer in self.layers:
            memory = memory._replace(tokens=_run(layer, self.recompute, memory))
        return memory


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the image, then pass the feed-forward block. Post-norm.

    As in the original's checkpoints `norm1` belongs to the attention to the image and `norm2` to that among queries.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(config.d_model, config.n_heads, config.dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.cross_attn = _attention(config, config.n_levels, config.dec_points)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        reference: Tensor | None,
        memory: Memory,
        unseen: Tensor | None = None,
    ) -> Tensor:
        """The new queries [B, Q, C], from the old ones, their position encoding [B, Q, C] and their reference.

        Args:
            unseen: [Q, Q] bool, True where a query does not attend to another.
        """
        query = target + query_pos
        update = self.self_attn(query, query, target, attn_mask=unseen, need_weights=False)[0]
        target = self.norm2(target + self.dropout(update))
        update = _attend(self.cross_attn, target + query_pos, reference, memory)
        x = self.norm1(target + self.dropout(update))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.refine, self.recompute = config.refine, config.grad_checkpointing
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.dec_layers))
        self.norm = nn.LayerNorm(config.d_model) if config.attention == "global" else nn.Identity()

    def forward(
        self,
        target: Tensor,
        query_pos: Tensor,
        reference: Tensor | None,
        memory: Memory,
        bbox_heads: nn.ModuleList,
        unseen: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Queries [B, Q, C] and boxes [B, Q, 4] (cx, cy, w, h) after each layer; `unseen` as in `DecoderLayer`.

        A layer's box is what its head adds to the reference, before the sigmoid. With refinement it becomes the next
        layer's reference, without a gradient (section 4.2, "iterative bounding box refinement").
        """
        hidden, boxes = [], []
        for layer, bbox_head in zip(self.layers, bbox_heads, strict=False):  # the first stage's head is one more
            target = _run(layer, self.recompute, target, query_pos, reference, memory, unseen)
            hidden.append(self.norm(target))
            logit = in_float32(bbox_head, hidden[-1])
            if reference is not None:
                logit = logit + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
            boxes.append(logit.sigmoid())
            if self.refine:
                reference = boxes[-1].detach()
        return hidden, boxes


class Transformer(nn.Module):
    """Encoder, decoder, and the queries that the decoder starts from, in their three kinds.

    Plain DETR has learned position encodings, Deformable DETR learned queries that each point at a place of the image,
    and its two-stage variant the encoder's own best proposals.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.d_model
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.attention == "deformable":
            self.level_embed = nn.Parameter(torch.empty(config.n_levels, C))
        if config.two_stage:
            self.enc_output = nn.Linear(C, C)
            self.enc_output_norm = nn.LayerNorm(C)
            self.pos_trans = nn.Linear(2 * C, 2 * C)
            self.pos_trans_norm = nn.LayerNorm(2 * C)
        elif config.attention == "deformable":
            self.reference_points = nn.Linear(C, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()
        if hasattr(self, "level_embed"):
            nn.init.normal_(self.level_embed)
        if hasattr(self, "reference_points"):
            nn.init.zeros_(self.reference_points.bias)

    def encode(self, features: list[Tensor], mask: Tensor) -> Memory:
        """The encoder's result for feature maps [B, C, H, W] of an image with padding mask [B, H, W]."""
        tokens, positions, masks, centres, valid_ratios = [], [], [], [], []
        for l, feature in enumerate(features):
            mask_l = F.interpolate(mask[:, None].float(), feature.shape[-2:])[:, 0].bool()
            position = sine_position(mask_l, self.config.d_model, centred=self.config.attention == "deformable")
            if self.config.attention == "deformable":
                position = position + self.level_embed[l]
            tokens.append(feature.flatten(2).transpose(1, 2))
            positions.append(position.flatten(1, 2))
            masks.append(mask_l.flatten(1))
            valid = torch.stack([(~mask_l[:, 0]).sum(1), (~mask_l[:, :, 0]).sum(1)], -1)  # [B, 2] pixels (x, y)
            valid_ratios.append(valid / valid.new_tensor([feature.shape[-1], feature.shape[-2]]))
            centres.append(_pixel_centres(*feature.shape[-2:], valid))
        memory = Memory(
            tokens=torch.cat(tokens, 1),
            position=torch.cat(positions, 1),
            mask=torch.cat(masks, 1),
            shapes=[tuple(feature.shape[-2:]) for feature in features],
            centres=torch.cat(centres, 1),
            valid_ratios=torch.stack(valid_ratios, 1),
        )
        return self.encoder(memory)

    def learned_queries(self, query_embed: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Target, position encoding and reference points of queries [Q, 2 C], or [Q, C] for plain DETR."""
        query_embed = query_embed.expand(B, -1, -1)
        if self.config.attention == "global":
            return torch.zeros_like(query_embed), query_embed, None
        query_pos, target = query_embed.chunk(2, -1)
        return target, query_pos, in_float32(self.reference_points, query_pos).sigmoid()

    def propose(self, memory: Memory, class_head: nn.Module, bbox_head: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        """First stage (appendix A.4): one box for each token, and the boxes [B, Q, 4] of the best without gradient.

        There are as many as the config says, or as many as there are tokens if that is less.
        """
        size = [memory.centres.new_full((H * W,), 0.05 * 2**l) for l, (H, W) in enumerate(memory.shapes)]
        size = torch.cat(size)[None, :, None].expand_as(memory.centres)
        anchors = torch.cat([memory.centres, size], -1)
        unusable = memory.mask | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1)
        anchor_logits = (anchors / (1 - anchors)).log().masked_fill(unusable[..., None], torch.inf)
        x = memory.tokens.masked_fill(unusable[..., None], 0)
        x = self.enc_output_norm(self.enc_output(x))
        logits = in_float32(class_head, x)
        boxes = (in_float32(bbox_head, x) + anchor_logits).sigmoid()
        # column 0 says "object" for this head; padding never comes before a real token, or the batch would matter
        score = logits[..., 0].detach().masked_fill(unusable, -torch.inf)
        return {"logits": logits, "boxes": boxes}, self._best(boxes.detach(), score)

    def _best(self, boxes: Tensor, score: Tensor) -> Tensor:
        """The boxes [B, Q, 4] that queries start from, of all [B, S, 4] and their scores [B, S], best first.

        With `config.proposal_nms` the best of what overlaps comes before the rest of it: a large object has hundreds of
        tokens, which all propose it. Padding, whose score is -inf, comes after that rest.
        """
        count = min(self.config.n_queries, score.shape[1])
        thinned = self.config.proposal_nms < 1
        best = score.topk(min(_CANDIDATES * count, score.shape[1]) if thinned else count, dim=1).indices
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        if not thinned:
            return boxes
        last = suppressed(cxcywh_to_xyxy(boxes), self.config.proposal_nms) | (score.gather(1, best) == -torch.inf)
        order = torch.arange(best.shape[1], device=best.device) + best.shape[1] * last
        order = order.topk(count, dim=1, largest=False).indices
        return boxes.gather(1, order[..., None].expand(-1, -1, 4))

    def proposed_queries(self, boxes: Tensor, content: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Target, position encoding and reference boxes of queries that start from `boxes` [B, Q, 4].

        Args:
            content: the targets if they are learned, [Q or more, C], or [1, C] for all alike; None makes them from the
                boxes too.
        """
        embedding = sine_embedding(boxes, self.config.d_model // 2).flatten(2)
        query_pos, target = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, -1)
        if content is not None:
            target = content[: boxes.shape[1]].expand_as(target)
        return target, query_pos, boxes


def unseen_by_each_other(queries: int, alone: int, device: torch.device) -> Tensor:
    """For `DecoderLayer`: the first `queries` see each other, each of the `alone` after them itself only."""
    index = torch.arange(queries + alone, device=device)
    late = index >= queries
    return (late[:, None] | late) & (index[:, None] != index)


def _pixel_centres(H: int, W: int, valid: Tensor) -> Tensor:
    """Centres [B, H * W, 2] (x, y) of a level's pixels, in units of its `valid` [B, 2] (x, y) first pixels."""
    y, x = (torch.arange(n, dtype=torch.float32, device=valid.device) + 0.5 for n in (H, W))
    x, y = x / valid[:, :1], y / valid[:, 1:]  # [B, W], [B, H]
    return torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], -1).flatten(1, 2)
