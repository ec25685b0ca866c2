"""Time every kernel configuration on this GPU, and print lines for `TABLE` of `msda_triton/kernels/plan.py`.

    python -m benchmarks.tune
    python -m benchmarks.tune --compile 0/8                   # only compile, the first of eight parts: for many cores
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run    # rehearsed on a CPU; its times mean nothing

Workloads, dtypes and location distributions are those of the benchmark; a kind of call gets the configuration whose
slowdown against the best of each case, averaged over its cases, is the least. Writes all times as CSV, each when it is
known. The host knows the sizes of the levels, as in a detector: encoders take their queries in rectangles.
"""

import argparse
import contextlib
import csv
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gate
from benchmarks.bench_op import TIMERS, graph_ms
from benchmarks.run import DRY_WORKLOADS, DTYPES, GPU_WORKLOADS, environment
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS, Inputs, make_inputs
from msda_triton.call import Call
from msda_triton.checks import fused_call, plain_call
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans

CPU = torch.device("cpu")
COLUMNS = ("workload", "distribution", "dtype", "provider", "direction", "kind", "config", "ms")


def calls_of(x: Inputs) -> dict[str, Call]:
    """The calls that are timed, by the name of the provider that makes them."""
    return {
        "triton": plain_call(x.value, x.workload.levels, x.locations, x.weights),
        "triton_fused": fused_call(x.value, x.workload.levels, x.reference_points, x.offsets, x.logits),
    }


def runs_of(call: Call, grad_out: torch.Tensor) -> Iterator[tuple[str, str, str, plans.Plan, Callable]]:
    """(direction, kind of the call, configuration, its plan, what runs it) of every configuration."""
    for direction, configs in plans.CONFIGS.items():
        kind = plans.kind_of(call, direction)
        for name in configs:
            plan = plans.named_plan(name, kind, architecture())
            if direction == "forward":
                run = functools.partial(launch.forward, call, plan)
            else:
                run = functools.partial(launch.backward, grad_out, call, [True, True, True, False], plan)
            yield direction, kind.name, name, plan, run


def time_call(call: Call, grad_out: torch.Tensor, repeat_ms: float) -> Iterator[tuple[str, str, str, float]]:
    """(direction, kind of the call, configuration, ms) of every configuration of both directions.

    Calls of few rows are timed in a CUDA graph: there the host takes longer than the kernels.
    """
    time, times = TIMERS["events"], {}
    if call.value.device.type == "cpu":
        time = TIMERS["wall"]
    elif plans.kind_of(call, "forward").few:
        time = functools.partial(graph_ms, calls=20)
    for direction, kind, name, plan, run in runs_of(call, grad_out):
        if (direction, plan) not in times:  # configurations may become the same
            try:
                times[direction, plan] = time(run, repeat_ms)[0]
            except plans.CANNOT_RUN:
                times[direction, plan] = math.inf
        yield direction, kind, name, times[direction, plan]


def compile_only(kernel, call: Call, arguments: dict, plan: plans.Plan) -> None:
    """In the place of a launch: the kernel gets into Triton's cache on disk."""
    given = arguments | plan.constants
    kernel.warmup(*[given[name] for name in kernel.arg_names], grid=plan.grid(call), **plan.options)


@functools.cache
def architecture() -> str:
    return plans.architecture(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU)


def best_of(rows: list[dict]) -> dict[tuple[str, str], tuple[str, float]]:
    """(direction, kind) to (configuration, its mean slowdown against the best of each case)."""
    times = defaultdict(dict)
    for row in rows:
        case = tuple(row[key] for key in ("workload", "distribution", "dtype", "provider"))
        times[row["direction"], row["kind"], case][row["config"]] = row["ms"]
    slowdowns = defaultdict(lambda: defaultdict(list))
    for (direction, kind, _), by_config in times.items():
        least = min(by_config.values())
        for config, ms in by_config.items():
            slowdowns[direction, kind][config].append(ms / least)
    means = {key: {c: statistics.fmean(s) for c, s in by.items()} for key, by in slowdowns.items()}
    return {key: min(by.items(), key=lambda item: item[1]) for key, by in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all of the benchmark")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: %(default)s"
    )
    parser.add_argument("--repeat", type=float, default=20, help="ms per timing (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--compile", metavar="I/N", help="only compile every N-th kernel from the I-th on")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.dry_run):
        parser.error("expected a GPU, torch finds none")
    if args.dry_run and not plans.INTERPRETED:
        parser.error("--dry-run: expected TRITON_INTERPRET=1 in the environment, which runs kernels on the CPU")
    device = "cpu" if args.dry_run else "cuda"
    workloads = args.workload or (DRY_WORKLOADS if args.dry_run else GPU_WORKLOADS)
    place = environment(device) | {"architecture": architecture()}
    cases = [(w, t, d) for w in workloads for t in args.dtype for d in DISTRIBUTIONS]
    if args.compile:
        part, parts = map(int, args.compile.split("/"))
        number = 0
        for workload, dtype in dict.fromkeys((w, t) for w, t, _ in cases):
            x = make_inputs(WORKLOADS[workload], "local", DTYPES[dtype], device)
            for call in calls_of(x).values():
                for *_, run in runs_of(call, gate.gradient(x)):
                    if number % parts == part:
                        with contextlib.suppress(*plans.CANNOT_RUN):
                            run(run=compile_only)
                    number += 1
        return
    rows, path = [], args.out / f"tune_{architecture()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *place], lineterminator="\n")
        writer.writeheader()
        for workload, dtype, distribution in cases:
            x = make_inputs(WORKLOADS[workload], distribution, DTYPES[dtype], device)
            for provider, call in calls_of(x).items():
                case = workload, distribution, dtype, provider
                for found in time_call(call, gate.gradient(x), args.repeat):
                    rows.append(dict(zip(COLUMNS, (*case, *found), strict=True)))
                    writer.writerow(rows[-1] | place)
                    file.flush()
                    print(*case, *found[:3], f"{found[3]:.4f} ms", flush=True)
    print(f"wrote {path}; for TABLE, with the mean slowdown against the best of each case:")
    for (direction, kind), (config, slowdown) in best_of(rows).items():
        print(f'TABLE["{direction}", "{kind}"]["{architecture()}"] = "{config}"  # {slowdown:.3f}')


if __name__ == "__main__":
    main()
