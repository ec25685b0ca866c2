"""What `test_gpu.py` does on a GPU, as functions of a device, as far as these go elsewhere too.

On a CPU the kernels are interpreted, on small sizes. `gpu_rehearsal.py` launches the calls on a GPU that is not there.
Numbers are made on the CPU, so that they are the same everywhere.
"""

import contextlib
import gc
import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from msda_triton import constants, ms_deform_attn, reference
from msda_triton.call import Call
from msda_triton.checks import fused_call, plain_call
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans
from msda_triton.op import Attention
from tests.attention import gradients, oracle, oracle_gradients

# heads are no power of two: who takes a wrong one is seen. Interpreted programs are slow
BATCH, HEADS = (1, 1) if plans.INTERPRETED else (2, 3)
CHANNELS = 32
_fresh = itertools.count(3)


def fresh_sizes() -> list[tuple[int, int]]:
    """Sizes of three levels that no call has had before."""
    n = next(_fresh)
    return [(n, 5), (3, n + 1), (2, 2)]


def sampled(image, points, B=BATCH, Q=None, M=HEADS, D=CHANNELS, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """value, locations [B, Q, M, K, 2] and weights [B, Q, M, K], by default of a query for each pixel.

    Samples lie up to two pixels past the map, and a tenth of a pixel off all centres: a gradient jumps there, and
    float32 and float64 may see a sample on different sides.
    """
    S = sum(h * w for h, w in image)
    Q = S if Q is None else Q
    value = torch.randn(B, S, M, D, dtype=torch.float64).to(dtype)
    locations = []
    for (H, W), P in zip(image, points, strict=True):
        size = torch.tensor([W, H], dtype=torch.float64)
        left = (torch.rand(B, Q, M, P, 2, dtype=torch.float64) * (size + 3)).floor() - 2
        pixel = left + 0.1 + 0.8 * torch.rand(B, Q, M, P, 2, dtype=torch.float64)
        locations.append((pixel + 0.5) / size.clamp(min=1))
    weights = torch.rand(B, Q, M, sum(points), dtype=torch.float64).softmax(-1).to(dtype)
    return value, torch.cat(locations, 3).float(), weights


def on(device, tensors, gradients: bool = True) -> list[Tensor]:
    """The tensors on a device, as leaves."""
    return [x.to(device).requires_grad_(gradients) for x in tensors]


def exact(value: Tensor, image, locations: Tensor, weights: Tensor, points, starts=None) -> Tensor:
    """The oracle of `attention.py`, level by level, for points and starts of each level."""
    out, k, end = 0.0, 0, 0
    for l, ((H, W), P) in enumerate(zip(image, points, strict=True)):
        first = end if starts is None else starts[l]
        end = first + H * W
        if H * W:
            of_level = locations[:, :, :, None, k : k + P], weights[:, :, :, None, k : k + P]
            out = out + oracle(value[:, first:end], [(H, W)], *of_level)
        k += P
    return out


@contextlib.contextmanager
def deterministic(enabled: bool):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Form(NamedTuple):
    """A way to call, by sizes that the host knows."""

    points: tuple[int, int, int]
    warming: tuple[int, int, int]  # those of the call that compiles the kernels
    queries: int | None = 7  # None: one for each pixel
    backwards: bool = False  # whether the last level is first in memory, and starts say so
    method: str = "default"

    def starts(self, image) -> list[int] | None:
        areas = [h * w for h, w in image]
        return [sum(areas[l + 1 :]) for l in range(len(areas))] if self.backwards else None


FORMS = {
    "rectangles": Form((2, 2, 2), (2, 2, 2), queries=None),
    "lists": Form((1, 2, 4), (4, 1, 2), backwards=True),
    "discrete": Form((2, 2, 2), (2, 2, 2), method="discrete"),
}


class Body:
    """A call, forward or in both directions, as a function of nothing that reads the same tensors each time."""

    def __init__(self, form: Form, both: bool, image, points, device, dtype=torch.float32):
        self.form, self.both, self.image, self.points, self.dtype = form, both, image, points, dtype
        self.inputs = on(device, self.numbers(), both)
        self.grad_out = torch.randn(*self.inputs[1].shape[:2], HEADS * CHANNELS).to(self.inputs[0])

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        return sampled(self.image, self.points, Q=self.form.queries, dtype=self.dtype)

    def renew(self, numbers=None) -> None:
        """Other numbers in the same tensors: those of numbers, or new ones."""
        with torch.no_grad():
            for x, y in zip(self.inputs, numbers or self.numbers(), strict=True):
                x.copy_(y)

    def run(self, backend: str = "triton") -> list[Tensor]:
        starts = self.form.starts(self.image)
        options = {"level_start_index": starts, "num_points": self.points, "method": self.form.method}
        function = lambda value, *rest: ms_deform_attn(value, self.image, *rest, backend=backend, **options)  # noqa: E731
        return gradients(function, self.inputs, self.grad_out) if self.both else [function(*self.inputs)]

    def launch(self) -> list[Tensor]:
        """Both directions by the launchers themselves, where nothing is computed: autograd takes seconds to import."""
        call = plain_call(self.inputs[0], self.image, *self.inputs[1:], self.form.starts(self.image), self.points)
        return [launch.forward(call), *launch.backward(self.grad_out, call, [True, True, True, False])]

    def exact(self) -> list[Tensor]:
        """By the oracle; of "discrete" what a call has that no graph holds."""
        if self.form.method != "default":
            return self.run()
        starts = self.form.starts(self.image)
        function = lambda value, *rest: exact(value, self.image, *rest, self.points, starts)  # noqa: E731
        results = oracle_gradients(function, self.inputs, self.grad_out)
        return results if self.both else results[:1]

    def check(self, got: list[Tensor]) -> None:
        """Of float32."""
        for x, y in zip(got, self.exact(), strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)

    def constants(self) -> set[tuple[int, ...]]:
        """Those that calls of other sizes and points do not leave."""
        numbers = {tuple(n for size in self.image for n in size)}
        return numbers | ({tuple(self.form.starts(self.image)), self.points} if self.form.backwards else set())


class Capture(NamedTuple):
    results: list[Tensor]
    replay: Callable[[], object]
    written: list[tuple[int, ...]]  # the constants that are the graph's


def capture(run: Callable[[], list[Tensor]], device: str) -> Capture:
    """A CUDA graph of run; on a CPU run itself, with constants as if a graph were captured."""
    written, write = [], constants.written_by_kernels

    def spy(values, dtype, device):
        written.append(tuple(constants._numbers(values)))
        return write(values, dtype, torch.device("cpu") if device.type == "meta" else device)

    def of_a_gpu(values, like, dtype=torch.int64):
        return constants.constant(values, torch.empty(0, device="meta"), dtype)

    def replay() -> None:
        for x, y in zip(results, run(), strict=True):
            x.copy_(y)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(constants, "written_by_kernels", spy))
        if device != "cpu":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run()
            return Capture(results, graph.replay, written)
        patches.enter_context(mock.patch.object(constants, "capturing", lambda device: True))
        for module, name in ((launch, "real_constant"), (reference, "constant")):
            patches.enter_context(mock.patch.object(module, name, of_a_gpu))
        results = run()
        return Capture(results, replay, written)


class Large(NamedTuple):
    """A level of H x W and one of 3 x 5, in a layout of value."""

    B: int
    M: int
    H: int
    W: int
    layout: str = "plain"
    gap: int = 0  # elements from an image to the next, of the layout "apart"
    deterministic: bool = False
    dtype: torch.dtype = torch.float16  # bfloat16 counts in words of two, where it can

    def value(self, device) -> Tensor:
        """[B, S, M, D] of zeros; on "meta" without memory."""
        (B, M), S, D, options = self[:2], self.H * self.W + 15, CHANNELS, {"device": device, "dtype": self.dtype}
        if self.layout == "head-major":
            return torch.zeros(B, M, S, D, **options).transpose(1, 2)
        if self.layout == "apart":
            return torch.zeros(self.gap * (B - 1) + S * M * D, **options).as_strided(
                (B, S, M, D), (self.gap, M * D, D, 1)
            )
        return torch.zeros(B, S, M, D, **options)

    def samples(self, Q: int) -> tuple[Tensor, Tensor]:
        """locations and weights that reach the last ROWS - 1 rows of the first level, and all of the second."""
        shape, P = (self.B, Q, self.M), 2
        x = (torch.rand(*shape, P) * (self.W + 1)).floor() - 1
        y = self.H - 1 - (torch.rand(*shape, P) * (ROWS - 1)).floor()
        pixel = torch.stack([x, y], -1).double() + 0.1 + 0.8 * torch.rand(*shape, P, 2).double()
        pixel[:, 0, :, 0] = torch.tensor([self.W - 1.25, self.H - 1.25])  # the level's very last token
        first = (pixel + 0.5) / torch.tensor([self.W, self.H])
        _, second, weights = sampled([(3, 5)], (P,), self.B, Q, self.M)
        weights = (weights / 2)[:, :, :, None].expand(-1, -1, -1, 2, -1)
        return torch.stack([first.float(), second], 3), weights.contiguous()

    def in_window(self, locations: Tensor) -> Tensor:
        """The same places in a first level that has its last ROWS rows only."""
        first, second = locations.unbind(3)
        x, y = first.unbind(-1)
        return torch.stack([torch.stack([x, (y * self.H - (self.H - ROWS)) / ROWS], -1), second], 3)


ROWS = 6
LARGE = {
    "the last image begins past 2^31": Large(5, 8, 1448, 1449),
    "an image is longer": Large(1, 8, 2900, 2900),
    "an image is longer, deterministic": Large(1, 8, 2900, 2900, deterministic=True, dtype=torch.bfloat16),
    "the last head begins past 2^31": Large(1, 8, 3100, 3100, "head-major"),
    "an odd stride": Large(2, 8, 40, 41, "apart", 2**31 + 1, dtype=torch.bfloat16),
}


def most_bytes(run: Callable[[], object]) -> int:
    """Bytes of a GPU that run allocates at most at any time, over what there is before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = run()
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del results
    return most


class Memory(NamedTuple):
    """A direction of a call, and the bytes that it may take."""

    call: Call
    bytes: int
    needs: tuple[bool, bool, bool, bool] | None = None  # None: forward
    deterministic: bool = False

    def by_launch(self, **options) -> Callable[[], object]:
        if self.needs is None:
            return lambda: launch.forward(self.call, **options)
        B, S, M, D = self.call.value.shape
        grad_out, options = self.call.value.new_zeros(B, S, M * D), options | {"deterministic": self.deterministic}
        return lambda: launch.backward(grad_out, self.call, list(self.needs), **options)

    def by_autograd(self) -> Callable[[], object]:
        names = "value", "locations", "weights", "reference_points"
        needs = dict(zip(names, self.needs or [True] * 4, strict=True))
        given = [name for name in names if getattr(self.call, name) is not None]
        leaves = {name: getattr(self.call, name).detach().requires_grad_(needs[name]) for name in given}
        call = self.call.changed(**leaves)
        if self.needs is None:
            return lambda: Attention.apply(*call, "triton")
        out, wanted = Attention.apply(*call, "triton"), [x for x in leaves.values() if x.requires_grad]
        grad_out = torch.zeros_like(out)

        def run():
            with deterministic(self.deterministic):
                return torch.autograd.grad(out, wanted, grad_out, retain_graph=True)

        return run


ENCODER = [(100, 167), (50, 84), (25, 42), (13, 21)]
FEW_BYTES = 2**16  # that nobody counts


def memory_cases(image, B: int, device) -> dict[str, Memory]:
    """Of an encoder with bfloat16 value, weights and offsets and float32 locations: M = 8, D = 32, P = 4."""
    S, M, D, L, P = sum(h * w for h, w in image), 8, 32, len(image), 4
    zeros = lambda *shape, dtype=torch.bfloat16: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
    value, heads = zeros(B, S, M, D), zeros(B, M, S, D).transpose(1, 2)
    weights, locations = zeros(B, S, M, L, P), zeros(B, S, M, L, P, 2, dtype=torch.float32)
    plain, of_heads, single = (plain_call(x, image, locations, weights) for x in (value, heads, value.float()))
    mask, boxes = zeros(B, S, dtype=torch.bool), zeros(B, S, L, 4)
    fused = fused_call(value, image, boxes, locations.bfloat16(), weights, value_mask=mask)

    rows = B * S * M  # of queries, and there is one for each token
    numbers, samples = rows * D, rows * L * P
    out, sums, rounded = 2 * numbers, 4 * numbers, 2 * numbers  # grad_value is summed in float32, and then rounded
    of_weights, of_locations, of_offsets = 2 * samples, 2 * 4 * samples, 2 * 2 * samples
    of_boxes = 4 * rows * L * 4  # of each head in float32, before the heads are added up
    every, not_boxes, not_value = (True, True, True, True), (True, True, True, False), (False, True, True, True)
    only = {i: tuple(i == j for j in range(4)) for i in range(3)}
    return {
        "forward": Memory(plain, out),
        "forward, head-major": Memory(of_heads, out),
        "forward, fused": Memory(fused, out),
        "backward": Memory(plain, sums + rounded + of_locations + of_weights, not_boxes),
        "backward, head-major": Memory(of_heads, sums + rounded + of_locations + of_weights, not_boxes),
        "backward, float32": Memory(single, sums + of_locations + of_weights, not_boxes),
        "backward, value": Memory(plain, sums + rounded, only[0]),
        "backward, locations": Memory(plain, of_locations, only[1]),
        "backward, weights": Memory(plain, of_weights, only[2]),
        # sums in 64 bits, which are divided in float32
        "backward, value, deterministic": Memory(plain, 2 * sums + sums, only[0], deterministic=True),
        "backward, fused": Memory(fused, sums + rounded + of_offsets + of_weights + of_boxes, every),
        "backward, fused, not value": Memory(fused, of_offsets + of_weights + of_boxes + of_boxes // M, not_value),
    }


IMAGES = {
    "lines": [(1, 97), (89, 1), (1, 1)],
    "primes": [(13, 7), (5, 31), (3, 2)],
    "whole rectangles": [(16, 16), (8, 8), (4, 8)],
    "a pixel more": [(17, 9), (9, 17), (33, 8)],
    "no pixels": [(0, 5), (3, 0), (11, 6)],
    "small": [(9, 3), (1, 10), (1, 1)],  # enough for an interpreter
}


class Guards:
    """Within, what `torch.empty` and `new_zeros` give lies between numbers that nobody may change."""

    ROOM = 1 << 16  # on each side

    def __init__(self):
        self.patches, self.guarded = contextlib.ExitStack(), []

    def around(self, x: Tensor) -> Tensor:
        """A copy of x in such memory."""
        memory = torch.full((x.numel() + 2 * self.ROOM,), float("nan"), dtype=x.dtype, device=x.device)
        self.guarded.append(memory)
        return memory[self.ROOM : -self.ROOM].view(x.shape).copy_(x)

    def __enter__(self) -> "Guards":
        empty, zeros = torch.empty, Tensor.new_zeros

        def guarded_empty(*shape, **options):
            x = empty(*shape, **options)
            return self.around(x.fill_(float("nan"))) if x.is_floating_point() else x

        guarded_zeros = lambda *shape, **options: self.around(zeros(*shape, **options))  # noqa: E731
        self.patches.enter_context(mock.patch.object(torch, "empty", guarded_empty))
        self.patches.enter_context(mock.patch.object(Tensor, "new_zeros", guarded_zeros))
        return self

    def __exit__(self, *exception) -> None:
        self.patches.close()

    def check(self, least: int) -> None:
        """At least so many tensors were guarded, and nothing was written around them."""
        assert len(self.guarded) >= least
        for memory in self.guarded:
            assert memory[: self.ROOM].isnan().all() and memory[-self.ROOM :].isnan().all()


def attend(call: Call, direction: str, name: str | None, grad_out: Tensor) -> list[Tensor]:
    """The result, or the gradients of value, locations and weights.

    Args:
        name: of a configuration, for the GPU that is there or for an H100; None takes the table's.
    """
    plan, device = None, call.value.device
    if name is not None:
        architecture = plans.architecture(device) if device.type == "cuda" else "sm_90"
        plan = plans.named_plan(name, plans.kind_of(call, direction), architecture)
    if direction == "forward":
        return [launch.forward(call, plan)]
    return list(launch.backward(grad_out, call, [True, True, True, False], plan)[:3])


def off_by(x: Tensor, numbers: int) -> Tensor:
    """The same numbers, in memory that begins so many numbers behind a multiple of 16 bytes."""
    memory = torch.zeros(x.numel() + 16, dtype=x.dtype, device=x.device)
    return memory[numbers : numbers + x.numel()].view(x.shape).copy_(x)
