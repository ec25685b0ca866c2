"""Who is timed. A peer takes part where it can be imported."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Inputs
from msda_triton import ms_deform_attn, ms_deform_attn_fused

BASELINE = "torch"


@dataclass(frozen=True)
class Provider:
    """A differentiable implementation and the inputs that it differentiates by."""

    function: Callable[[Inputs], Tensor]  # to [B, Q, M * D] in value's dtype
    leaves: tuple[str, ...] = ("value", "locations", "weights")
    keeps_graph: bool = True  # whether one forward can be followed by many backward passes
    graph: bool = False  # small calls are timed by CUDA graph as well


def grid_sample(x: Inputs) -> Tensor:
    """The baseline, `torch`: one `grid_sample` per level, as every repository without a CUDA build does it.

    Half precision is computed in float32: `grid_sample` wants locations in value's dtype, where they would lose pixels.
    """
    B, _, M, D = x.value.shape
    Q = x.locations.shape[1]
    sizes = [H * W for H, W in x.workload.levels]
    grids = (2 * x.locations - 1).transpose(1, 2).flatten(0, 1)  # [B * M, Q, L, P, 2]
    sampled = []
    for l, ((H, W), level) in enumerate(zip(x.workload.levels, x.value.float().split(sizes, 1), strict=True)):
        image = level.permute(0, 2, 3, 1).reshape(B * M, D, H, W)
        sampled.append(F.grid_sample(image, grids[:, :, l], align_corners=False))
    weights = x.weights.float().transpose(1, 2).reshape(B * M, 1, Q, -1)
    out = (torch.cat(sampled, -1) * weights).sum(-1)
    return out.view(B, M * D, Q).transpose(1, 2).to(x.value.dtype)


@functools.cache
def _compiled_grid_sample() -> Callable[[Inputs], Tensor]:
    return torch.compile(grid_sample)


def compiled_grid_sample(x: Inputs) -> Tensor:
    return _compiled_grid_sample()(x)


def _ours(x: Inputs, backend: str) -> Tensor:
    """As a detector calls it: the host knows the sizes of the levels."""
    return ms_deform_attn(x.value, x.workload.levels, x.locations, x.weights, backend=backend)


def triton_tensors(x: Inputs) -> Tensor:
    """Sizes and starts that only the device knows, as the callers of the 2020 extension pass them."""
    return ms_deform_attn(x.value, x.shapes, x.locations, x.weights, level_start_index=x.starts, backend="triton")


def triton_unfused(x: Inputs) -> Tensor:
    """What `triton_fused` saves: softmax and locations by PyTorch, then the kernel."""
    return _ours(x.from_offsets_and_logits(), "triton")


def triton_fused(x: Inputs) -> Tensor:
    return ms_deform_attn_fused(x.value, x.workload.levels, x.reference_points, x.offsets, x.logits, backend="triton")


def torch_ms_deform_attn(x: Inputs) -> Tensor:
    import torch_ms_deform_attn

    return torch_ms_deform_attn.ms_deform_attn(x.value, x.shapes, x.starts, x.locations, x.weights)


def mmcv(x: Inputs) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    step = x.value.shape[0]
    return MultiScaleDeformableAttnFunction.apply(x.value, x.shapes, x.starts, x.locations, x.weights, step)


class _OriginalFunction(torch.autograd.Function):
    """The official CUDA extension, which brings kernels without autograd."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights):
        import MultiScaleDeformableAttention

        ctx.save_for_backward(value, shapes, starts, locations, weights)
        step = value.shape[0]
        return MultiScaleDeformableAttention.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

    @staticmethod
    def backward(ctx, grad_out):
        import MultiScaleDeformableAttention

        step = ctx.saved_tensors[0].shape[0]
        grads = MultiScaleDeformableAttention.ms_deform_attn_backward(*ctx.saved_tensors, grad_out.contiguous(), step)
        return grads[0], None, None, grads[1], grads[2]


def original_cuda(x: Inputs) -> Tensor:
    return _OriginalFunction.apply(x.value, x.shapes, x.starts, x.locations, x.weights)


def deformops(x: Inputs) -> Tensor:
    import deformops

    return deformops.deform2d_multiscale(x.value, x.shapes, x.starts, x.locations, x.weights)


def dcnv4(x: Inputs) -> Tensor:
    from DCNv4.functions.flash_deform_attn_func import FlashDeformAttnFunction

    packed = torch.cat((x.locations.flatten(3).to(x.value.dtype), x.logits.flatten(3)), -1)
    return FlashDeformAttnFunction.apply(x.value, x.shapes, x.starts, packed, x.value.shape[0], x.workload.P)


_FUSED_LEAVES = ("value", "offsets", "logits")
PROVIDERS = {
    BASELINE: Provider(grid_sample, graph=True),
    "torch_compiled": Provider(compiled_grid_sample, keeps_graph=False),
    "fallback": Provider(functools.partial(_ours, backend="torch")),
    "inductor": Provider(functools.partial(_ours, backend="inductor")),
    "triton": Provider(functools.partial(_ours, backend="triton"), graph=True),
    "triton_tensors": Provider(triton_tensors, graph=True),
    "triton_unfused": Provider(triton_unfused, _FUSED_LEAVES, graph=True),
    "triton_fused": Provider(triton_fused, _FUSED_LEAVES, graph=True),
    "torch_ms_deform_attn": Provider(torch_ms_deform_attn, graph=True),
    "MultiScaleDeformableAttention": Provider(original_cuda),
    "mmcv": Provider(mmcv),
    "deformops": Provider(deformops),
    "DCNv4": Provider(dcnv4, ("value", "locations", "logits")),
}
_PEERS = ("torch_ms_deform_attn", "MultiScaleDeformableAttention", "mmcv", "deformops", "DCNv4")


def available(device: str, interpreter: bool) -> list[str]:
    """Names of the providers that can run here; the interpreter stands for a GPU in rehearsals."""
    names = [BASELINE, "torch_compiled", "fallback"]
    if device == "cpu":
        names.append("inductor")
    if device != "cpu" or interpreter:
        names += ["triton", "triton_tensors", "triton_unfused", "triton_fused"]
    return names + [peer for peer in _PEERS if importlib.util.find_spec(peer)]
