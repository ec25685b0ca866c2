"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) as Triton kernels, with a PyTorch fallback."""

from msda_triton.functional import ms_deform_attn
from msda_triton.module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn"]
__version__ = "0.1.0"
