"""Deformable DETR's `models.ops`, of which Mask2Former, OneFormer, DINO, LW-DETR, dinov3 and rf-detr have copies."""

from collections.abc import Sequence

from torch import Tensor

from msda_triton.functional import MSDeformAttnFunction, ms_deform_attn
from msda_triton.module import MSDeformAttn as _MSDeformAttn

__all__ = ["MSDeformAttn", "MSDeformAttnFunction", "ms_deform_attn_core_pytorch"]

Shapes = Tensor | Sequence[tuple[int, int]]


def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The function of this name, of which there are two layouts: that of value says which one is meant.

    Args:
        value: [B, S, M, D] (Deformable DETR), or [B, M, D, S] (LW-DETR, rf-detr).
        value_spatial_shapes: [L, 2] (H, W).
        sampling_locations: [B, Q, M, L, P, 2] (x, y), or [B, Q, M, L * P, 2].
        attention_weights: [B, Q, M, L, P] or [B, Q, M, L * P].
        value_spatial_shapes_hw: the same as value_spatial_shapes in Python integers (rfdetr 1.11); None if not given.
    Returns:
        [B, Q, M * D].
    Raises:
        ValueError: value fits neither layout, or both; or another shape does not fit.
    """
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    if sampling_locations.dim() == 6:
        sampling_locations = sampling_locations.flatten(3, 4)
    if attention_weights.dim() == 5:
        attention_weights = attention_weights.flatten(3, 4)
    layout = sampling_locations.shape  # [B, Q, M, K, 2]
    L = len(shapes)
    if len(layout) != 5 or layout[3] % L:
        raise ValueError(
            f"sampling_locations: expected [B, Q, M, L, P, 2] or [B, Q, M, L * P, 2] with L = {L}, "
            f"got shape {tuple(layout)} with its levels and points joined"
        )
    if _tokens_last(value, shapes, layout[2]):
        value = value.permute(0, 3, 1, 2)
    return ms_deform_attn(value, shapes, sampling_locations, attention_weights, num_points=[layout[3] // L] * L)


def _tokens_last(value: Tensor, shapes: Shapes, M: int) -> bool:
    """Whether value is [B, M, D, S] and not [B, S, M, D]."""
    layout = value.shape
    if len(layout) != 4:
        raise ValueError(f"value: expected [B, S, M, D] or [B, M, D, S], got shape {tuple(layout)}")
    first, last = layout[2] == M, layout[1] == M
    if first and last:  # the heads do not tell; as in the original the sizes are read from the device if they are there
        sizes = shapes.tolist() if isinstance(shapes, Tensor) else shapes
        S = sum(H * W for H, W in sizes)
        first, last = layout[1] == S, layout[3] == S
    if first == last:
        raise ValueError(
            f"value: expected one of [B, S, M, D] and [B, M, D, S] for M = {M} heads, got shape {tuple(layout)}, "
            f"which is {'both' if first else 'neither'}"
        )
    return last


class MSDeformAttn(_MSDeformAttn):
    """`msda_triton.MSDeformAttn` with what rf-detr and LW-DETR add: `export()` and a seventh argument."""

    def export(self) -> None:
        """Nothing: the module exports as it is."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
        input_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """As `msda_triton.MSDeformAttn`; `input_spatial_shapes_hw` are the sizes in Python integers, if given.

        `input_padding_mask` [B, S] is True on padding; the level dimension of `reference_points` may be 1.
        """
        shapes = input_spatial_shapes if input_spatial_shapes_hw is None else input_spatial_shapes_hw
        return super().forward(
            query, reference_points, input_flatten, shapes, input_level_start_index, input_padding_mask
        )
