"""Random calls of the operator, compared with an oracle that shares no code with the package: NumPy in float64.

    python -m tests.fuzz --backend torch --calls 10000
    python -m tests.fuzz --backend triton --calls 1500        # interpreted without a GPU

A call is any that the docstrings allow: sizes from 0, every dtype in every place, strides, forms of the sizes, levels
out of order, overlapping or apart, plain and fused, bilinear and discrete, deterministic, under autocast, after a dry
run under another mode, with NaN, infinity and huge numbers in every tensor. All memory around value and between its
levels is NaN. `test_fuzz.py` runs some of them.
"""

import argparse
import contextlib
import os
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from unittest import mock

if __name__ == "__main__":  # before Triton decorates a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from msda_triton import ms_deform_attn, ms_deform_attn_fused

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CREASE = 0.001  # pixels: closer to a pixel centre float32 and float64 may fall on different sides of it
INF, NAN = float("inf"), float("nan")
COORDINATES = [NAN, INF, -INF, 1e30, -1e30, 3e38, -0.0, 1e-40, 0.0, 1.0]
WEIGHTS = [NAN, INF, -INF, 0.0, -2.0]
LOGITS = [NAN, INF, -INF, 80.0, -80.0]


@dataclass(frozen=True)
class Call:
    """What a call is made of; the tensors follow from it."""

    seed: int
    B: int
    Q: int
    M: int
    D: int
    levels: tuple[tuple[int, int], ...]
    points: tuple[int, ...]
    listed: bool  # num_points is given
    pixels: bool  # as many queries as tokens, if there are few
    dtypes: tuple[torch.dtype, ...]  # of value, locations or offsets, weights or logits, reference points, grad_out
    layout: str  # of value
    strided: bool  # locations, weights and grad_out are no contiguous tensors
    starts: str  # "none", "shuffled", "overlapping" or "apart"
    form: str  # of spatial_shapes and level_start_index
    fused: bool
    dim: int  # of the reference points
    one_reference: bool  # for all levels
    mask: bool
    method: str
    deterministic: bool
    autocast: str  # "none", or where it is on: "forward", "backward", "both"
    autocast_dtype: torch.dtype
    needs: tuple[bool, ...]  # gradients of value, locations, weights and reference points
    wild: tuple[int, ...]  # how many strange numbers value, locations, weights, reference points and grad_out hold
    before: str  # what is tried with the same sizes first


@st.composite
def calls(draw, small: bool = False) -> Call:
    L = draw(st.integers(1, 3 if small else 4))
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8] * 4 + [0])
    levels = tuple(draw(st.tuples(size, size)) for _ in range(L))
    listed = draw(st.booleans())
    point = st.integers(1, 3 if small else 4)
    points = tuple(draw(point) for _ in range(L)) if listed else (draw(point),) * L
    rarely = st.sampled_from([False, False, False, True])
    fused = draw(st.booleans())
    count = st.sampled_from([0, 0, 0, 1, 3])
    return Call(
        seed=draw(st.integers(0, 2**32 - 1)),
        B=draw(st.sampled_from([1, 1, 2] * 4 + [0])),
        Q=draw(st.sampled_from([1, 2, 3, 5] * 4 + [0])),
        M=draw(st.integers(1, 2 if small else 3)),
        D=draw(st.sampled_from([1, 2, 3, 4, 8, 16, 24, 32])),
        levels=levels,
        points=points,
        listed=listed,
        pixels=draw(rarely),
        dtypes=tuple(draw(st.sampled_from(DTYPES)) for _ in range(5)) if draw(st.booleans()) else
        (draw(st.sampled_from(DTYPES)),) * 5,
        layout=draw(st.sampled_from(["plain", "heads first", "padded", "channels strided", "expanded", "shifted"])),
        strided=draw(rarely),
        starts=draw(st.sampled_from(["none", "none", "shuffled", "overlapping", "apart"])),
        form=draw(st.sampled_from(["tuples", "lists", "array", "int64", "int32", "uint8"])),
        fused=fused,
        dim=draw(st.sampled_from([2, 4])),
        one_reference=draw(st.booleans()),
        mask=draw(st.booleans()),
        method=draw(st.sampled_from(["default"] * 4 + ["discrete", "discrete_h"])),
        deterministic=draw(rarely),
        autocast=draw(st.sampled_from(["none", "none", "forward", "backward", "both"])),
        autocast_dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        needs=tuple(draw(st.booleans()) for _ in range(4)) if draw(st.booleans()) else (True,) * 4,
        wild=tuple(draw(count) for _ in range(5)) if draw(st.booleans()) else (0,) * 5,
        before=draw(st.sampled_from(["nothing"] * 6 + ["fake", "meta default", "functionalize", "inference", "wrong"])),
    )  # fmt: skip


@dataclass
class Inputs:
    """The tensors of a call; `points` counts all K points of a head."""

    value: Tensor
    memory: Tensor  # that value lies in
    first: list[int]  # token of each level
    S: int
    locations: Tensor  # [B, Q, M, K, 2], or offsets
    weights: Tensor  # [B, Q, M, K], or logits
    reference: Tensor | None
    mask: Tensor | None
    grad_out: Tensor


def scatter_wild(x: Tensor, count: int, values: list[float], rng: np.random.Generator) -> None:
    for _ in range(count if x.numel() else 0):
        x[tuple(int(rng.integers(n)) for n in x.shape)] = values[rng.integers(len(values))]


def make_inputs(call: Call) -> Inputs:
    rng = np.random.default_rng(call.seed)
    normal = lambda *size: torch.from_numpy(rng.standard_normal(size))  # noqa: E731
    uniform = lambda *size: torch.from_numpy(rng.random(size))  # noqa: E731
    areas = [h * w for h, w in call.levels]
    first, S = [sum(areas[:l]) for l in range(len(areas))], sum(areas)
    if call.starts == "shuffled":
        order = rng.permutation(len(areas))
        for i, l in enumerate(order):
            first[l] = sum(areas[j] for j in order[:i])
    elif call.starts == "overlapping":
        S = max(areas) + 3
        first = [int(rng.integers(0, S - n + 1)) for n in areas]
    elif call.starts == "apart":
        first = [start + 2 * (l + 1) for l, start in enumerate(first)]
        S += 2 * len(areas) + 3
    B, M, D, K, L = call.B, call.M, call.D, sum(call.points), len(call.levels)
    Q = S if call.pixels and S <= 24 else call.Q
    dtype, location_dtype, weight_dtype, reference_dtype, grad_dtype = call.dtypes

    value = normal(B, S, M, D).to(dtype)
    used = torch.zeros(S, dtype=torch.bool)
    for start, area in zip(first, areas, strict=True):
        used[start : start + area] = True
    scatter_wild(value, call.wild[0], [NAN, INF, -INF], rng)
    value[:, ~used] = NAN
    value, memory = laid_out(value, call.layout)

    locations = uniform(B, Q, M, K, 2) * 1.5 - 0.25
    reference = None
    if call.fused:
        locations = normal(B, Q, M, K, 2) * 1.5
        reference = uniform(B, Q, 1 if call.one_reference else L, call.dim)
    locations = locations.to(location_dtype)
    weights = (normal(B, Q, M, K) * 2 if call.fused else uniform(B, Q, M, K)).to(weight_dtype)
    reference = None if reference is None else reference.to(reference_dtype)
    scatter_wild(locations, call.wild[1], COORDINATES, rng)
    scatter_wild(weights, call.wild[2], LOGITS if call.fused else WEIGHTS, rng)
    if reference is not None:
        scatter_wild(reference, call.wild[3], COORDINATES, rng)
    fresh = (lambda n: normal(n, 2) * 1.5) if call.fused else (lambda n: uniform(n, 2) * 1.5 - 0.25)
    exact = torch.zeros(locations.shape[:-1], dtype=torch.bool)
    if not call.fused and rng.random() < 0.3:
        put_on_centres(locations, call, exact, rng)
    for attempt in range(20):
        pixel, _ = pixels(call, locations, reference)
        near = ((pixel - pixel.round()).abs() < CREASE) & (pixel.abs() < 1e4)
        near = near.any(-1) & ~exact
        if not near.any():
            break
        locations[near] = fresh(int(near.sum())).to(location_dtype) if attempt < 19 else NAN
    pixel, size = pixels(call, locations, reference)
    if not call.fused and call.wild[2]:  # a weight that must not matter
        outside = ~((pixel > -1) & (pixel < size)).all(-1)
        if outside.any() and call.method == "default":
            weights[tuple(outside.nonzero()[0])] = 1e30

    mask = torch.from_numpy(rng.random((B, S)) < 0.3) if call.fused and call.mask else None
    grad_out = normal(B, Q, M * D).to(grad_dtype if call.autocast == "none" else dtype)
    grad_out = grad_out.to(dtype)  # autograd hands on what has the result's dtype
    scatter_wild(grad_out, call.wild[4], [NAN, INF, -INF], rng)
    if call.strided:
        locations, weights, grad_out = (
            x.transpose(0, 1).contiguous().transpose(0, 1) for x in (locations, weights, grad_out)
        )
    return Inputs(value, memory, first, S, locations, weights, reference, mask, grad_out)


def put_on_centres(locations: Tensor, call: Call, exact: Tensor, rng: np.random.Generator) -> None:
    """Some samples exactly on pixel centres and one pixel off the map, where sizes are powers of two."""
    k = 0
    for (H, W), count in zip(call.levels, call.points, strict=True):
        if H in (1, 2, 4, 8) and W in (1, 2, 4, 8):
            where = torch.from_numpy(rng.random(exact[..., k : k + count].shape) < 0.5)
            n = int(where.sum())
            x, y = rng.integers(-1, W + 1, n), rng.integers(-1, H + 1, n)
            centre = torch.from_numpy(np.stack([(x + 0.5) / W, (y + 0.5) / H], -1)).to(locations.dtype)
            locations[..., k : k + count, :][where] = centre
            exact[..., k : k + count] = where
        k += count


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """value in memory that is NaN wherever value is not."""
    B, S, M, D = value.shape
    if layout == "heads first":
        memory = torch.full((3, B, M, S + 2, D), NAN, dtype=value.dtype)
        view = memory[1, :, :, 1 : S + 1].transpose(1, 2)
    elif layout == "padded":
        memory = torch.full((B + 2, S + 2, M + 1, D + 8), NAN, dtype=value.dtype)
        view = memory[1 : B + 1, 1 : S + 1, :M, 8:]
    elif layout == "channels strided":
        memory = torch.full((B + 2, S, M, D, 2), NAN, dtype=value.dtype)
        view = memory[1 : B + 1, ..., 0]
    elif layout == "shifted":
        memory = torch.full((value.numel() + 2 * S * M * D + 3,), NAN, dtype=value.dtype)
        view = memory[S * M * D + 1 :][: value.numel()].view(value.shape)
    elif layout == "expanded":
        memory = torch.full((3, 1, S, M, D), NAN, dtype=value.dtype)
        view = memory[1].expand(B, -1, -1, -1)
        value = value[:1]
        if not B:
            return view, memory
        memory[1] = value
        return view, memory
    else:
        memory = torch.full((B + 2, S, M, D), NAN, dtype=value.dtype)
        view = memory[1 : B + 1]
    view.copy_(value)
    return view, memory


def pixels(call: Call, locations: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pixel coordinates [B, Q, M, K, 2] (x, y) of the samples and sizes [K, 2] (W, H) of their levels, in float64."""
    level = [l for l, n in enumerate(call.points) for _ in range(n)]
    size = torch.tensor([call.levels[l][::-1] for l in level], dtype=torch.float64).view(-1, 2)
    x = locations.double()
    if reference is not None:
        reference = reference.double()[:, :, None, level if reference.shape[2] > 1 else [0] * len(level)]
        if call.dim == 2:
            return reference * size + x - 0.5, size
        count = torch.tensor([call.points[l] for l in level], dtype=torch.float64)[:, None]
        x = reference[..., :2] + x * reference[..., 2:] * 0.5 / count
    return x * size - 0.5, size


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


BACKENDS = ("torch", "triton", "inductor", "exported")
NAMES = ("out", "grad of value", "grad of locations", "grad of weights", "grad of reference points")


def sizes_in_form(call: Call, x: Inputs):
    """spatial_shapes and level_start_index as a caller may give them."""
    given = call.starts != "none"
    if call.form in ("tuples", "lists"):
        kind = tuple if call.form == "tuples" else list
        return kind(kind(s) for s in call.levels), kind(x.first) if given else None
    if call.form == "array":
        return np.array(call.levels), np.array(x.first) if given else None
    dtype = getattr(torch, call.form)
    sizes = torch.tensor(call.levels, dtype=dtype, device="cpu")
    return sizes, torch.tensor(x.first, dtype=dtype, device="cpu") if given else None


def run(call: Call, x: Inputs, backend: str, inputs: list[Tensor | None]) -> Tensor:
    value, locations, weights, reference = inputs
    shapes, starts = sizes_in_form(call, x)
    options = {"level_start_index": starts, "method": call.method}
    if backend == "exported":
        with mock.patch("torch.compiler.is_exporting", lambda: True):
            return run(call, x, "torch", inputs)
    options["backend"] = backend
    if call.listed:
        options["num_points"] = list(call.points)
    else:
        L, P = len(call.levels), call.points[0]
        locations, weights = locations.unflatten(3, (L, P)), weights.unflatten(3, (L, P))
    if reference is None:
        return ms_deform_attn(value, shapes, locations, weights, **options)
    return ms_deform_attn_fused(value, shapes, reference, locations, weights, value_mask=x.mask, **options)


def try_before(call: Call, x: Inputs, backend: str) -> None:
    """A call with the same sizes under another mode, or a wrong one; neither may leave anything behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = [x.value, x.locations, x.weights, x.reference]
    if call.before == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # the value of a mode's own sizes is known only where they are listed
            listed = Call(**{**vars(call), "form": "lists"})
            fake = [None if t is None else mode.from_tensor(t) for t in inputs]
            masked = Inputs(**{**vars(x), "mask": None if x.mask is None else mode.from_tensor(x.mask)})
            assert run(listed, masked, backend, fake).shape == x.grad_out.shape
    elif call.before == "meta default":
        torch.set_default_device("meta")
        try:
            run(call, x, backend, inputs)
        finally:
            torch.set_default_device(None)
    elif call.before == "functionalize":
        torch.func.functionalize(lambda *t: run(call, x, backend, [*t, *inputs[len(t) :]]))(*inputs[:3])
    elif call.before == "inference":
        with torch.inference_mode():
            run(call, x, backend, inputs)
    elif call.before == "wrong":
        wrong = {"num_points": [float(n) for n in call.points]} if call.listed else {}
        sizes = [tuple(float(n) for n in size) for size in call.levels]
        try:
            ms_deform_attn(x.value, sizes, x.locations, x.weights, **wrong)
        except (TypeError, ValueError):
            return
        raise AssertionError("sizes or points that are floats were accepted")


def results(call: Call, x: Inputs, backend: str) -> list[Tensor | None]:
    """out and the gradients that were asked for."""
    tensors = [x.value, x.locations, x.weights, x.reference]
    wanted = [t is not None and need for t, need in zip(tensors, call.needs, strict=True)]
    inputs = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]

    def autocast(part: str):
        on = call.autocast in (part, "both")
        return torch.autocast("cpu", call.autocast_dtype) if on else contextlib.nullcontext()

    with autocast("forward"):
        out = run(call, x, backend, inputs)
    if not any(wanted):
        assert not out.requires_grad
        return [out, None, None, None, None]
    with autocast("backward"):
        grads = iter(torch.autograd.grad(out, [t for t, w in zip(inputs, wanted, strict=True) if w], x.grad_out))
    return [out.detach(), *(next(grads) if w else None for w in wanted)]


def faults(call: Call, backend: str) -> list[str]:
    """What is wrong with a call's results, in a line each."""
    x = make_inputs(call)
    memory = x.memory.clone()
    want = oracle(call, x)
    tensors = [x.grad_out, x.value, x.locations, x.weights, x.reference]
    double = any(t.dtype == torch.float64 for t in tensors[1:] if t is not None)
    if backend == "triton" and call.deterministic and call.method == "default":
        fixed_point(call, x, want[1], torch.float64 if double else torch.float32)
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        try_before(call, x, backend)
        got = results(call, x, backend)
        found = [] if same_bits(memory, x.memory) else ["value, or what lies around it, was written to"]
        for name, like, result, number in zip(NAMES, tensors, got, want, strict=False):
            if result is not None and (fault := difference(result, like, number, double)):
                found.append(f"{name}: {fault}")
        return found
    except Exception as error:  # whatever comes is a fault to count
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25)) and torch.equal(a.isnan(), b.isnan())


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help='"exported": as torch.export sees it')
    parser.add_argument("--calls", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls (default: %(default)s)")
    parser.add_argument("--show", type=int, default=5, help="wrong calls that are printed whole (default: %(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of the interpreted kernels
    wrong, kinds, begin = [], Counter(), time.perf_counter()

    @hypothesis.seed(args.seed)
    @hypothesis.settings(
        max_examples=args.calls, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(call=calls(small=args.backend == "triton"))
    def count(call: Call) -> None:
        kinds.update(["calls", call.method, "fused" if call.fused else "plain", *["strange contents"] * any(call.wild)])
        if found := faults(call, args.backend):
            wrong.append((call, found))
            if len(wrong) <= args.show:
                print(call, *found, sep="\n    ", flush=True)

    count()
    sorts = Counter(re.sub(r"\d+ of \d+ ", "", line.split(", at")[0])[:100] for _, lines in wrong for line in lines)
    for what, number in sorts.most_common():
        print(f"{number:6} {what}")
    shares = ", ".join(f"{n} {name}" for name, n in kinds.most_common())
    print(f"{args.backend}: {shares}: {len(wrong)} wrong, in {time.perf_counter() - begin:.0f} s")
    return min(len(wrong), 1)


if __name__ == "__main__":
    raise SystemExit(main())
