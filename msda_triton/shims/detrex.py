"""detrex's `detrex.layers.multi_scale_deform_attn`, and the variant of it in groundingdino."""

from torch import Tensor, nn

from msda_triton.module import MSDeformAttn
from msda_triton.shims.mmcv import MultiScaleDeformableAttnFunction, attend, multi_scale_deformable_attn_pytorch

__all__ = [
    "GroundingDINOAttention",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "multi_scale_deformable_attn_pytorch",
]


class GroundingDINOAttention(MSDeformAttn):
    """`groundingdino.models.GroundingDINO.ms_deform_attn.MultiScaleDeformableAttention`: no dropout, no residual.

    Args:
        embed_dim: C. num_heads: M. num_levels: L. num_points: P. img2col_step: kept, not used.
        batch_first: queries and values are [B, Q, C] instead of [Q, B, C].
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        batch_first: bool = False,
    ):
        super().__init__(embed_dim, num_levels, num_heads, num_points)
        self.embed_dim, self.num_heads, self.num_levels, self.num_points = embed_dim, num_heads, num_levels, num_points
        self.im2col_step, self.batch_first = img2col_step, batch_first

    def init_weights(self) -> None:
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """The attention in query's layout; arguments as in `shims.mmcv`. `key_padding_mask` is True on padding."""
        return attend(
            self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )


class MultiScaleDeformableAttention(GroundingDINOAttention):
    """`detrex.layers.MultiScaleDeformableAttention`: as above, with dropout and a residual.

    Args:
        dropout: of the result, before the residual. The others: as above.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        img2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
    ):
        super().__init__(embed_dim, num_heads, num_levels, num_points, img2col_step, batch_first)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """dropout(attention) + identity (query if not given), in query's layout; arguments as in `shims.mmcv`."""
        out = super().forward(
            query, key, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )
        return self.dropout(out) + (query if identity is None else identity)
