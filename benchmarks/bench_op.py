"""Time the operator: forward, backward and both, for one workload, distribution and dtype.

On a GPU every call is timed by device events. A small call is timed in two more ways, as its events are neither the
kernel's time nor a loop's: "wall" is what an eager loop takes, where the host may be slower than the device, and
"graph" is the kernels' time, without the host. Of a large call these say the same as events. Small is a call whose
result has fewer than 2^22 channels.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import gate
from benchmarks.providers import BASELINE, PROVIDERS, Provider
from benchmarks.workloads import Inputs, Workload, make_inputs

_SMALL = 1 << 22  # channels of the result: below, the host may take longer than the device
_BLOCK = 50  # calls between two looks at the host clock on a GPU

# GB/s of device memory and GHz at boost, from the datasheets, for the bound in `bound_ms`
_CARDS = {"H100": (3350, 1.755), "H200": (4800, 1.755)}


@dataclass
class Row:
    """One line of the CSV; times in milliseconds. Empty means not measured or not known, never zero."""

    workload: str
    distribution: str
    provider: str
    mode: str  # "fwd" without gradients, "bwd", "fwd+bwd"
    dtype: str
    # "events": device events, cold L2; "graph": replays of a CUDA graph, warm L2; "wall": host clock of back-to-back
    # eager calls, on a GPU from an empty queue to an empty queue: the longer of the host's and the device's time
    timer: str = ""
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_mib: float | None = None  # allocated during the call, results included, inputs not; GPU only
    ratio: float | None = None  # baseline's p50 / p50: above 1 is faster than the baseline
    bound_fraction: float | None = None  # bound / p50, forward only
    status: str = "ok"  # or why there is no time


def bench(
    workload: Workload, distribution: str, dtype: torch.dtype, device: str, providers: list[str], repeat_ms: float
) -> Iterator[Row]:
    """Rows of every provider. The baseline must be the first of `providers`: ratios refer to it."""
    if providers[0] != BASELINE:
        raise ValueError(f"providers: expected {BASELINE} first, got {providers[0]}")
    case = Case(workload, distribution, dtype, device)
    baseline: dict[tuple[str, str], float] = {}
    for name in providers:
        for row in case.rows(name, repeat_ms):
            if name == BASELINE and row.status == "ok":
                baseline[row.mode, row.timer] = row.p50_ms
            if row.status == "ok" and (row.mode, row.timer) in baseline:
                row.ratio = baseline[row.mode, row.timer] / row.p50_ms
            yield row


@dataclass
class Case:
    """What the providers are given; the inputs and the oracle's results are made once."""

    workload: Workload
    distribution: str
    dtype: torch.dtype
    device: str

    @functools.cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.workload, self.distribution, self.dtype, self.device)

    @functools.cached_property
    def _exact(self) -> dict[tuple[str, ...], dict]:
        return {}

    def rows(self, name: str, repeat_ms: float, turns: int = 1) -> Iterator[Row]:
        """Rows of one provider, gate first; of each mode and timer as many as there are turns.

        What raises is a row with its reason, whatever it raises.
        """

        def row(mode: str = "", **fields) -> Row:
            dtype = str(self.dtype).removeprefix("torch.")
            return Row(self.workload.name, self.distribution, name, mode, dtype, **fields)

        provider = PROVIDERS[name]
        try:
            x = self.inputs
            if provider.leaves not in self._exact:
                self._exact[provider.leaves] = gate.oracle(x, provider.leaves)
            wrong = gate.check(provider, x, self._exact[provider.leaves])
            modes = {} if wrong else calls(name, x)
        except Exception as error:
            yield row(status=failed(error))
            return
        if wrong:
            yield row(status=f"wrong: {wrong}")
        for mode, call in modes.items():
            for timer in timers(provider, mode, self.workload, self.device):
                for _ in range(turns):
                    try:
                        yield row(mode, timer=timer, **_measure(name, x, mode, call, timer, repeat_ms))
                    except Exception as error:
                        yield row(mode, timer=timer, status=failed(error))


def _measure(name: str, x: Inputs, mode: str, call: Callable[[], object], timer: str, repeat_ms: float) -> dict:
    """Fields of a row."""
    if timer == "graph":
        call = capturable(name, x)[mode]
    p50, p20, p80 = TIMERS[timer](call, repeat_ms)
    fields = {"p50_ms": p50, "p20_ms": p20, "p80_ms": p80}
    if timer == "events":
        fields["peak_mib"] = peak_mib(call)
        if mode == "fwd":  # a bound of a cold cache
            fields["bound_fraction"] = _fraction(x, p50)
    return fields


def failed(error: Exception) -> str:
    """The status of a row, of one line."""
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def timers(provider: Provider, mode: str, workload: Workload, device: str) -> list[str]:
    """The ways in which a call is timed; see above."""
    if device == "cpu":
        return ["wall"]
    if workload.B * workload.Q * workload.M * workload.D >= _SMALL:
        return ["events"]
    return ["events", "wall", "graph"] if provider.graph else ["events", "wall"]


def calls(name: str, x: Inputs) -> dict[str, Callable[[], object]]:
    """What is timed in each mode. "bwd" goes through one retained graph; all three gradients are asked for."""
    provider = PROVIDERS[name]
    leaves, grad_out = gate.differentiable(x, provider.leaves), gate.gradient(x)
    wanted = [getattr(leaves, leaf) for leaf in provider.leaves]
    out = provider.function(leaves)

    def forward():
        with torch.no_grad():
            return provider.function(x)

    modes = {
        "fwd": forward,
        "bwd": lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True),
        "fwd+bwd": lambda: torch.autograd.grad(provider.function(leaves), wanted, grad_out),
    }
    if not provider.keeps_graph:
        del modes["bwd"]
    return modes


def wall_ms(call: Callable[[], object], repeat_ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the host clock per call, over at least 3 blocks, after 1 to warm up.

    On a CPU a block is one call. On a GPU it is many back to back, with the queue drained before and after.
    """
    on_gpu = torch.cuda.is_initialized()
    calls, drain = (_BLOCK, torch.cuda.synchronize) if on_gpu else (1, lambda: None)
    times = []
    end = math.inf
    while len(times) < 4 or time.perf_counter() < end:
        drain()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        drain()
        times.append((time.perf_counter() - start) * 1e3 / calls)
        if len(times) == 1:
            end = time.perf_counter() + repeat_ms / 1e3
    return _percentiles(times[1:])


def events_ms(call: Callable[[], object], repeat_ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile between device events, the L2 cache cleared before each call."""
    from triton.testing import do_bench

    return tuple(do_bench(call, warmup=repeat_ms / 4, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8]))


def graph_ms(call: Callable[[], object], repeat_ms: float, calls: int = 100) -> tuple[float, float, float]:
    """The same of a CUDA graph of several calls, per call: no launch gaps, and a warm L2 cache."""
    graph, stream = captured(call, calls), capture_stream()
    with torch.cuda.stream(stream):
        graph.replay()
        times, end = [], time.perf_counter() + repeat_ms / 1e3
        while len(times) < 5 or time.perf_counter() < end:
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            done.record()
            stream.synchronize()
            times.append(begin.elapsed_time(done) / calls)
    return _percentiles(times)


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The stream of all captures."""
    return torch.cuda.Stream()


def capturable(name: str, x: Inputs) -> dict[str, Callable[[], object]]:
    """`calls` on the stream of captures, as a backward runs on the stream of its forward."""
    capture_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture_stream()):
        return calls(name, x)


def captured(call: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after one to warm up."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
    return graph


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    p20, p80 = statistics.quantiles(times, n=5, method="inclusive")[::3]
    return statistics.median(times), p20, p80


TIMERS = {"wall": wall_ms, "events": events_ms, "graph": graph_ms}


def peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _fraction(x: Inputs, p50: float) -> float | None:
    properties = torch.cuda.get_device_properties(x.value.device)
    bound = bound_ms(x, properties.name, properties.multi_processor_count)
    return None if bound is None else bound / p50


def bound_ms(x: Inputs, card: str, multiprocessors: int) -> float | None:
    """The least time that the forward can take on the card, None for cards without figures here.

    The larger of two: every byte of inputs and output once through device memory; every corner of every sample once
    through the L1 caches, 128 bytes per multiprocessor and clock.
    """
    figures = next((figures for name, figures in _CARDS.items() if name in card), None)
    if figures is None:
        return None
    gb_per_s, ghz = figures
    out_bytes = x.workload.Q * x.value[:, 0].nbytes
    memory_bytes = x.value.nbytes + x.locations.nbytes + x.weights.nbytes + out_bytes
    corner_bytes = 4 * x.weights.numel() * x.workload.D * x.value.element_size()
    return max(memory_bytes / gb_per_s, corner_bytes / (multiprocessors * 128 * ghz)) / 1e6
