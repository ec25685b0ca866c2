"""What `fuzz.py` calls the operator with: a description that hypothesis draws, and the tensors that follow from it."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

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
