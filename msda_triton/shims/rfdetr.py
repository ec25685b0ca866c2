"""rf-detr's and LW-DETR's `models.ops`: the names of `deformable_detr.py` with value as [B, M, D, S]."""

from msda_triton.shims.deformable_detr import MSDeformAttn, ms_deform_attn_core_pytorch

__all__ = ["MSDeformAttn", "ms_deform_attn_core_pytorch"]
