"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) as Triton kernels, with a PyTorch fallback."""

from msda_triton.functional import MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_fused
from msda_triton.module import MSDeformAttn
from msda_triton.op import set_autotune
from msda_triton.shims.patching import patch, unpatch
from msda_triton.version import __version__ as __version__

__all__ = [
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "patch",
    "set_autotune",
    "unpatch",
]
