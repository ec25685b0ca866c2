"""What only a GPU shows: graphs, memory, more than 2^31 elements, edges of images, launches on streams and devices.

Marked `gpu`, and left out without one. What of it goes on a CPU runs here, interpreted, on small sizes, and in
`gpu_rehearsal.py`, on a GPU that is not there.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from attention import assert_error_budget, gradients, oracle, oracle_gradients
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msda_triton import MSDeformAttn, constants, ms_deform_attn
from msda_triton.checks import plain_call
from msda_triton.kernels import launch
from msda_triton.kernels.plan import CONFIGS
from tests import gpu_bodies as bodies
from tests.gpu_bodies import FORMS, LARGE, Body, fresh_sizes, sampled

ROOT = Path(__file__).parent.parent
gpu = pytest.mark.gpu
NAMES = ("out", "grad_value", "grad_locations", "grad_weights")


def test_on_a_gpu_that_is_not_there():
    """Arguments, grids and streams of the launches."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_rehearsal"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "rehearsed: cold_sizes, large, edges, streams"


# CUDA graphs


@pytest.mark.parametrize("sizes", ["cold", pytest.param("warm", marks=gpu)])
@pytest.mark.parametrize(
    ("form", "both"),
    [
        ("lists", False),
        *(pytest.param(*case, marks=gpu) for case in (("lists", True), ("rectangles", False), ("rectangles", True))),
        ("discrete", False),
    ],
)
def test_cuda_graph(form, both, sizes, device):
    """Captured with sizes, starts and points that no call has had, or after one; then replayed with other numbers.

    Before the replay two thousand other sizes are made, and memory that is free is written over.
    """
    form, image, other = FORMS[form], fresh_sizes(), fresh_sizes()
    constants._kept.clear()  # of other tests
    body = Body(form, both, image, form.points, device)
    compiling = Body(form, both, other, form.warming, device)  # Triton cannot in a capture
    on_a_side_stream(compiling.run, device)
    if sizes == "warm":
        on_a_side_stream(body.run, device)
    kept = set(constants._kept)
    captured = bodies.capture(body.run, device)
    assert set(constants._kept) == kept
    if sizes == "cold":
        assert set(captured.written) >= body.constants()
    else:
        assert captured.written == []

    for n in range(2000):
        constants.constant(((n, 2003),), body.inputs[0])
    garbage = [torch.full((64,), -1, device=device) for _ in range(1000)]
    for _ in range(1 if device == "cpu" else 2):
        body.renew()
        captured.replay()
        body.check([x.clone() for x in captured.results])
    del garbage


def on_a_side_stream(run, device) -> None:
    """As PyTorch wants it before a capture."""
    if device == "cpu":
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


# torch.compile


class Fused(MSDeformAttn):
    """The package's module, with samples that depend on the queries."""

    def __init__(self):
        super().__init__(d_model=32, n_levels=2, n_heads=2, n_points=2)
        nn.init.normal_(self.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.attention_weights.weight, std=0.3)

    @staticmethod
    def inputs(image):
        return [torch.randn(2, 9, 32), torch.rand(2, 9, 2, 2), torch.randn(2, sum(h * w for h, w in image), 32), image]

    def exact(self, query, points, source, image):
        sizes = torch.tensor(image, dtype=query.dtype, device=query.device).flip(-1)
        offsets = self.sampling_offsets(query).unflatten(2, (2, 2, 2, 2))
        locations = points[:, :, None, :, None] + offsets / sizes[:, None]
        weights = self.attention_weights(query).unflatten(2, (2, 4)).softmax(-1).unflatten(3, (2, 2))
        return self.output_proj(oracle(self.value_proj(source).unflatten(2, (2, 16)), image, locations, weights))


class Plain(nn.Module):
    """A model around the plain operator."""

    def __init__(self):
        super().__init__()
        self.value_proj = nn.Linear(32, 32)

    @staticmethod
    def inputs(image):
        _, locations, weights = sampled(image, (2, 2), B=2, Q=9, M=2)
        source = torch.randn(2, sum(h * w for h, w in image), 32)
        return [locations.unflatten(3, (2, 2)), weights.unflatten(3, (2, 2)), source, image]

    def forward(self, locations, weights, source, image):
        value = self.value_proj(source).unflatten(2, (2, 16))
        return ms_deform_attn(value, image, locations, weights)

    def exact(self, locations, weights, source, image):
        return oracle(self.value_proj(source).unflatten(2, (2, 16)), image, locations, weights)


@pytest.mark.parametrize("model", [Fused, Plain])
def test_reduce_overhead(model, device, monkeypatch):
    """Two sizes in turn, forward and backward: compiled twice, then replayed, and nothing goes without a graph."""
    torch._dynamo.reset()
    counters.clear()
    model = model().to(device)
    double = type(model)().to(device).double()
    double.load_state_dict(model.state_dict())
    replays, graphs, replay = [], [], torch.cuda.CUDAGraph.replay

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def counted(graph):
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    on_cpu = {"backend": aot_autograd(fw_compiler=keep, bw_compiler=keep)}
    compiled = torch.compile(model, fullgraph=True, **(on_cpu if device == "cpu" else {"mode": "reduce-overhead"}))
    images = fresh_sizes()[:2], fresh_sizes()[:2]
    for _ in range(2 if device == "cpu" else 6):
        replays.clear()
        for image in images:
            inputs, grad_out = model.inputs(image), torch.randn(2, 9, 32).to(device)
            torch.compiler.cudagraph_mark_step_begin()
            got = step(model, compiled, inputs, grad_out)
            for x, y in zip(got, step(double, double.exact, inputs, grad_out.double()), strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    if device == "cpu":
        assert len(graphs) == 4
        assert not any(node.op == "get_attr" for graph in graphs for node in graph.graph.nodes)  # no constants
    else:
        assert counters["inductor"]["cudagraph_skips"] == counters["inductor"]["cudagraph_partitions"] == 0
        assert len(replays) == 4  # a forward and a backward of each size


def step(model, run, inputs, grad_out) -> list[Tensor]:
    """The result and the gradients of inputs and parameters, in tensors that no graph writes again."""
    inputs = [x.to(grad_out).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    out = run(*inputs)
    leaves = [*(x for x in inputs if isinstance(x, Tensor)), *model.parameters()]
    return [x.clone() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad_out))]


# more than 2^31 elements


@pytest.fixture
def alone():
    """One test at a time has most of the GPU's memory, whatever other processes test."""
    import fcntl

    with open(Path(tempfile.gettempdir()) / "msda_triton_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@gpu
@pytest.mark.parametrize("case", LARGE)
def test_more_than_2_31_elements(case, alone):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    check_large(LARGE[case], 64, "cuda")
    assert torch.cuda.max_memory_allocated() - before < 40e9


@pytest.mark.parametrize("case", list(LARGE)[2:])
def test_fewer_elements(case, device):
    """The same with small levels."""
    case = LARGE[case]
    M = 2 if case.layout == "head-major" else 1
    check_large(case._replace(B=min(case.B, 2), M=M, H=11, W=9, gap=10001), 2, device)


def check_large(case: bodies.Large, Q: int, device) -> None:
    """Result and gradients by the oracle, which has only the last rows; gradients of the others are zeros."""
    tokens = bodies.ROWS * case.W + 15
    value = case.value(device)
    value[:, -tokens:] = torch.randn(case.B, tokens, case.M, bodies.CHANNELS).to(value)
    inputs = [value.requires_grad_(), *bodies.on(device, case.samples(Q))]
    grad_out = torch.randn(case.B, Q, case.M * bodies.CHANNELS).to(value)
    image = [(case.H, case.W), (3, 5)]
    with bodies.deterministic(case.deterministic):
        got = gradients(lambda v, x, a: ms_deform_attn(v, image, x, a, backend="triton"), inputs, grad_out)
    assert not got[1][:, :-tokens].any()
    got[1] = got[1][:, -tokens:]
    seen = [(bodies.ROWS, case.W), (3, 5)]
    exact = oracle_gradients(
        lambda v, x, a: oracle(v, seen, case.in_window(x), a), [value[:, -tokens:], *inputs[1:]], grad_out
    )
    for name, x, y in zip(NAMES, got, exact, strict=True):
        # bfloat16, and coordinates of a few thousand in float32; what is of another place is off by as much as it is
        assert (x.double() - y).abs().max() < 2**-7 * y.abs().max(), name


# memory


@gpu
@pytest.mark.parametrize("by", ["launch", "autograd"])
@pytest.mark.parametrize("case", bodies.memory_cases([(1, 1)], 1, "meta"))
def test_memory(case, by):
    """The results, and sums of value's gradient: no copy of an input, and nothing else of the samples' number."""
    case = bodies.memory_cases(bodies.ENCODER, 2, "cuda")[case]
    run = case.by_launch() if by == "launch" else case.by_autograd()
    run()  # compiles, and leaves the constants
    assert case.bytes <= bodies.most_bytes(run) <= case.bytes + bodies.FEW_BYTES


class Allocations(TorchDispatchMode):
    """Bytes that PyTorch's operations allocate: `most` at any time since the mode was entered."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("case", bodies.memory_cases([(1, 1)], 1, "meta"))
def test_memory_of_a_cpu(case):
    """The same bytes where nothing is launched."""
    case = bodies.memory_cases([(30, 50), (15, 25)], 2, "cpu")[case]
    run = case.by_launch(run=lambda *launch: None)
    with Allocations() as seen:
        run()
    assert case.bytes <= seen.most <= case.bytes + bodies.FEW_BYTES


# edges


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=gpu)], ids=str)
@pytest.mark.parametrize(
    ("direction", "name"),
    [
        (direction, name) if name == "many" else pytest.param(direction, name, marks=gpu)
        for direction in CONFIGS
        for name in (None, *CONFIGS[direction])
    ],
)
def test_edges(direction, name, dtype, device):
    """Levels that are no multiple of a rectangle: every query, and nothing around a tensor is read or written."""
    P = 2 if device == "cpu" else 4
    points = (P, P, P)
    part = slice(0, 1) if direction == "forward" else slice(1, 4)
    for image in bodies.IMAGES.values() if device == "cuda" else [bodies.IMAGES["small"]]:
        body = Body(bodies.Form(points, points, queries=None), True, image, points, device, dtype)
        guards = bodies.Guards()
        value, *samples, grad_out = (guards.around(x.detach()) for x in (*body.inputs, body.grad_out))
        call = plain_call(value, image, *(x.unflatten(3, (3, P)) for x in samples))
        with guards:
            got = bodies.attend(call, direction, name, grad_out)
        guards.check(5 if direction == "forward" else 7)
        exact, rounded = body.exact()[part], body.run("torch")[part]
        got = [x.view(y.shape) for x, y in zip(got, exact, strict=True)]
        assert_error_budget(got, rounded, exact, NAMES[part])


# launches


@pytest.mark.parametrize(
    ("tensor", "off"),
    [(0, 1), *(pytest.param(*case, marks=gpu) for case in ((0, 0), (0, 2), (0, 4), (1, 1), (1, 2), (2, 1), (2, 2)))],
)
def test_a_launch_is_found_again(tensor, off, device):
    """Of value, locations or weights that begin some numbers off a multiple of 16 bytes."""
    points = (2, 2, 2)
    body = Body(bodies.Form(points, points), True, fresh_sizes(), points, device, torch.bfloat16)
    body.inputs[tensor] = bodies.off_by(body.inputs[tensor].detach(), off).requires_grad_()
    kept = []
    for _ in range(1 if device == "cpu" else 3):
        kept.append(len(launch._launches))
        assert_error_budget(body.run(), body.run("torch"), body.exact(), NAMES)
        body.renew()
    if device != "cpu":  # interpreted kernels leave nothing
        assert kept == [kept[0], kept[0] + 2, kept[0] + 2]


@gpu
def test_streams():
    """Kernels wait for what their stream does before, when they are launched the first time and when that is found."""
    form = FORMS["lists"]
    body = Body(form, True, fresh_sizes(), form.points, "cuda")
    side = torch.cuda.Stream()
    for turn in range(3):
        if turn == 1:  # the first one compiles, and takes memory
            launch._launches.clear()
        numbers = bodies.on("cuda", body.numbers(), False)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**9 if turn else 1)  # cycles: half a second
            body.renew(numbers)
            got = body.run()
            asleep = not side.query()
        side.synchronize()
        body.check(got)
        assert asleep or turn == 0
    assert len(launch._launches) == 2


@gpu
def test_every_device_while_the_first_is_the_current_one():
    form = FORMS["lists"]
    for i in [*range(torch.cuda.device_count())] * 2:
        body = Body(form, True, fresh_sizes(), form.points, f"cuda:{i}")
        for _ in range(2):
            with torch.cuda.device(0):
                got = body.run()
                assert torch.cuda.current_device() == 0
            assert {x.device for x in got} == {torch.device("cuda", i)}
            body.check(got)
            body.renew()
