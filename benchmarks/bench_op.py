"""Time the operator: forward, backward and both, for one workload, distribution and dtype."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import gate
from benchmarks.providers import BASELINE, PROVIDERS, Provider
from benchmarks.workloads import Inputs, Workload, make_inputs

_SMALL = 1 << 22  # channels of the result: below, a launch may cost more than the kernel

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
    timer: str = ""  # "wall": host clock; "events": device events, cold L2; "graph": replays of a CUDA graph, warm L2
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
    """Rows of every provider, gate first. The baseline must be the first of `providers`: ratios refer to it."""
    if providers[0] != BASELINE:
        raise ValueError(f"providers: expected {BASELINE} first, got {providers[0]}")
    x = make_inputs(workload, distribution, dtype, device)
    exact: dict[tuple[str, ...], dict] = {}
    baseline: dict[tuple[str, str], float] = {}
    for name in providers:
        provider = PROVIDERS[name]
        case = (workload.name, distribution, name)
        dtype_name = str(dtype).removeprefix("torch.")
        mode = ""
        try:
            if provider.leaves not in exact:
                exact[provider.leaves] = gate.oracle(x, provider.leaves)
            wrong = gate.check(provider, x, exact[provider.leaves])
            if wrong:
                yield Row(*case, mode, dtype_name, status=f"wrong: {wrong}")
                continue
            for mode, call in calls(name, x).items():
                for timer in timers(provider, mode, workload, device):
                    p50, p20, p80 = TIMERS[timer](call, repeat_ms)
                    if name == BASELINE:
                        baseline[mode, timer] = p50
                    row = Row(*case, mode, dtype_name, timer, p50, p20, p80)
                    if (mode, timer) in baseline:
                        row.ratio = baseline[mode, timer] / p50
                    if timer == "events":
                        row.peak_mib = peak_mib(call)
                    if mode == "fwd" and timer == "events":  # a bound of a cold cache
                        row.bound_fraction = _fraction(x, p50)
                    yield row
        except (ValueError, TypeError, RuntimeError) as error:  # out of memory is a RuntimeError, not implemented too
            reason = str(error).strip().partition("\n")[0]
            yield Row(*case, mode, dtype_name, status=f"failed: {type(error).__name__}: {reason}")


def timers(provider: Provider, mode: str, workload: Workload, device: str) -> list[str]:
    if device == "cpu":
        return ["wall"]
    small = workload.B * workload.Q * workload.M * workload.D < _SMALL
    return ["events", "graph"] if provider.graph and mode == "fwd" and small else ["events"]


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
    """Median, 20th and 80th percentile of the host clock over at least 3 calls, after 1 to warm up."""
    times = []
    call()
    end = time.perf_counter() + repeat_ms / 1e3
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    p20, p80 = statistics.quantiles(times, n=5, method="inclusive")[::3]
    return statistics.median(times), p20, p80


def events_ms(call: Callable[[], object], repeat_ms: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile between device events, the L2 cache cleared before each call."""
    from triton.testing import do_bench

    return tuple(do_bench(call, warmup=repeat_ms / 4, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8]))


def graph_ms(call: Callable[[], object], repeat_ms: float, calls: int = 100) -> tuple[float, float, float]:
    """The same of a CUDA graph of several calls, per call: no launch gaps, and a warm L2 cache."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                call()
        graph.replay()
        times, end = [], time.perf_counter() + repeat_ms / 1e3
        while len(times) < 5 or time.perf_counter() < end:
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            done.record()
            side.synchronize()
            times.append(begin.elapsed_time(done) / calls)
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
