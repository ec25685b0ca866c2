"""torch-ms-deform-attn's public functions (0.1.1)."""

from torch import Tensor

from msda_triton import functional
from msda_triton.functional import MSDeformAttnFunction
from msda_triton.shims.mmcv import multi_scale_deformable_attn_pytorch as ms_deform_attn_core_pytorch

__all__ = ["MSDeformAttnFunction", "ms_deform_attn", "ms_deform_attn_core_pytorch"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    check_cuda_metadata: bool = False,
) -> Tensor:
    """[B, S, M, D] -> [B, Q, M * D]. `im2col_step` is not needed.

    `check_cuda_metadata=True` waits for the device to compare the sizes with value; otherwise nothing ever waits.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if check_cuda_metadata:
        spatial_shapes, level_start_index = spatial_shapes.tolist(), level_start_index.tolist()
    return functional.ms_deform_attn(
        value, spatial_shapes, sampling_locations, attention_weights, level_start_index=level_start_index
    )
