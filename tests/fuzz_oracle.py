"""The oracle of `fuzz.py`: the operator and its gradients in NumPy, in float64, sharing no code with the package."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.fuzz_calls import Call, Inputs, pixels


@dataclass
class Number:
    """An exact tensor, and the size of what rounding may do to it: in units of the computation's precision."""

    exact: np.ndarray
    noise: np.ndarray


def oracle(call: Call, x: Inputs) -> list[Number]:
    """out and the gradients of value, locations, weights and reference points."""
    with np.errstate(all="ignore"):
        return _oracle(call, x)


def _oracle(call: Call, x: Inputs) -> list[Number]:
    value = x.value.double().numpy().copy()
    if x.mask is not None:
        value[x.mask.numpy()] = 0.0
    B, S, M, D = value.shape
    pixel, size = (t.numpy() for t in pixels(call, x.locations, x.reference))
    Q, K = pixel.shape[1], pixel.shape[3]
    level = np.array([l for l, n in enumerate(call.points) for _ in range(n)])
    W, H = size[:, 0], size[:, 1]
    first = np.array(x.first)[level]
    weights = x.weights.double().numpy()
    if x.reference is not None:
        weights = np.exp(weights - weights.max(-1, keepdims=True)) if K else weights
        weights = weights / weights.sum(-1, keepdims=True)
    grad_out = x.grad_out.double().numpy().reshape(B, Q, M, D)
    px, py = pixel[..., 0], pixel[..., 1]
    corners = []  # x, y, weight, its derivatives by x and y
    if call.method == "default":
        taken = (px > -1) & (py > -1) & (px < W) & (py < H)
        px, py = np.where(taken, px, 0.0), np.where(taken, py, 0.0)
        x0, y0 = np.floor(px), np.floor(py)
        fx, fy = px - x0, py - y0
        for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
            wx, wy = (fx if i else 1 - fx), (fy if j else 1 - fy)
            corners.append((x0 + i, y0 + j, wx * wy, (2 * i - 1) * wy, (2 * j - 1) * wx))
    else:
        taken = np.isfinite(px) & np.isfinite(py)
        x_last = (H if call.method == "discrete_h" else W) - 1
        column = np.clip(np.floor(np.where(taken, px, 0) + 1), 0, x_last)
        row = np.clip(np.floor(np.where(taken, py, 0) + 1), 0, H - 1)
        one, zero = np.ones_like(column), np.zeros_like(column)
        corners.append((column, row, one, zero, zero))
    attn = np.where(taken, weights, 0.0)

    b = np.arange(B)[:, None, None, None]
    m = np.arange(M)[:, None]
    out, out_noise = np.zeros((B, Q, M, D)), np.zeros((B, Q, M, D))
    grad_value, value_noise = np.zeros((B, S, M, D)), np.zeros((B, S, M, D))
    grad_attn, grad_x, grad_y, dots = (np.zeros((B, Q, M, K)) for _ in range(4))
    clean = lambda a: np.abs(np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0))  # noqa: E731
    reach = scale_of_position(call, x, size)  # what a position's rounding is worth
    for xi, yi, weight, by_x, by_y in corners:
        inside = taken & (xi >= 0) & (yi >= 0) & (xi < W) & (yi < H)
        token = np.where(inside, first + yi * W + xi, 0).astype(int)
        rows = value[b, token, m] if S else np.zeros((B, Q, M, K, D))
        part = inside[..., None]
        out += np.where(part, attn[..., None] * (weight[..., None] * rows), 0.0).sum(3)
        out_noise += (np.where(part, clean(attn)[..., None] * clean(rows), 0.0) * reach[..., None]).sum(3)
        dot = (grad_out[:, :, :, None] * rows).sum(-1)
        dots += np.where(inside, (clean(grad_out)[:, :, :, None] * clean(rows)).sum(-1), 0.0)
        grad_attn += np.where(inside, weight * dot, 0.0)
        grad_x += np.where(inside, attn * by_x * dot, 0.0)
        grad_y += np.where(inside, attn * by_y * dot, 0.0)
        if S:
            where = np.broadcast_to(b, inside.shape)[inside], token[inside], np.broadcast_to(m, inside.shape)[inside]
            grads = np.broadcast_to(grad_out[:, :, :, None], (B, Q, M, K, D))[inside]
            np.add.at(grad_value, where, (attn * weight)[inside][:, None] * grads)
            np.add.at(value_noise, where, (clean(attn) * reach)[inside][:, None] * clean(grads))
    if call.method != "default":
        grad_x, grad_y = np.zeros_like(grad_x), np.zeros_like(grad_y)
    if x.mask is not None:
        grad_value[x.mask.numpy()] = 0.0
    attn_noise = dots * reach
    loc = np.stack([grad_x, grad_y], -1)
    loc_noise = (clean(attn) * dots * reach)[..., None] * np.ones(2) * (call.method == "default")
    grad_locations, grad_weights = loc * size, grad_attn
    numbers = [Number(out.reshape(B, Q, M * D), out_noise.reshape(B, Q, M * D)), Number(grad_value, value_noise)]
    if x.reference is None:
        return [*numbers, Number(grad_locations, loc_noise * size), Number(grad_weights, attn_noise)]
    return numbers + through_fused(call, x, weights, loc, loc_noise, size, grad_attn, attn_noise, taken)


def scale_of_position(call: Call, x: Inputs, size: np.ndarray) -> np.ndarray:
    """[B, Q, M, K]: 1 + the largest number that a pixel coordinate is computed from, where that is finite."""
    parts = [np.abs(x.locations.double().numpy()) * (1.0 if call.fused and call.dim == 2 else size)]
    if x.reference is not None:
        level = [l for l, n in enumerate(call.points) for _ in range(n)]
        index = level if x.reference.shape[2] > 1 else [0] * len(level)
        reference = np.abs(x.reference.double().numpy()[:, :, None, index])
        parts.append(np.broadcast_to(reference[..., :2] * size, parts[0].shape))
        if call.dim == 4:
            parts[0] = parts[0] * reference[..., 2:]
    scale = 1 + np.max(np.stack(parts), axis=(0, -1))
    return np.where(np.isfinite(scale), scale, 1.0)


def through_fused(call, x, attn, loc, loc_noise, size, grad_attn, attn_noise, taken) -> list[Number]:
    """Gradients of offsets, logits and reference points, from those of pixel coordinates and weights."""
    inner = (attn * grad_attn).sum(-1, keepdims=True)
    grad_logits = attn * (grad_attn - inner)
    clean = lambda a: np.abs(np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0))  # noqa: E731
    logit_scale = 1 + clean(x.weights.double().numpy()).max(-1, keepdims=True, initial=0)  # exp's argument is rounded
    noise = attn_noise + (clean(attn) * attn_noise).sum(-1, keepdims=True)
    logits_noise = logit_scale * clean(attn) * (noise + clean(grad_attn) + clean(inner))
    level = [l for l, n in enumerate(call.points) for _ in range(n)]
    reference = x.reference.double().numpy()
    levels, dim = reference.shape[2:]
    index = level if levels > 1 else [0] * len(level)
    used = taken[..., None]
    if dim == 2:
        offsets, offsets_noise = loc, loc_noise
        grads, grads_noise = loc * size, loc_noise * size
    else:
        count = np.array([call.points[l] for l in level])[:, None]
        sides = np.broadcast_to(reference[:, :, None, index, 2:], loc.shape)
        u = x.locations.double().numpy()
        grad = loc * size
        offsets = np.where(used, grad * sides * 0.5 / count, 0.0)
        offsets_noise = loc_noise * size * clean(sides)
        grads = np.concatenate([grad, np.where(used, grad * u * 0.5 / count, 0.0)], -1)
        grads_noise = np.concatenate([loc_noise * size, loc_noise * size * clean(u)], -1)
    grad_reference, reference_noise = np.zeros_like(reference), np.zeros_like(reference)
    for k, l in enumerate(index):
        grad_reference[:, :, l] += grads[:, :, :, k].sum(2)
        reference_noise[:, :, l] += grads_noise[:, :, :, k].sum(2)
    # the logits' rounding reaches all that the weights do: at most their scale
    logits = [Number(offsets, offsets_noise * logit_scale[..., None]), Number(grad_logits, logits_noise)]
    return [*logits, Number(grad_reference, reference_noise * logit_scale.max(initial=1))]


def fixed_point(call: Call, x: Inputs, grad_value: Number, dtype: torch.dtype) -> None:
    """What the deterministic kernels promise of the gradient of value: 62 bits of its largest term in a head of an
    image, and NaN in all of it where a term is not finite."""
    pixel, size = (t.numpy() for t in pixels(call, x.locations, x.reference))
    weights = x.weights.double().numpy()
    B, Q, M, K = weights.shape
    if not weights.size:
        return
    with np.errstate(all="ignore"):
        if x.reference is not None:
            weights = np.exp(weights - weights.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
        adds = adds_to_some_pixel(call, x, pixel, size)
        rows = np.abs(x.grad_out.double().numpy().reshape(B, Q, M, -1)).max(-1)[..., None]
        terms = np.where(adds, rows * np.abs(weights), 0).max((1, 3))
    finite = np.isfinite(terms)[:, None, :, None]
    grad_value.exact[...] = np.where(finite, grad_value.exact, np.nan)
    step = np.where(np.isfinite(terms), terms, 0) * (Q * K) ** 2 * 2.0**-61 / torch.finfo(dtype).eps
    grad_value.noise += step[:, None, :, None]


def adds_to_some_pixel(call: Call, x: Inputs, pixel: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[B, Q, M, K]: samples that are taken and touch a pixel which no mask hides."""
    level = np.array([l for l, n in enumerate(call.points) for _ in range(n)])
    taken = ((pixel > -1) & (pixel < size)).all(-1)
    corner = np.floor(np.where(taken[..., None], pixel, 0))
    hidden = np.zeros((len(pixel), max(x.S, 1)), bool) if x.mask is None else x.mask.numpy()
    adds = np.zeros_like(taken)
    for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
        xi, yi = corner[..., 0] + i, corner[..., 1] + j
        inside = taken & (xi >= 0) & (yi >= 0) & (xi < size[:, 0]) & (yi < size[:, 1])
        token = np.where(inside, np.array(x.first)[level] + yi * size[:, 0] + xi, 0).astype(int)
        adds |= inside & ~hidden[np.arange(len(pixel))[:, None, None, None], token]
    return adds


def difference(got: Tensor, like: Tensor, want: Number, double: bool) -> str:
    """Empty if the result is the oracle's, as far as its dtype allows."""
    if got.shape != want.exact.shape or got.dtype != like.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {want.exact.shape} {like.dtype}"
    # the interpreter stores bfloat16 by truncation: one unit in the last place where a GPU has half
    unit = torch.finfo(got.dtype).eps * (1 if got.dtype == torch.bfloat16 else 0.5)
    least = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    if got.dtype == torch.bfloat16:
        least = torch.finfo(got.dtype).smallest_normal  # the interpreter converts -2.4e-39 to -7.6e-39
    single = torch.finfo(torch.float64 if double else torch.float32).eps
    exact, got_numbers = want.exact, got.double().numpy()
    with np.errstate(all="ignore"):
        allowed = 16 * single * (want.noise + np.abs(exact)) + 1.01 * unit * np.abs(exact) + 2 * least
        known = np.isfinite(exact)
        # what may overflow on the way
        limit = min(torch.finfo(got.dtype).max, 1e38)
        small = (want.noise < 1e36) & (np.abs(exact) < 0.98 * limit)
        wrong = known & small & ~(np.abs(got_numbers - exact) <= allowed)
        silent = ~known & np.isfinite(got_numbers)
    if wrong.any():
        i = tuple(int(n) for n in np.argwhere(wrong)[0])
        what = f"at {i} {got_numbers[i]:.6g} instead of {exact[i]:.6g} +- {allowed[i]:.2g}"
        return f"{wrong.sum()} of {wrong.size} wrong, {what}"
    if silent.any():
        i = tuple(int(n) for n in np.argwhere(silent)[0])
        return f"{silent.sum()} of {silent.size} finite that should not be, at {i} {got_numbers[i]:.6g}"
    return ""
