"""DCNv4's `FlashDeformAttnFunction`: locations and attention logits packed into one tensor."""

import torch
from torch import Tensor

from msda_triton.functional import ms_deform_attn


class FlashDeformAttnFunction:
    """Any number of levels and points, float64 and bfloat16 too; each image reads its own value only."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_loc_attn: Tensor,
        im2col_step: int,
        K: int = 8,
    ) -> Tensor:
        """Attention with the softmax over all points.

        Args:
            value: [B, S, M, D]. value_spatial_shapes: [L, 2]. value_level_start_index: [L].
            sampling_loc_attn: [B, Q, M, L * K * 3]: the locations (x, y) of L * K points, then their logits.
            im2col_step: not needed. K: points per level.
        Returns:
            [B, Q, M * D].
        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        points = len(value_spatial_shapes) * K
        if sampling_loc_attn.dim() != 4 or sampling_loc_attn.shape[3] != 3 * points:
            raise ValueError(
                f"sampling_loc_attn: expected [B, Q, M, L * K * 3 = {3 * points}] for L = {len(value_spatial_shapes)} "
                f"and K = {K}, got shape {tuple(sampling_loc_attn.shape)}"
            )
        locations = sampling_loc_attn[..., : 2 * points].unflatten(-1, (points, 2))
        logits = sampling_loc_attn[..., 2 * points :]
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            locations,
            weights,
            level_start_index=value_level_start_index,
            num_points=[K] * len(value_spatial_shapes),
        )
