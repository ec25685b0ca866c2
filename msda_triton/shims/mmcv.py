"""mmcv's `mmcv.ops.multi_scale_deform_attn` and its compiled `mmcv._ext`, and BEVFormer's functions on top of them."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msda_triton.functional import MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_fused
from msda_triton.module import MSDeformAttn
from msda_triton.shims import c_extension

MultiScaleDeformableAttnFunction = MSDeformAttnFunction


class MultiScaleDeformableAttnFunction_fp16:
    """BEVFormer's: under autocast value is cast to float16, and so is the result; locations keep their precision."""

    @staticmethod
    def apply(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step=64
    ) -> Tensor:
        """[B, S, M, D] -> [B, Q, M * D]; the arguments of `MSDeformAttnFunction.apply`."""
        return _autocast_to(
            torch.float16, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttnFunction_fp32:
    """BEVFormer's: under autocast value is cast to float32, and so is the result."""

    @staticmethod
    def apply(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step=64
    ) -> Tensor:
        """[B, S, M, D] -> [B, Q, M * D]; the arguments of `MSDeformAttnFunction.apply`."""
        return _autocast_to(
            torch.float32, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        )


def _autocast_to(dtype: torch.dtype, value: Tensor, shapes, starts, locations, weights) -> Tensor:
    if torch.is_autocast_enabled(value.device.type):
        value = value.to(dtype)
    return ms_deform_attn(value, shapes, locations, weights, level_start_index=starts)


def multi_scale_deformable_attn_pytorch(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """[B, S, M, D] -> [B, Q, M * D], for levels that are stored one after the other."""
    return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """`mmcv._ext.ms_deform_attn_forward`: as that of `c_extension`."""
    return c_extension.ms_deform_attn_forward(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
    )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int = 64,
) -> None:
    """`mmcv._ext.ms_deform_attn_backward`: adds to `grad_value`, writes `grad_sampling_loc` and `grad_attn_weight`."""
    grads = c_extension.ms_deform_attn_backward(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, grad_output
    )
    grad_value.add_(grads[0])
    grad_sampling_loc.copy_(grads[1])
    grad_attn_weight.copy_(grads[2])


class MultiScaleDeformableAttention(MSDeformAttn):
    """mmcv's module: its arguments, parameters, sequence-first default and residual; softmax and mask in the kernel.

    Args:
        embed_dims: C. num_heads: M. num_levels: L. num_points: P. dropout: of the result, before the residual.
        batch_first: queries and values are [B, Q, C] instead of [Q, B, C].
        im2col_step, norm_cfg, init_cfg: kept, not used. value_proj_ratio: channels of the values over embed_dims.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        value_proj_ratio: float = 1.0,
    ):
        super().__init__(embed_dims, num_levels, num_heads, num_points)
        self.embed_dims, self.num_heads, self.num_levels, self.num_points = (
            embed_dims,
            num_heads,
            num_levels,
            num_points,
        )
        self.im2col_step, self.batch_first, self.norm_cfg, self.init_cfg = im2col_step, batch_first, norm_cfg, init_cfg
        self.dropout = nn.Dropout(dropout)
        if value_proj_ratio != 1.0:
            channels = int(embed_dims * value_proj_ratio)
            self.value_proj, self.output_proj = nn.Linear(embed_dims, channels), nn.Linear(channels, embed_dims)
            self._reset_parameters()

    def init_weights(self) -> None:
        self._reset_parameters()

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
        """dropout(attention) + identity, in query's layout.

        Args:
            query, identity, query_pos: [Q, B, C], or [B, Q, C] if `batch_first`; identity is query if not given.
            key: not used. value: [S, B, C] or [B, S, C]; query if not given.
            key_padding_mask: [B, S] bool, True on padding.
            reference_points: [B, Q, L, 2 or 4]. spatial_shapes: [L, 2] (H, W). level_start_index: [L].
        """
        if "residual" in kwargs:
            warnings.warn("residual: is called identity now", DeprecationWarning, stacklevel=2)
            identity = kwargs["residual"]
        identity = query if identity is None else identity
        out = attend(
            self, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )
        return self.dropout(out) + identity


def attend(
    module: nn.Module, query, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
) -> Tensor:
    """The attention of mmcv's, detrex's and groundingdino's modules, in query's layout, before dropout and residual."""
    value = query if value is None else value
    query = query if query_pos is None else query + query_pos
    C = module.d_model
    layout = "[B, N, C]" if module.batch_first else "[N, B, C]"
    for name, x in (("query", query), ("value", value)):
        if x.dim() != 3 or x.shape[2] != C:
            raise ValueError(f"{name}: expected {layout} with C = {C}, got shape {tuple(x.shape)}")
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    B, Q, _ = query.shape
    if value.shape[0] != B:
        raise ValueError(f"value: expected B = {B} as query, in {layout}, got {value.shape[0]}")
    M, L, P = module.num_heads, module.num_levels, module.num_points
    out = ms_deform_attn_fused(
        module.value_proj(value).view(B, value.shape[1], M, -1),
        spatial_shapes,
        reference_points,
        module.sampling_offsets(query).view(B, Q, M, L, P, 2),
        module.attention_weights(query).view(B, Q, M, L, P),
        level_start_index=level_start_index,
        value_mask=key_padding_mask,
    )
    out = module.output_proj(out)
    return out if module.batch_first else out.transpose(0, 1)
