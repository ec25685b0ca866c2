"""What a call costs the host, part by part; beside an older commit's in the same process if one is named.

    python -m benchmarks.overhead                            # this working tree, with or without a GPU
    python -m benchmarks.overhead --against ccff825          # the last commit before a launch was cached
    python -m benchmarks.overhead --against /tmp/old         # or a folder that has msda_triton, without git
    python -m benchmarks.overhead --out overhead.csv         # also writes each row, when it is known
    python -m benchmarks.overhead --profile "forward"        # where the time of one row goes

Without a GPU Triton compiles for one that `fake_gpu.py` makes it believe in, nothing is launched, and tensors live on
the CPU. First comes the time of the calling thread ("thread"), the least of several rounds in which old and new take
turns. The tensors are small there, as PyTorch's own work on them (a backward's zeros and conversions) must not hide the
calls; a GPU's allocations cost about as much. The driver's launch is counted on a GPU only: there a call takes as long
as it takes to queue it.

Then comes the median wall time of back-to-back calls of a real decoder on a GPU ("wall"; the small tensors without
one). A backward on a GPU runs in a thread of autograd's, which "thread" does not see and "wall" does.

The rows of wall time ask where forward and backward together lose against their sum:

- "together, its forward" and "its autograd.grad" split one loop: the part that grew is the one that loses.
- "graph freed by the caller", "no second thread" and "no garbage collection" each leave out one suspect: autograd's
  thread frees the graph, it is handed the work, Python's collector runs.
- "kernels together" has no autograd. The empty function has nothing else: what it loses is PyTorch's.
- zeros and conversion are the two passes over value's gradient that are no kernel of ours.
- "graph replay" is the same work with the host left out.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

import msda_triton
from benchmarks import against, fake_gpu
from benchmarks.bench_op import capturable, captured, failed, wall_ms
from benchmarks.gate import differentiable, gradient
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.report import RowFile
from benchmarks.run import commit_of, environment
from benchmarks.workloads import WORKLOADS, Inputs, make_inputs
from msda_triton.checks import plain_call
from msda_triton.kernels import launch

# a decoder's call, with few tokens and queries
WORKLOAD = replace(WORKLOADS["decoder"], levels=((2, 2), (1, 1), (1, 1), (1, 1)), Q=30)
COLUMNS = ("timer", "name", "dtype", "before_us", "now_us", "ratio", "status")
Call = Callable[[], object]


def package_at(commit: str, folder: Path, name: str) -> ModuleType:
    """The package of a commit, or of a folder that has it, as a module of another name beside this one's."""
    (against.package_of(commit, folder) / "msda_triton").rename(folder / name)
    for path in (folder / name).rglob("*.py"):
        path.write_text(re.sub(r"\bmsda_triton\b", name, path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def calls_of(package: ModuleType, x: Inputs) -> dict[str, Call]:
    """The calls that are timed, by name."""
    sizes = [tuple(size) for size in x.workload.levels]
    leaves = [t.detach().clone().requires_grad_() for t in (x.value, x.locations, x.weights)]
    fused = [t.detach().clone().requires_grad_() for t in (x.value, x.offsets, x.logits)]
    grad_out = torch.randn(x.workload.B, x.workload.Q, x.workload.M * x.workload.D).to(x.value)

    def plain(shapes, starts, value, locations, weights):
        return package.ms_deform_attn(value, shapes, locations, weights, level_start_index=starts, backend="triton")

    def fused_call(value, offsets, logits):
        return package.ms_deform_attn_fused(value, sizes, x.reference_points, offsets, logits, backend="triton")

    def without_grad(call, *inputs):
        inputs = [t.detach() for t in inputs]

        def run():
            with torch.no_grad():
                return call(*inputs)

        return run

    out = functools.cache(lambda: plain(sizes, None, *leaves))  # made where an error becomes a row
    fused_out = functools.cache(lambda: fused_call(*fused))
    return {
        "forward": without_grad(lambda *t: plain(sizes, None, *t), *leaves),
        "forward, sizes on the device": without_grad(lambda *t: plain(x.shapes, x.starts, *t), *leaves),
        "forward, fused": without_grad(fused_call, *fused),
        "forward, with grad": lambda: plain(sizes, None, *leaves),
        "forward, fused, with grad": lambda: fused_call(*fused),
        "autograd.grad": lambda: torch.autograd.grad(out(), leaves, grad_out, retain_graph=True),
        "autograd.grad, fused": lambda: torch.autograd.grad(fused_out(), fused, grad_out, retain_graph=True),
    }


def least(calls: list[Call], rounds: int = 40, repeat: int = 60) -> list[float]:
    """Thread time in us of one run of each, the least of the rounds in which they take turns."""
    for call in calls:
        for _ in range(20):
            call()
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # an empty queue: else one that is full would be waited for
            start = time.thread_time()
            for _ in range(repeat):
                call()
            found.append((time.thread_time() - start) / repeat * 1e6)
    return [min(found) for found in times]


class Empty(torch.autograd.Function):
    """What PyTorch takes for any function of three tensors with gradients."""

    @staticmethod
    def forward(ctx, size, *leaves):
        ctx.save_for_backward(*leaves)
        return leaves[0].new_empty(size)

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.saved_tensors


def empty_function(x: Inputs) -> torch.Tensor:
    size = x.workload.B, x.workload.Q, x.workload.M * x.workload.D
    return Empty.apply(size, x.value, x.locations, x.weights)


def parts_of_a_call(x: Inputs) -> dict[str, Call]:
    """What PyTorch alone takes for what every call needs, whoever makes it."""
    leaves = differentiable(x, ("value", "locations", "weights"))
    wanted, out = (leaves.value, leaves.locations, leaves.weights), empty_function(leaves)
    grad = torch.empty_like(out)
    return {
        "torch.empty": lambda: torch.empty(out.shape, dtype=x.value.dtype, device=x.value.device),
        "an empty autograd function": lambda: empty_function(leaves),
        "its autograd.grad": lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True),
    }


def wall_rows(x: Inputs) -> Iterator[tuple[str, Call]]:
    """Names, and what gives the wall time in us."""
    forms = {
        "triton": PROVIDERS["triton"],
        "triton_fused": PROVIDERS["triton_fused"],
        "empty": Provider(empty_function),
    }
    for name, provider in forms.items():
        leaves, grad = differentiable(x, provider.leaves), gradient(x)
        wanted = [getattr(leaves, leaf) for leaf in provider.leaves]
        forward = functools.partial(provider.function, leaves)
        backward = functools.partial(torch.autograd.grad, inputs=wanted, grad_outputs=grad)
        yield from loop_rows(name, forward, backward)
    call, grad, needs = (
        plain_call(x.value, x.workload.levels, x.locations, x.weights),
        gradient(x),
        [True] * 3 + [False],
    )
    kernels = functools.partial(launch.forward, call), functools.partial(launch.backward, grad, call, needs)
    yield "launch.forward", lambda: wall_us(kernels[0])
    yield "launch.backward", lambda: wall_us(kernels[1])
    yield "kernels together", lambda: wall_us(lambda: (kernels[0](), kernels[1]()))
    zeros = x.value.new_zeros(x.value.shape, dtype=torch.float32)
    yield "zeros of grad_value", lambda: wall_us(lambda: torch.zeros_like(zeros))
    yield "conversion of grad_value", lambda: wall_us(lambda: zeros.to(x.value.dtype))
    if x.value.device.type != "cpu":
        for mode in ("fwd", "bwd", "fwd+bwd"):
            yield f"graph replay, {mode}", lambda mode=mode: wall_us(captured(capturable("triton", x)[mode]).replay)


def loop_rows(name: str, forward: Call, backward: Callable[..., object]) -> Iterator[tuple[str, Call]]:
    """The same of a forward with gradients, its backward, and both."""

    def without_grad() -> object:
        with torch.no_grad():
            return forward()

    def together() -> object:
        return backward(forward())

    def retained() -> object:
        return backward(forward(), retain_graph=True)

    def within(context) -> float:
        with context:
            return wall_us(together)

    yield f"{name}: forward without grad", lambda: wall_us(without_grad)
    yield f"{name}: forward", lambda: wall_us(forward)
    yield f"{name}: autograd.grad", lambda: wall_us(functools.partial(backward, forward(), retain_graph=True))
    yield f"{name}: together", lambda: wall_us(together)
    yield f"{name}: together, its forward", lambda: split_us(forward, backward)[0]
    yield f"{name}: together, its autograd.grad", lambda: split_us(forward, backward)[1]
    yield f"{name}: together, graph freed by the caller", lambda: wall_us(retained)
    alone = torch.autograd.set_multithreading_enabled
    yield f"{name}: together, no second thread", lambda: within(alone(False))
    yield f"{name}: together, no garbage collection", lambda: within(_no_collection())


def wall_us(call: Call) -> float:
    return wall_ms(call, 100)[0] * 1e3


def split_us(forward: Call, backward: Callable[[object], object], rounds: int = 400) -> tuple[float, float]:
    """Median wall times of the parts of a loop of both."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        backward(out)
        del out  # what frees the graph counts as the backward's
        times.append((middle - start, time.perf_counter() - middle))
    return tuple(statistics.median(part) * 1e6 for part in zip(*times, strict=True))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def profile(call: Call) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as found:
        for _ in range(2000):
            call()
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a commit, or a folder that has msda_triton")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write the rows there")
    parser.add_argument("--limit", type=float, default=120, help="s after which no row starts (default: %(default)s)")
    parser.add_argument("--profile", metavar="ROW", help="also print where its time goes")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels are not launched: expected TRITON_INTERPRET=0 or unset, got 1")
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    with tempfile.TemporaryDirectory() as folder:
        packages = [msda_triton]
        if args.against is not None:
            try:
                packages.insert(0, package_at(args.against, Path(folder), "msda_before"))
            except ValueError as error:
                parser.error(f"--against: {error}")
        if not on_gpu:
            fake = None
            for package in packages:
                fake = fake_gpu.install(package.__name__, fake)
        small = make_inputs(WORKLOAD, "local", getattr(torch, args.dtype), device)
        found = [calls_of(package, small) for package in packages]
        if args.profile is not None and args.profile not in found[-1]:
            parser.error(f"--profile: expected one of {'; '.join(found[-1])}, got {args.profile!r}")
        place = environment(device) | {
            "before": (args.against and commit_of(args.against)) or "",
            "launch": "real" if on_gpu else "stubbed",
        }
        file = None if args.out is None else RowFile(args.out, COLUMNS, place)
        print(", ".join(f"{key} {value}" for key, value in place.items() if value))
        print(f"{'us':55}{'before' if args.against else '':>10}{'now':>10}{'ratio':>8}")

        rows = [("thread", name, functools.partial(least, [calls[name] for calls in found])) for name in found[-1]]
        rows += [("thread", name, functools.partial(least, [call])) for name, call in parts_of_a_call(small).items()]
        real = make_inputs(WORKLOADS["decoder"], "local", small.value.dtype, device) if on_gpu else small
        rows += [("wall", name, lambda measure=measure: [measure()]) for name, measure in wall_rows(real)]
        for timer, name, measure in rows:
            if time.monotonic() > end:
                print(f"--limit of {args.limit:g} s reached: {name} and what follows are left out")
                break
            row = {"timer": timer, "name": name, "dtype": args.dtype, "status": "ok"}
            try:
                *before, row["now_us"] = measure()
                if before:
                    row |= {"before_us": before[0], "ratio": row["now_us"] / before[0]}
                numbers = f"{row.get('before_us', ''):10.5}{row['now_us']:10.1f}{row.get('ratio', ''):8.3}"
            except Exception as error:
                row["status"] = numbers = failed(error)
            print(f"{timer:8}{name:47}{numbers}", flush=True)
            if file is not None:
                file.write(row)
        if args.profile is not None:
            profile(found[-1][args.profile])


if __name__ == "__main__":
    main()
