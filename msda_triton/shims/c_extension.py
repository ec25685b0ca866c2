"""The compiled module `MultiScaleDeformableAttention` of Deformable DETR, whose two functions others copied.

Deformable DETR, Mask2Former, OneFormer, DINO, LW-DETR and ViT-Adapter import it by this name; groundingdino and detrex
have the same functions in `_C`.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from msda_triton import functional


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """value [B, S, M, D], spatial_shapes [L, 2], level_start_index [L], sampling_loc [B, Q, M, L, P, 2] and attn_weight
    [B, Q, M, L, P] -> [B, Q, M * D]. `im2col_step` is not needed: any batch size will do.

    Raises:
        ValueError, TypeError: naming the argument; also for the three-dimensional variant of the same name.
    """
    return functional.ms_deform_attn(
        value, spatial_shapes, sampling_loc, attn_weight, level_start_index=level_start_index
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """The gradients [grad_value, grad_sampling_loc, grad_attn_weight] for `grad_output` [B, Q, M * D], any strides."""
    return list(
        functional.ms_deform_attn_backward(
            grad_output, value, spatial_shapes, sampling_loc, attn_weight, level_start_index=level_start_index
        )
    )


def stand_in(name: str, functions: dict[str, Callable]) -> ModuleType:
    """A module `name` with these functions, for an extension that was not compiled; its others raise when called."""
    module = ModuleType(name, f"Stands for the extension {name}, which is not compiled here.")

    def missing(function: str) -> Callable:
        if function.startswith("__"):
            raise AttributeError(function)

        def not_compiled(*_args, **_kwargs):
            ours = ", ".join(functions)
            raise NotImplementedError(f"{name}.{function}: not compiled here; msda_triton stands in for {ours} only")

        return not_compiled

    module.__getattr__ = missing
    vars(module).update(functions)
    return module
