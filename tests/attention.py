"""Inputs, an oracle in float64 that shares no code with the package, and the error budget of the operator's tests."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_triton.call import Call
from msda_triton.reference import ms_deform_attn_reference

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def make_inputs(
    shapes, B=2, Q=19, M=2, D=8, P=2, dtype=torch.float32, location_dtype=None, device="cpu", span=1.6
) -> tuple[Tensor, Tensor, Tensor]:
    """value, sampling_locations and attention_weights; locations reach past the map by (span - 1) / 2 on each side."""
    S, L = sum(h * w for h, w in shapes), len(shapes)
    if location_dtype is None:
        location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(B, S, M, D, dtype=torch.float64).to(dtype)
    locations = ((torch.rand(B, Q, M, L, P, 2, dtype=torch.float64) - 0.5) * span + 0.5).to(location_dtype)
    weights = torch.rand(B, Q, M, L * P, dtype=torch.float64).softmax(-1).view(B, Q, M, L, P).to(dtype)
    return tuple(x.to(device).requires_grad_() for x in (value, locations, weights))


def oracle(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator by `grid_sample` in float64, level by level; differentiable."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    value, locations, weights = value.double(), locations.double(), weights.double()
    out, start = value.new_zeros(B * M, D, Q), 0
    for l, (H, W) in enumerate(shapes):
        image = value[:, start : start + H * W].permute(0, 2, 3, 1).reshape(B * M, D, H, W)
        loc = locations[:, :, :, l].transpose(1, 2).reshape(B * M, Q, -1, 2)
        attn = weights[:, :, :, l].transpose(1, 2).reshape(B * M, Q, -1)
        pixel = loc.detach() * loc.new_tensor([W, H]) - 0.5
        taken = ((pixel > -1) & (pixel < pixel.new_tensor([W, H]))).all(-1)
        grid = torch.where(taken[..., None], 2 * loc - 1, -9.0)
        sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (sampled * torch.where(taken, attn, 0)[:, None]).sum(-1)
        start += H * W
    return out.view(B, M * D, Q).transpose(1, 2)


def gradients(function, inputs, grad_out: Tensor) -> list[Tensor]:
    """The output of function(*inputs) and its gradients for each input."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def oracle_gradients(function, inputs, grad_out: Tensor) -> list[Tensor]:
    """Those of float64 inputs; an oracle need not repeat its bits, and `grid_sample` cannot on a GPU."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return gradients(function, [x.detach().double().requires_grad_() for x in inputs], grad_out.double())
    finally:
        torch.use_deterministic_algorithms(deterministic)


def assert_error_budget(got, rounded, exact, names) -> None:
    """Errors against the oracle are at most twice those of the formula in the same dtype, maximum and RMS.

    The formula computes in float32 and rounds its results once; half a unit in the last place of the largest
    result, or a few float32 roundings, are granted to both.
    """
    for name, x, y, z in zip(names, got, rounded, exact, strict=True):
        assert x.shape == z.shape, f"{name}: shape {tuple(x.shape)} for {tuple(z.shape)}"
        assert x.dtype == y.dtype, f"{name}: {x.dtype} for {y.dtype}"
        assert x.isfinite().all(), f"{name}: {(~x.isfinite()).sum()} values are not finite"
        if not z.numel():
            continue
        error, allowed = (x.double() - z).abs(), (y.double() - z).abs()
        scale = z.abs().max().item()
        # the oracle of float64 inputs is itself rounded to float64
        single = (32 * EPS[torch.float64] if x.dtype == torch.float64 else 8 * EPS[torch.float32]) * scale
        # the interpreter stores bfloat16 by truncation: one unit in the last place where a GPU has half
        ulp = 2 * EPS[x.dtype] * scale if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 0.0
        worst, budget = error.max().item(), 2 * allowed.max().item() + single + ulp
        assert worst <= budget, f"{name}: maximal error {worst:.3g}, budget {budget:.3g}"
        rms, budget = error.square().mean().sqrt().item(), 2 * allowed.square().mean().sqrt().item() + single + ulp
        assert rms <= budget, f"{name}: RMS error {rms:.3g}, budget {budget:.3g}"


def brute_force(value, shapes, locations, weights, starts=None):
    """The rule of `ms_deform_attn` in scalar Python, on float64 tensors without gradients."""
    B, _, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    if starts is None:
        starts = [sum(h * w for h, w in shapes[:l]) for l in range(L)]
    out = value.new_zeros(B, Q, M, D)
    for b, q, m, l, p in itertools.product(range(B), range(Q), range(M), range(L), range(P)):
        H, W = shapes[l]
        x, y = (locations[b, q, m, l, p, 0] * W - 0.5).item(), (locations[b, q, m, l, p, 1] * H - 0.5).item()
        if not (x > -1 and y > -1 and x < W and y < H):
            continue
        x0, y0 = int(x // 1), int(y // 1)
        for i, j in itertools.product((0, 1), (0, 1)):
            if 0 <= x0 + i < W and 0 <= y0 + j < H:
                area = (1 - abs(x - x0 - i)) * (1 - abs(y - y0 - j))
                out[b, q, m] += weights[b, q, m, l, p] * area * value[b, starts[l] + (y0 + j) * W + x0 + i, m]
    return out.view(B, Q, M * D)


def reference(value, shapes, locations, weights, starts=None):
    """The package's specification, on the public layout."""
    P = locations.shape[4]
    shapes = torch.as_tensor(shapes, device=value.device)
    return ms_deform_attn_reference(
        Call(value, shapes, starts, locations.flatten(3, 4), weights.flatten(3, 4), [P] * len(shapes))
    )
