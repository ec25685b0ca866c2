"""Bags of table rows: how the CPU fallback computes. Legend: see `reference.py`.

A table holds a pixel's channels in each row. The pixels that one (batch, query, head) touches at one of four corners
are a bag of K of its rows: the weighted sum over a bag is the result, the sum over the transposed bags is the gradient
of value, and the products of grad_out with the rows give the other two. Bags are transposed by sorting, or for levels
of few tokens by writing them out as rows of a dense matrix.
"""

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_triton.call import Call
from msda_triton.constants import untouched


class Geometry(NamedTuple):
    """Where levels lie among the tokens, as numbers of the host. Each has pixels, and fits into the tokens."""

    sizes: tuple[tuple[int, int], ...]  # (H, W)
    starts: tuple[int, ...]  # first token
    num_points: tuple[int, ...]


class Part(NamedTuple):
    """A run of levels whose gradients are computed in one way."""

    geometry: Geometry  # of these levels, their starts counted from the first of `tokens`
    points: slice  # of the K points
    tokens: slice  # of the S tokens; all of them if not dense, as fewer would have to be copied
    dense: bool


class Levels(NamedTuple):
    """The level that each of the K points samples, and how its pixels become rows of a table."""

    size: Tensor  # [2, 1, 1, 1, K] (W, H)
    first: Tensor  # 0 and
    last: Tensor  # size - 1, of the same shape
    scale: Tensor  # [2, 1, 1, 1, K] rows from one pixel to the next along x and y
    base: Tensor  # [2, 1, 1, 1, K] 0 and the rows from a bag's first to its level's first pixel
    bag: Tensor  # [B, 1 or Q, M, 1] a bag's first row
    steps: Tensor  # [2, 1, 1, 1, 1, 1] 0 and 1: to the lower and the upper neighbour


class Samples(NamedTuple):
    """The two neighbours of each sample along each axis; the dimensions are neighbour, (x, y), B, Q, M, K."""

    pixel: Tensor  # moved into the level where outside
    weight: Tensor  # of the linear interpolation, 0 where moved
    slope: Tensor | None  # derivative of the weight by the location, 0 where moved


def geometry_of(call: Call) -> tuple[Geometry, list[int] | None]:
    """The levels that hold pixels, and their points among the K, None for all: a level that does not fit holds none."""
    shapes, starts = call.spatial_shapes, call.level_start_index
    sizes = tuple(call.level_sizes) if shapes is None else tuple(shapes.flatten().tolist())
    starts = tuple(call.level_starts) if starts is None else tuple(starts.tolist())
    return _geometry(sizes, starts, tuple(call.num_points), call.value.shape[1])


@functools.lru_cache(maxsize=256)
def _geometry(
    numbers: tuple[int, ...], starts: tuple[int, ...], num_points: tuple[int, ...], S: int
) -> tuple[Geometry, list[int] | None]:
    sizes = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    areas = [H * W for H, W in sizes]
    if not starts:
        starts = tuple(sum(areas[:level]) for level in range(len(areas)))
    used = [
        level
        for level, (size, start, area) in enumerate(zip(sizes, starts, areas, strict=True))
        if min(size) > 0 and start >= 0 and start + area <= S
    ]
    if len(used) == len(sizes):
        return Geometry(sizes, starts, num_points), None
    firsts = [sum(num_points[:level]) for level in used]
    points = [k for level, first in zip(used, firsts, strict=True) for k in range(first, first + num_points[level])]
    return Geometry(*(tuple(field[level] for level in used) for field in (sizes, starts, num_points))), points


@functools.lru_cache(maxsize=256)
def parts_of(geometry: Geometry, S: int, dense_tokens: int) -> list[Part]:
    """The levels that have points, in order; dense neighbours that follow each other in memory are one part.

    dense_tokens: a level is dense if it has at most so many tokens for each of its points.
    """
    runs: list[list[int]] = []
    dense_before, end = None, None
    for level, ((H, W), start, count) in enumerate(zip(*geometry, strict=True)):
        if count:
            dense = dense_tokens * count >= H * W
            if dense == dense_before and (start == end or not dense):
                runs[-1].append(level)
            else:
                runs.append([level])
            dense_before = dense
        end = start + H * W
    parts = []
    for run in runs:
        sizes, starts, counts = (tuple(field[level] for level in run) for field in geometry)
        dense = dense_tokens * counts[0] >= sizes[0][0] * sizes[0][1]
        tokens = slice(starts[0], starts[-1] + sizes[-1][0] * sizes[-1][1]) if dense else slice(0, S)
        first_point = sum(geometry.num_points[: run[0]])
        inside = Geometry(sizes, tuple(start - tokens.start for start in starts), counts)
        parts.append(Part(inside, slice(first_point, first_point + sum(counts)), tokens, dense))
    return parts


@functools.lru_cache(maxsize=256)
@untouched
def levels_of(
    geometry: Geometry, bags: tuple[int, int, int], steps: tuple[int, int, int], token_step: int, dtype: torch.dtype
) -> Levels:
    """Tensors of a geometry; kept, as making them takes as long as a small call.

    Args:
        bags: (B, Q, M), Q = 1 where all queries share their rows. steps: rows from one of each to the next.
        token_step: rows from one token to the next. dtype: of coordinates.
    """
    widths, heights, base = [], [], []
    for (H, W), start, count in zip(*geometry, strict=True):
        widths += [W] * count
        heights += [H] * count
        base += [start * token_step] * count
    rows = sum((n - 1) * step for n, step in zip(bags, steps, strict=True))
    rows += max(start + H * W for (H, W), start in zip(geometry.sizes, geometry.starts, strict=True)) * token_step
    index = torch.int32 if rows < 2**31 else torch.int64
    bounds = [[widths, heights], [[0] * len(widths)] * 2, [[W - 1 for W in widths], [H - 1 for H in heights]]]
    size, first, last = torch.tensor(bounds, dtype=dtype, device="cpu").view(3, 2, 1, 1, 1, -1)
    scale = [[token_step] * len(widths), [W * token_step for W in widths]]
    b, q, m = (torch.arange(n, dtype=index, device="cpu") * step for n, step in zip(bags, steps, strict=True))
    return Levels(
        size=size,
        first=first,
        last=last,
        scale=torch.tensor(scale, dtype=index, device="cpu").view(2, 1, 1, 1, -1),
        base=torch.tensor([[0] * len(base), base], dtype=index, device="cpu").view(2, 1, 1, 1, -1),
        bag=(b[:, None, None] + q[:, None] + m)[..., None],
        steps=torch.tensor([0, 1], dtype=dtype, device="cpu").view(2, 1, 1, 1, 1, 1),
    )


def _samples(locations: Tensor, levels: Levels, with_slope: bool) -> Samples:
    # masks are numbers here: comparing and selecting costs ten times an addition in eager PyTorch
    position = locations.movedim(-1, 0).contiguous().mul(levels.size).sub_(0.5)
    neighbour = position.floor() + levels.steps
    pixel = neighbour.clamp(levels.first, levels.last)
    # the distance to the neighbour itself; one outside is first pushed on by twice its way, to 1 or more from position
    distance = torch.lerp(pixel, neighbour, 3).sub_(position).abs_()
    weight = torch.rsub(distance, 1).clamp_(min=0)
    slope = None
    if with_slope:
        inside = 1 - neighbour.sub_(pixel).abs_().clamp_(max=1)
        # a location exactly one pixel before the first does not count, though its upper neighbour is inside
        slope = inside.mul_(torch.sign(position + 1).mul_(levels.size))
        slope[0].neg_()
    return Samples(pixel, weight, slope)


def corner_bags(locations: Tensor, attn: Tensor, levels: Levels, with_slope: bool) -> tuple[Tensor, Tensor, Samples]:
    """Rows of the table and their weights, [2 (y) * 2 (x) * B * Q * M, K]: a bag for each of the four corners."""
    samples = _samples(locations, levels, with_slope)
    x, y = torch.addcmul(levels.base, samples.pixel.to(levels.scale.dtype), levels.scale).unbind(1)
    wx, wy = samples.weight.unbind(1)
    rows = (y + levels.bag).unsqueeze(1) + x
    weights = (wy * attn).unsqueeze(1) * wx
    return rows.view(-1, attn.shape[-1]), weights.view(-1, attn.shape[-1]), samples


def counted_corners(locations: Tensor, levels: Levels) -> Tensor:
    """Which corners count, [2 (y), 2 (x), B, Q, M, K]: pixels of the level, of samples that are taken."""
    position = locations.movedim(-1, 0) * levels.size - 0.5
    taken = ((position > -1) & (position < levels.size)).all(0)
    neighbour = position.floor() + levels.steps
    x, y = ((neighbour >= levels.first) & (neighbour <= levels.last)).unbind(1)
    return y.unsqueeze(1) & x & taken


@functools.lru_cache(maxsize=16)
@untouched
def _offsets(bags: int, per_bag: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(0, bags * per_bag, per_bag, dtype=dtype, device="cpu")


def sum_bags(rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The weighted sum of the rows of each bag: [bags, D] for rows and weights [bags, K]."""
    # F.embedding_bag checks its arguments for as long as a small call takes
    offsets = _offsets(*rows.shape, rows.dtype)
    return torch.embedding_bag(table, rows.view(-1), offsets, False, 0, False, weights.view(-1))[0]


def dense_gradients(
    rows: Tensor, weights: Tensor, grad: Tensor, value: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As `sorted_gradients`; rows count the entries of a matrix [B, M, Q, T] for T tokens, which fits into memory."""
    B, T, M, D = value.shape
    Q = grad.shape[1]
    grad = grad.transpose(1, 2).reshape(B * M, Q, D)
    rows = rows.flatten()
    grad_value = products = None
    if needs[0]:
        matrix = grad.new_zeros(B * M * Q * T).scatter_add_(0, rows.long(), weights.flatten())
        grad_value = torch.bmm(matrix.view(B * M, Q, T).transpose(1, 2), grad).view(B, M, T, D).transpose(1, 2)
    if needs[1] or needs[2]:
        table = value.transpose(1, 2).reshape(B * M, T, D)
        products = torch.bmm(grad, table.transpose(1, 2)).flatten().index_select(0, rows)
    return grad_value, products


def sorted_gradients(
    rows: Tensor, weights: Tensor, grad: Tensor, table: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the table [rows, D], and the products of grad [B, Q, M, D] with the rows of all bags in their order.

    Rows and weights as from `corner_bags`.
    """
    grad = grad.expand(4, -1, -1, -1, -1).reshape(-1, table.shape[1])
    grad_table = products = None
    if needs[0]:
        grad_table = _sum_transposed_bags(rows, weights, grad, len(table))
    if needs[1] or needs[2]:
        products = _products(rows, grad, table)
    return grad_table, products


def _sum_transposed_bags(rows: Tensor, weights: Tensor, grad_bags: Tensor, table_rows: int) -> Tensor:
    """Gradient of the table, [table_rows, D]: its rows are the bags now, so that no two threads add to one of them."""
    rows, order = rows.flatten().sort(stable=True)
    offsets = torch._convert_indices_from_coo_to_csr(rows, table_rows)
    bag = order // weights.shape[1]
    weights = weights.flatten().index_select(0, order)
    return F.embedding_bag(bag, grad_bags, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


@functools.cache
def _accept_beta() -> None:
    # torch says once per process that CSR tensors are beta; users of this operator cannot do anything about that
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        torch.empty(0, 0, layout=torch.sparse_csr, device="cpu")


def _products(rows: Tensor, grad_bags: Tensor, table: Tensor) -> Tensor:
    """The sum over channels of grad_bags[i] * table[rows[i, j]] for every entry of rows in order."""
    _accept_beta()
    bags, per_bag = rows.shape
    ends = torch.arange(0, bags * per_bag + 1, per_bag, dtype=rows.dtype, device=rows.device)
    products = table.new_zeros(bags * per_bag)  # beta = 0 still multiplies what is there, and 0 * NaN is NaN
    wanted = torch.sparse_csr_tensor(ends, rows.flatten(), products, (bags, len(table)), check_invariants=False)
    torch.sparse.sampled_addmm(wanted, grad_bags, table.T, beta=0, out=wanted)  # writes into products
    return products


def sample_gradients(samples: Samples, attn: Tensor, products: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients of locations [B, Q, M, K, 2] and weights [B, Q, M, K] from the products [2 (y), 2 (x), B, Q, M, K]."""
    (wx0, wy0), (wx1, wy1) = samples.weight
    at_x = torch.addcmul(wy0 * products[0], wy1, products[1])  # [2 (x), B, Q, M, K]
    grad_weights = torch.addcmul(wx0 * at_x[0], wx1, at_x[1])
    if samples.slope is None:
        return None, grad_weights
    at_y = torch.addcmul(wx0 * products[:, 0], wx1, products[:, 1])
    low, high = samples.slope
    at_xy = torch.stack((at_x, at_y), 1)
    grad_locations = torch.addcmul(low * at_xy[0], high, at_xy[1]) * attn
    return grad_locations.movedim(0, -1), grad_weights
