"""The accuracy gate: nothing is timed before its result and gradients match an oracle in float64."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import Provider
from benchmarks.workloads import Inputs

# Relative RMS error allowed, by the dtype of value: some rounding units of storage. Arithmetic on coordinates in half
# precision misses by far more (0.02 in float16, 0.2 in bfloat16).
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_CREASE = 1e-3  # pixels beside a pixel centre, where the gradient of a location jumps


def check(provider: Provider, x: Inputs, exact: dict[str, Tensor]) -> str | None:
    """None if the provider is right, else what is wrong: name of the tensor, error and limit.

    Args:
        exact: `oracle(x, provider.leaves)`.
    """
    limit = LIMITS[x.value.dtype]
    leaves, grad_out = differentiable(x, provider.leaves), gradient(x)
    out = provider.function(leaves)
    if out.shape != grad_out.shape or out.dtype != x.value.dtype:
        return f"out: expected {tuple(grad_out.shape)} {x.value.dtype}, got {tuple(out.shape)} {out.dtype}"
    grads = torch.autograd.grad(out, [getattr(leaves, name) for name in provider.leaves], grad_out)
    for name, got in zip(("out", *provider.leaves), (out.detach(), *grads), strict=True):
        error = relative_error(got, exact[name], _smooth(x) if name in ("locations", "offsets") else None)
        if not error <= limit:  # NaN is wrong as well
            return f"{'' if name == 'out' else 'gradient of '}{name}: relative error {error:.1e}, limit {limit:.0e}"
    return None


def oracle(x: Inputs, leaves: tuple[str, ...]) -> dict[str, Tensor]:
    """The result ("out") and the gradient of each leaf, by `grid_sample` in float64 of the same rounded inputs."""
    wide = {name: t.double() for name, t in vars(x).items() if isinstance(t, Tensor) and t.is_floating_point()}
    x64 = differentiable(replace(x, **wide), leaves)
    full = x64.from_offsets_and_logits()
    if "offsets" not in leaves:
        full = replace(full, locations=x64.locations)
    if "logits" not in leaves:
        full = replace(full, weights=x64.weights)
    out = _formula(full)
    grads = torch.autograd.grad(out, [getattr(x64, name) for name in leaves], gradient(x).double())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def differentiable(x: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """x with fresh leaves that require gradients."""
    return replace(x, **{name: getattr(x, name).detach().requires_grad_() for name in leaves})


def gradient(x: Inputs) -> Tensor:
    """The same random gradient [B, Q, M * D] of the result at every call."""
    B, _, M, D = x.value.shape
    rng = torch.Generator().manual_seed(1)
    return torch.randn(B, x.locations.shape[1], M * D, generator=rng).to(x.value)


def relative_error(got: Tensor, exact: Tensor, where: Tensor | None = None) -> float:
    error = got.double() - exact
    if where is not None:
        error, exact = error[where], exact[where]
    return (error.norm() / exact.norm()).item()


def _formula(x: Inputs) -> Tensor:
    B, _, M, D = x.value.shape
    out, start = 0, 0
    for l, (H, W) in enumerate(x.workload.levels):
        image = x.value[:, start : start + H * W].permute(0, 2, 3, 1).reshape(B * M, D, H, W)
        grid = 2 * x.locations[:, :, :, l].transpose(1, 2).flatten(0, 1) - 1  # [B * M, Q, P, 2]
        weights = x.weights[:, :, :, l].transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B * M, 1, Q, P]
        out = out + (F.grid_sample(image, grid, align_corners=False) * weights).sum(-1)
        start += H * W
    return out.view(B, M * D, -1).transpose(1, 2)


def _smooth(x: Inputs) -> Tensor:
    """Samples whose pixel position is safely between two pixel centres along both axes, [B, Q, M, L, P]."""
    position = x.locations.double() * x.shapes.flip(1)[:, None] - 0.5
    return ((position - position.round()).abs() > _CREASE).all(-1)
