"""Hugging Face transformers: the layer of its ten decorated models, and the functions of the others."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from msda_triton.functional import MSDeformAttnFunction, ms_deform_attn

# for `kernels`: LocalLayerRepository(KERNEL_REPOSITORY, layer_name="MultiScaleDeformableAttention")
KERNEL_REPOSITORY = Path(__file__).with_name("kernel_repository")

# of transformers up to 4.4x, around the compiled extension
MultiScaleDeformableAttentionFunction = MSDeformAttnFunction


class MultiScaleDeformableAttention(nn.Module):
    """The layer that `kernels` may put in the place of the one of this name; stateless, as it asks."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """value [B, S, M, D], locations [B, Q, M, L, P, 2] (x, y) and weights [B, Q, M, L, P] -> [B, Q, M * D].

        The sizes come twice: [L, 2] (H, W) as a tensor, and as the same integers in a list.
        """
        shapes = (
            value_spatial_shapes_list  # needs no look at the device, and lets a program have a rectangle of queries
        )
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights, level_start_index=level_start_index)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[tuple],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """mask2former's and oneformer's: [B, S, M, D] -> [B, Q, M * D]."""
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[tuple],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """rt_detr_v2's, d_fine's and deimv2's: [B, S, M, D] -> [B, Q, M * D], with K = sum(num_points_list) points.

    Args:
        sampling_locations: [B, Q, M, K, 2]. attention_weights: [B, Q, M, K].
        method: "default" (bilinear) or "discrete" (the nearest pixel, clamped to the map), which leaves the locations
            without a gradient.
    """
    if method == "discrete":
        sampling_locations = sampling_locations.detach()  # None, not zeros: optimisers tell them apart
    return ms_deform_attn(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points=num_points_list, method=method
    )
