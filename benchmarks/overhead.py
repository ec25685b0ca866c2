"""What a call costs the CPU, beside an older commit's in the same process. Needs no GPU: then nothing is launched.

    python -m benchmarks.overhead                      # against ccff825, the last commit before a launch was cached
    python -m benchmarks.overhead --against HEAD~3     # or any commit that has `msda_triton/functional.py`
    python -m benchmarks.overhead --profile "forward"  # where the time of one row goes

Without a GPU Triton compiles for one that `fake_gpu.py` makes it believe in, and tensors live on the CPU. They are
small, as PyTorch's own work on them (a backward's zeros and conversions) must not hide the calls; a GPU's allocations
cost about as much. The time is that of the thread, the least of several rounds in which old and new take turns. The
driver's launch is counted on a GPU only: there a call takes as long as it takes to queue it.
"""

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType

import torch
import triton

from benchmarks import fake_gpu
from benchmarks.workloads import WORKLOADS, Inputs, make_inputs

ROOT = Path(__file__).parent.parent
# a decoder's call, with few tokens and queries
WORKLOAD = replace(WORKLOADS["decoder"], levels=((2, 2), (1, 1), (1, 1), (1, 1)), Q=30)


def package_at(commit: str, folder: Path, name: str) -> ModuleType:
    """The package of a commit, as a module of another name beside this one's."""
    archive = subprocess.run(["git", "archive", commit, "msda_triton"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "msda_triton").rename(folder / name)
    for path in (folder / name).rglob("*.py"):
        path.write_text(re.sub(r"\bmsda_triton\b", name, path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def calls_of(package: ModuleType, x: Inputs) -> dict[str, Callable[[], object]]:
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

    out = plain(sizes, None, *leaves)
    fused_out = fused_call(*fused)
    return {
        "forward": without_grad(lambda *t: plain(sizes, None, *t), *leaves),
        "forward, sizes on the device": without_grad(lambda *t: plain(x.shapes, x.starts, *t), *leaves),
        "forward, fused": without_grad(fused_call, *fused),
        "forward, with grad": lambda: plain(sizes, None, *leaves),
        "forward, fused, with grad": lambda: fused_call(*fused),
        "autograd.grad": lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True),
        "autograd.grad, fused": lambda: torch.autograd.grad(fused_out, fused, grad_out, retain_graph=True),
    }


def least(calls: list[Callable[[], object]], rounds: int = 40, repeat: int = 60) -> list[float]:
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


def parts_of_a_call(x: Inputs) -> dict[str, Callable[[], object]]:
    """What PyTorch alone takes for what every call needs, whoever makes it."""

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, locations, weights):
            ctx.save_for_backward(value, locations, weights)
            return value.new_empty(2, 30, 256)

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors

    leaves = [t.detach().clone().requires_grad_() for t in (x.value, x.locations, x.weights)]
    out = Empty.apply(*leaves)
    grad = torch.empty_like(out)
    return {
        "torch.empty": lambda: torch.empty(2, 30, 256, dtype=x.value.dtype, device=x.value.device),
        "an empty autograd function": lambda: Empty.apply(*leaves),
        "its autograd.grad": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }


def profile(call: Callable[[], object]) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as found:
        for _ in range(2000):
            call()
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="ccff825", metavar="COMMIT", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument("--profile", metavar="ROW", help="also print where its time goes")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels are not launched: expected TRITON_INTERPRET=0 or unset, got 1")
    torch.set_num_threads(1)
    import msda_triton

    with tempfile.TemporaryDirectory() as folder:
        before = package_at(args.against, Path(folder), "msda_before")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            fake_gpu.install("msda_before", fake_gpu.install("msda_triton"))
        x = make_inputs(WORKLOAD, "local", getattr(torch, args.dtype), device)
        old, new = calls_of(before, x), calls_of(msda_triton, x)
        place = "launch stubbed" if device == "cpu" else torch.cuda.get_device_name()
        machine = platform.processor() or platform.machine()
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
        print(f"us of CPU time, {place}, {args.dtype}; {machine}, {versions}")
        print(f"{'':32}{args.against:>10}{'now':>10}{'ratio':>8}")
        for name in old:
            a, b = least([old[name], new[name]])
            print(f"{name:32}{a:10.1f}{b:10.1f}{b / a:8.2f}", flush=True)
        for name, call in parts_of_a_call(x).items():
            print(f"{name:32}{'':10}{least([call])[0]:10.1f}", flush=True)
        if args.profile:
            profile(new[args.profile])


if __name__ == "__main__":
    main()
