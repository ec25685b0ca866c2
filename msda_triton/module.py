"""`MSDeformAttn`: the attention module of Deformable DETR, with the original's parameters and initialisation."""

import math

import torch
from torch import Tensor, nn

from msda_triton import checks
from msda_triton.functional import check_backend, ms_deform_attn_fused
from msda_triton.reference import sampling_locations


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention module (Deformable DETR, arXiv 2010.04159, section 4.1 and appendix A.2).

    State-dict keys are those of the original: `sampling_offsets`, `attention_weights`, `value_proj`, `output_proj`.

    Args:
        d_model: channels of queries and value tokens, divisible by `n_heads`.
        n_levels: L, number of feature levels. n_heads: M. n_points: P, samples per head and level.
        backend: as in `ms_deform_attn`; the attribute of this name can be changed later.
    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, *, backend: str = "auto"
    ):
        super().__init__()
        check_backend(backend)
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        d_model, n_levels, n_heads, n_points = (checks.count(name, n) for name, n in sizes.items())
        if d_model % n_heads:
            raise ValueError(f"d_model: expected a multiple of n_heads = {n_heads}, got {d_model}")
        self.im2col_step = 64  # read by callers of the original; nothing here depends on it
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.backend = backend
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Offsets start as a ring: head m looks in direction 2 pi m / M, point p lies p + 1 steps away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        bias = self.sampling_offsets.bias
        angle = torch.arange(self.n_heads, dtype=torch.float32, device=bias.device) * (2.0 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the unit square
        ring = direction.view(self.n_heads, 1, 1, 2).repeat(1, self.n_levels, self.n_points, 1)
        ring = ring * torch.arange(1, self.n_points + 1, dtype=torch.float32, device=bias.device).view(1, 1, -1, 1)
        with torch.no_grad():
            bias.copy_(ring.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | list[tuple[int, int]],
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query to the sampled points.

        Args:
            query: [B, Q, C].
            reference_points: [B, Q, L or 1, 2] points (x, y), or [B, Q, L or 1, 4] boxes (cx, cy, w, h); in [0, 1] of
                the padded image.
            input_flatten: [B, S, C], the levels' tokens one after the other.
            input_spatial_shapes: [L, 2] (H, W). input_level_start_index: [L], or None for levels in order.
            input_padding_mask: [B, S] bool, True on padding.
        Returns:
            [B, Q, C].
        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        B, _ = _check_tokens("query", query, ("B", "Q", self.d_model), self.sampling_offsets)
        _, S = _check_tokens("input_flatten", input_flatten, (B, "S", self.d_model), self.value_proj)
        if input_padding_mask is not None:
            checks.check_mask("input_padding_mask", input_padding_mask, (B, S), input_flatten.device)
        out = ms_deform_attn_fused(
            self.value_proj(input_flatten).view(B, S, self.n_heads, self.d_model // self.n_heads),
            input_spatial_shapes,
            reference_points,
            *self._offsets_and_logits(query),
            level_start_index=input_level_start_index,
            value_mask=input_padding_mask,
            backend=self.backend,
        )
        return self.output_proj(out)

    def locations_and_weights(
        self, query: Tensor, reference_points: Tensor, input_spatial_shapes: Tensor | list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where the queries sample, and how much each sample counts: what `forward` computes inside the kernel.

        For pictures, and for engines whose own operator takes locations and weights: they go into `ms_deform_attn` as
        they are. Unlike in `forward`, a box or an offset that is not finite can make the parameters' gradients NaN.

        Args:
            query, reference_points, input_spatial_shapes: as in `forward`.
        Returns:
            locations [B, Q, M, L, P, 2] (x, y), 0 to 1 across the padded level; samples may lie outside.
            weights [B, Q, M, L, P], which sum to 1 for each query and head. Both in float32 at least.
        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        _check_tokens("query", query, ("B", "Q", self.d_model), self.sampling_offsets)
        offsets, logits = self._offsets_and_logits(query)
        shapes = checks.level_shapes(input_spatial_shapes, self.n_levels, query)
        checks.check_reference_points(reference_points, offsets.flatten(3, 4), self.n_levels)
        num_points = [self.n_points] * self.n_levels
        locations = sampling_locations(reference_points, offsets.flatten(3, 4), shapes, num_points)
        weights = logits.flatten(3).to(locations.dtype).softmax(-1)
        return locations.view(offsets.shape), weights.view(logits.shape)

    def _offsets_and_logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Q, M, L, P, 2] and [B, Q, M, L, P]."""
        shape = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        return self.sampling_offsets(query).view(*shape, 2), self.attention_weights(query).view(shape)


def _check_tokens(name: str, x: Tensor, expected: tuple, layer: nn.Module) -> tuple[int, int]:
    """(B, N) of tokens x [B, N, C] that a layer is given.

    Args:
        expected: shape, with names for sizes that may be any.
    """
    shape, dtype, device = checks.facts(name, x)
    checks.check_float(name, dtype)
    if len(shape) != 3 or any(isinstance(n, int) and n != got for n, got in zip(expected, shape, strict=True)):
        checks.raise_shape(name, f"({', '.join(map(str, expected))})", shape)
    # another layer, or one that hooks prepare, may take another dtype, and has its parameters where it likes
    if type(layer) is nn.Linear and not layer._forward_pre_hooks and "forward" not in layer.__dict__:
        weight = layer.weight
        if device != weight.device:
            raise ValueError(f"{name}: expected on the module's device {weight.device}, got {device}")
        if dtype != weight.dtype and device.type != "meta" and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"{name}: expected {weight.dtype} like the module's parameters, got {dtype}")
    return shape[0], shape[1]
