"""`ms_deform_attn`: what users call. (First version: the formula only.)"""

import torch
from torch import Tensor

from msda_triton.reference import ms_deform_attn_reference


def ms_deform_attn(
    value, spatial_shapes, sampling_locations, attention_weights, *, level_start_index=None, backend="auto"
) -> Tensor:
    shapes = torch.as_tensor(spatial_shapes, device=value.device)
    starts = None if level_start_index is None else torch.as_tensor(level_start_index, device=value.device)
    P = sampling_locations.shape[4]
    return ms_deform_attn_reference(
        value, shapes, starts, sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4), [P] * shapes.shape[0]
    )
