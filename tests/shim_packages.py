"""Packages with the names and signatures of other projects' entry points, written to a folder for a test.

Their arithmetic is the oracle of `attention.py`; their compiled extensions do not exist.
"""

FUNCTION = """
import torch
from torch.autograd.function import Function, once_differentiable
{imports}

class {name}(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, value_spatial_shapes, value_level_start_index, sampling_locations,
                              attention_weights)
        return {extension}.ms_deform_attn_forward(value, value_spatial_shapes, value_level_start_index,
                                                  sampling_locations, attention_weights, im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grads = {extension}.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.im2col_step)
        return grads[0], None, None, grads[1], grads[2], None
"""
CORE = """
from attention import oracle

def {name}(value, value_spatial_shapes, sampling_locations, attention_weights):
    return oracle(value, value_spatial_shapes, sampling_locations, attention_weights)
"""
DEFORMABLE_DETR = {
    "models/ops/functions.py": FUNCTION.format(
        name="MSDeformAttnFunction", extension="MSDA", imports="import MultiScaleDeformableAttention as MSDA"
    )
    + CORE.format(name="ms_deform_attn_core_pytorch"),
    "models/ops/modules.py": "from models.ops.functions import MSDeformAttnFunction",
}
GROUNDINGDINO = {
    "groundingdino/models/GroundingDINO/ms_deform_attn.py": FUNCTION.format(
        name="MultiScaleDeformableAttnFunction", extension="_C", imports="from groundingdino import _C"
    )
    + CORE.format(name="multi_scale_deformable_attn_pytorch"),
}
DETREX = {
    "detrex/layers/multi_scale_deform_attn.py": FUNCTION.format(
        name="MultiScaleDeformableAttnFunction", extension="_C", imports="from detrex import _C"
    )
    + CORE.format(name="multi_scale_deformable_attn_pytorch"),
}
MMCV = {
    "mmcv/ops/multi_scale_deform_attn.py": """
import importlib
import torch
from torch.autograd.function import Function, once_differentiable

ext_module = importlib.import_module("mmcv._ext")
assert hasattr(ext_module, "ms_deform_attn_forward") and hasattr(ext_module, "nms")

class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        sampling_locations, attention_weights = sampling_locations.type_as(value), attention_weights.type_as(value)
        ctx.save_for_backward(value, value_spatial_shapes, value_level_start_index, sampling_locations,
                              attention_weights)
        return ext_module.ms_deform_attn_forward(value, value_spatial_shapes, value_level_start_index,
                                                 sampling_locations, attention_weights, im2col_step=im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors
        grads = [torch.zeros_like(tensors[i]) for i in (0, 3, 4)]
        ext_module.ms_deform_attn_backward(*tensors, grad_output.contiguous(), *grads, im2col_step=64)
        return grads[0], None, None, grads[1], grads[2], None
"""
    + CORE.format(name="multi_scale_deformable_attn_pytorch"),
    "projects/mmdet3d_plugin/modules.py": """
import torch
from torch.amp import custom_fwd
from torch.autograd.function import Function
from mmcv.ops.multi_scale_deform_attn import ext_module, multi_scale_deformable_attn_pytorch

class MultiScaleDeformableAttnFunction_fp16(Function):
    @staticmethod
    @custom_fwd(cast_inputs=torch.float16, device_type="cuda")
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        raise NotImplementedError

class MultiScaleDeformableAttnFunction_fp32(Function):
    @staticmethod
    @custom_fwd(cast_inputs=torch.float32, device_type="cuda")
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        raise NotImplementedError
""",
}
RT_DETR = {
    "src/zoo/rtdetr/utils.py": CORE.format(name="deformable_attention_core_func")
    + """
import torch

def deformable_attention_core_func_v2(value, value_spatial_shapes, sampling_locations, attention_weights,
                                      num_points_list, method="default"):
    out, start, first = 0, 0, 0
    for (H, W), P in zip(value_spatial_shapes, num_points_list):
        v = value[:, start:start + H * W]
        x, a = sampling_locations[:, :, :, first:first + P], attention_weights[..., first:first + P]
        start, first = start + H * W, first + P
        if method == "default":
            out = out + oracle(v, [(H, W)], x.unsqueeze(3), a.unsqueeze(3)).to(value.dtype)
            continue
        index = (x * torch.tensor([W, H]) + 0.5).long().clamp(0, H - 1)
        token = index[..., 1] * W + index[..., 0]  # [B, Q, M, P]
        b = torch.arange(len(value))[:, None, None, None]
        m = torch.arange(value.shape[2])[None, None, :, None]
        out = out + (v[b, token, m] * a[..., None]).sum(3).flatten(2)
    return out
""",
    "src/zoo/rtdetr/decoder.py": """
import functools
from torch import nn
from .utils import deformable_attention_core_func, deformable_attention_core_func_v2

class MSDeformableAttention(nn.Module):
    def __init__(self, method="default"):
        super().__init__()
        self.first_version = deformable_attention_core_func
        self.ms_deformable_attn_core = functools.partial(deformable_attention_core_func_v2, method=method)

    def forward(self, *args):
        return self.ms_deformable_attn_core(*args)
""",
}
D_FINE = {
    "src/zoo/dfine/utils.py": """
import torch
from src.zoo.rtdetr.utils import deformable_attention_core_func_v2 as by_tensor

def deformable_attention_core_func_v2(value, value_spatial_shapes, sampling_locations, attention_weights,
                                      num_points_list, method="default"):
    bs, n_head, c, _ = value[0].shape
    joined = torch.cat(value, -1).permute(0, 3, 1, 2)
    return by_tensor(joined, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
""",
    "engine/deim/utils.py": """
import torch
from src.zoo.rtdetr.utils import deformable_attention_core_func_v2 as by_tensor

def deformable_attention_core_func_v2(value, value_spatial_shapes, sampling_locations, attention_weights,
                                      num_points_list, method="default", value_shape="default"):
    if value_shape == "default":
        bs, n_head, c, _ = value[0].shape
        value = torch.cat(value, -1).permute(0, 3, 1, 2)
    return by_tensor(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
""",
}
RFDETR = {
    "rfdetr/models/ops/functions/ms_deform_attn_func.py": """
from attention import oracle

def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights,
                                value_spatial_shapes_hw=None):
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    batch_size, n_heads, head_dim, _ = value.shape
    B, Q, M = attention_weights.shape[:3]
    return oracle(value.permute(0, 3, 1, 2), shapes, sampling_locations.reshape(B, Q, M, len(shapes), -1, 2),
                  attention_weights.reshape(B, Q, M, len(shapes), -1))
""",
    "rfdetr/models/ops/modules/ms_deform_attn.py": (
        "from rfdetr.models.ops.functions.ms_deform_attn_func import ms_deform_attn_core_pytorch"
    ),
}
TMDA = {
    "torch_ms_deform_attn/__init__.py": """
from attention import oracle

def ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step=64, *,
                   check_cuda_metadata=False):
    return oracle(value, spatial_shapes.tolist(), sampling_locations, attention_weights)

class MSDeformAttnFunction:
    apply = staticmethod(ms_deform_attn)
""",
}
DCNV4 = {
    "DCNv4/functions/flash_deform_attn_func.py": """
from torch.autograd.function import Function

class FlashDeformAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_loc_attn, im2col_step, K=8):
        raise NotImplementedError
""",
}
