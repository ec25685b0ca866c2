"""What `patch()` looks for: names, the arguments that must be there, and what takes the place.

Names and arguments are not enough for a function that people copy and change: it is replaced only if it gives the same
numbers as its stand-in on a small call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from msda_triton.shims import c_extension, dcnv4, deformable_detr, mmcv, rtdetr, torch_ms_deform_attn
from msda_triton.shims import transformers as hf

_CORE = "value value_spatial_shapes sampling_locations attention_weights"
_V2 = f"{_CORE} num_points_list method"
_SIX = "value value_spatial_shapes value_level_start_index sampling_locations attention_weights im2col_step"
_FLASH = "value value_spatial_shapes value_level_start_index sampling_loc_attn im2col_step K"
_LEVEL_START = "value spatial_shapes level_start_index sampling_locations attention_weights"
_LAYER = (
    "self value value_spatial_shapes value_spatial_shapes_list level_start_index sampling_locations "
    "attention_weights im2col_step"
)


class EntryPoint(NamedTuple):
    arguments: str  # their names, in order
    stand_ins: tuple[Any, ...]  # tried in turn
    layouts: str = ""  # of the small calls, see `small_call`; one at least must run


FUNCTIONS: dict[str, list[EntryPoint]] = {
    "multi_scale_deformable_attn_pytorch": [
        EntryPoint(_CORE, (mmcv.multi_scale_deformable_attn_pytorch,), "tokens_first")
    ],
    "ms_deform_attn_core_pytorch": [
        EntryPoint(_CORE, (deformable_detr.ms_deform_attn_core_pytorch,), "tokens_first tokens_last"),
        EntryPoint(
            f"{_CORE} value_spatial_shapes_hw",
            (deformable_detr.ms_deform_attn_core_pytorch,),
            "tokens_first tokens_last tokens_last_merged",
        ),
    ],
    "multi_scale_deformable_attention": [
        EntryPoint(_CORE, (hf.multi_scale_deformable_attention,), "tokens_first"),
    ],
    "multi_scale_deformable_attention_v2": [
        EntryPoint(_V2, (hf.multi_scale_deformable_attention_v2,), "listed discrete")
    ],
    "deformable_attention_core_func": [
        EntryPoint(_CORE, (rtdetr.deformable_attention_core_func,), "tokens_first"),
    ],
    "deformable_attention_core_func_v2": [
        EntryPoint(
            _V2,
            (rtdetr.deformable_attention_core_func_v2, hf.multi_scale_deformable_attention_v2),
            "listed discrete by_levels by_levels_discrete",
        ),
        EntryPoint(
            f"{_V2} value_shape",
            (rtdetr.deformable_attention_core_func_v2,),
            "by_levels by_levels_discrete reshape reshape_discrete",
        ),
    ],
    "ms_deform_attn": [
        EntryPoint(
            f"{_LEVEL_START} im2col_step check_cuda_metadata", (torch_ms_deform_attn.ms_deform_attn,), "level_start"
        )
    ],
}

# Autograd functions, by the arguments of their forward. They run on a GPU only, so there is no small call. No stand-in
# is an autograd function itself: torch.compile would trace its forward instead of calling its apply.
FUNCTION_CLASSES: dict[str, EntryPoint] = {
    "MSDeformAttnFunction": EntryPoint(_SIX, (deformable_detr.MSDeformAttnFunction,)),
    "MultiScaleDeformableAttnFunction": EntryPoint(_SIX, (mmcv.MultiScaleDeformableAttnFunction,)),
    "MultiScaleDeformableAttnFunction_fp16": EntryPoint(_SIX, (mmcv.MultiScaleDeformableAttnFunction_fp16,)),
    "MultiScaleDeformableAttnFunction_fp32": EntryPoint(_SIX, (mmcv.MultiScaleDeformableAttnFunction_fp32,)),
    "MultiScaleDeformableAttentionFunction": EntryPoint(_SIX, (hf.MultiScaleDeformableAttentionFunction,)),
    "FlashDeformAttnFunction": EntryPoint(_FLASH, (dcnv4.FlashDeformAttnFunction,)),
}

# layers of transformers whose forward is replaced in their class, so that models that were built before change too
LAYERS: dict[str, EntryPoint] = {
    "MultiScaleDeformableAttention": EntryPoint(_LAYER, (hf.MultiScaleDeformableAttention.forward,), "layer")
}

_PLAIN = {
    "ms_deform_attn_forward": c_extension.ms_deform_attn_forward,
    "ms_deform_attn_backward": c_extension.ms_deform_attn_backward,
}
# compiled modules by name; one that is not there is stood in for if its package is installed
EXTENSIONS: dict[str, dict[str, Callable]] = {
    "MultiScaleDeformableAttention": _PLAIN,
    "groundingdino._C": _PLAIN,
    "detrex._C": _PLAIN,
    "mmcv._ext": {
        "ms_deform_attn_forward": mmcv.ms_deform_attn_forward,
        "ms_deform_attn_backward": mmcv.ms_deform_attn_backward,
    },
}

_HF_MODELS = (
    "deformable_detr grounding_dino mm_grounding_dino lw_detr rf_detr rt_detr omdet_turbo pp_doclayout_v2 "
    "pp_doclayout_v3 pp_doclayout_v4 mask2former oneformer rt_detr_v2 d_fine deimv2 deta"
)
# the modules of an installed package that hold entry points; other packages must have been imported
PACKAGES: dict[str, list[str]] = {
    "transformers": [f"transformers.models.{name}.modeling_{name}" for name in _HF_MODELS.split()],
    "mmcv": ["mmcv.ops.multi_scale_deform_attn"],
    "detrex": ["detrex.layers.multi_scale_deform_attn"],
    "groundingdino": ["groundingdino.models.GroundingDINO.ms_deform_attn"],
    "rfdetr": ["rfdetr.models.ops.modules.ms_deform_attn", "rfdetr.models.ops.functions.ms_deform_attn_func"],
    "torch_ms_deform_attn": ["torch_ms_deform_attn"],
    "DCNv4": ["DCNv4.functions.flash_deform_attn_func"],
}


def small_call(layout: str, sizes_as_tensor: bool = False) -> tuple:
    """The arguments of a call in float64 on the CPU, with levels of 3 x 4 and 2 x 2 pixels and 3 queries."""
    B, Q, M, D, L, P = 2, 3, 2, 4, 2, 2
    shapes = [(3, 4), (2, 2)]
    sizes = torch.tensor(shapes, device="cpu")
    S = sum(H * W for H, W in shapes)
    value = _numbers(B, S, M, D)
    locations, weights = _numbers(B, Q, M, L, P, 2) * 0.6 + 0.5, _numbers(B, Q, M, L, P)
    starts = torch.tensor([0, 12], device="cpu")
    if sizes_as_tensor:
        shapes = sizes
    if layout == "tokens_first":
        return value, shapes, locations, weights
    if layout.startswith("tokens_last"):
        if layout == "tokens_last_merged":
            locations = locations.flatten(3, 4)
        return value.permute(0, 2, 3, 1).contiguous(), shapes, locations, weights.flatten(3)
    if layout == "level_start":
        return value, sizes, starts, locations, weights
    if layout == "layer":
        return None, value, sizes, shapes, starts, locations, weights, 64
    points = [2, 1]
    listed = (shapes, locations.flatten(3, 4)[:, :, :, :3], weights.flatten(3)[..., :3], points)
    if "discrete" in layout:
        listed = (*listed, "discrete")
    if layout.startswith("by_levels"):
        return value.permute(0, 2, 3, 1).split([12, 4], -1), *listed
    if layout.startswith("reshape"):
        return value, *listed[:4], "discrete" if "discrete" in layout else "default", "reshape"
    return value, *listed


def _numbers(*shape: int) -> torch.Tensor:
    """Numbers in [-1, 1] that follow no pattern, without a generator of random ones."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return (count * count * 0.37 + count).sin().view(shape)
