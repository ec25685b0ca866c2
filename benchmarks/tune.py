"""Time every kernel configuration on this GPU, beside the one of `TABLE` in `msda_triton/kernels/plan.py`.

    python -m benchmarks.tune
    python -m benchmarks.tune --python table.py               # also writes lines for TABLE, where a winner gains 2 %
    python -m benchmarks.tune --compile 0/8                   # only compile, the first of eight parts: for many cores
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run    # rehearsed on a CPU; its times mean nothing

Workloads, dtypes and location distributions are those of the benchmark. Plans are compared as by `set_autotune`: one
whose results are not those of the table's plan gets no time. Calls of few rows are timed in a CUDA graph. A kind of
call gets the configuration whose slowdown against the best of each case, averaged over its cases, is the least. Writes
all times as CSV, each when it is known. The host knows the sizes of the levels, as in a detector: so configurations of
rectangles have them.
"""

import argparse
import contextlib
import csv
import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gate
from benchmarks.bench_op import TIMERS, graph_ms
from benchmarks.rehearsal import add_dry_run, device_of, make_folder
from benchmarks.run import DRY_WORKLOADS, DTYPES, GPU_WORKLOADS, environment
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS, Inputs, make_inputs
from msda_triton.call import Call
from msda_triton.checks import fused_call, plain_call
from msda_triton.kernels import launch, tuning
from msda_triton.kernels import plan as plans

CPU = torch.device("cpu")
COLUMNS = ("workload", "distribution", "dtype", "provider", "direction", "kind", "config", "ms")


def calls_of(x: Inputs) -> dict[str, Call]:
    """The calls that are timed, by the name of the provider that makes them."""
    return {
        "triton": plain_call(x.value, x.workload.levels, x.locations, x.weights),
        "triton_fused": fused_call(x.value, x.workload.levels, x.reference_points, x.offsets, x.logits),
    }


def named_plans(call: Call, direction: str) -> tuple[plans.Kind, dict[str, plans.Plan]]:
    """The kind of a call, and what every configuration becomes for it, the table's first."""
    kind = plans.kind_of(call, direction)
    names = dict.fromkeys([plans.choose(kind, architecture()), *plans.CONFIGS[direction]])
    return kind, {name: plans.named_plan(name, kind, architecture()) for name in names}


def launch_once(direction: str, call: Call, grad_out: torch.Tensor, run: launch.Run) -> None:
    if direction == "forward":
        launch.forward(call, run=run)
    else:
        needs = [True, True, True, call.reference_points is not None]
        launch.backward(grad_out, call, needs, deterministic=False, run=run)


def time_call(
    call: Call, grad_out: torch.Tensor, repeat_ms: float, named_plans: Callable = named_plans
) -> Iterator[tuple[str, str, str, float]]:
    """(direction, kind of the call, configuration, ms) of every configuration of both directions.

    Infinite for what cannot run here, or is wrong. Calls of few rows are timed in a CUDA graph: there the host takes
    longer than the kernels.
    """
    timer = TIMERS["events"]
    if call.value.device.type == "cpu":
        timer = _once
    elif plans.kind_of(call, "forward").few:
        timer = functools.partial(graph_ms, calls=20)
    for direction in plans.CONFIGS:
        kind, named = named_plans(call, direction)
        _assert_rectangles(call, kind, named)
        times = {}

        def run(kernel, call: Call, arguments: dict, plan: plans.Plan, named=named, times=times) -> None:
            candidates = list(dict.fromkeys(named.values()))  # configurations may become the same
            start = functools.partial(launch.repeated, kernel, call, arguments)
            times |= tuning.measure(candidates, start, arguments, lambda function: timer(function, repeat_ms)[0])[0]

        launch_once(direction, call, grad_out, run)
        for name, plan in named.items():
            yield direction, kind.name, name, times[plan]


def _once(function: Callable[[], object], repeat_ms: float) -> tuple[float]:
    """The milliseconds of one interpreted run, which mean nothing."""
    start = time.perf_counter()
    function()
    return ((time.perf_counter() - start) * 1e3,)


def _assert_rectangles(call: Call, kind: plans.Kind, named: dict[str, plans.Plan]) -> None:
    """That an encoder's queries are timed in rectangles of pixels too, and not twice in runs."""
    pixels = call.weights.shape[1] == call.value.shape[1]
    widths = {plan.BLOCK_W for plan in named.values()}
    if pixels != kind.pixels or pixels != any(widths):
        raise AssertionError(f"rectangles: expected for {pixels=}, got columns {sorted(widths)} and {kind}")


def compile_only(plan: plans.Plan, kernel, call: Call, arguments: dict, _table: plans.Plan) -> None:
    """In the place of a launch: the kernel gets into Triton's cache on disk."""
    given = arguments | plan.constants
    kernel.warmup(*[given[name] for name in kernel.arg_names], grid=plan.grid(call), **plan.options)


@functools.cache
def architecture() -> str:
    return plans.architecture(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU)


def slowdowns_of(rows: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """(direction, kind) to the mean slowdown of each configuration against the best of each case."""
    times = defaultdict(dict)
    for row in rows:
        case = tuple(row[key] for key in ("workload", "distribution", "dtype", "provider"))
        times[row["direction"], row["kind"], case][row["config"]] = row["ms"]
    slowdowns = defaultdict(lambda: defaultdict(list))
    for (direction, kind, _), by_config in times.items():
        least = min(by_config.values())
        for config, ms in by_config.items():
            if least < math.inf:
                slowdowns[direction, kind][config].append(ms / least)
    return {key: {c: statistics.fmean(s) for c, s in by.items()} for key, by in slowdowns.items()}


def winners(rows: list[dict]) -> Iterator[tuple[str, str, str, str, float]]:
    """(direction, kind, the table's configuration, the best one, how many times faster) of what was timed."""
    for (direction, kind), means in slowdowns_of(rows).items():
        shipped = plans.shipped(direction, kind, architecture())
        best = min(means, key=means.get)
        yield direction, kind, shipped, best, means[shipped] / means[best]


def table_lines(rows: list[dict]) -> list[str]:
    """Python for `TABLE`: what gains enough on this architecture."""
    return [
        f'TABLE["{direction}", "{kind}"]["{architecture()}"] = "{best}"  # {gain:.3f} times "{shipped}"'
        for direction, kind, shipped, best, gain in winners(rows)
        if gain >= tuning.GAIN
    ]


def compile_part(
    part: int, parts: int, cases: list[tuple[str, str]], device: str, named_plans: Callable = named_plans
) -> None:
    """Every parts-th kernel from the part-th on gets into Triton's cache."""
    number = 0
    for workload, dtype in cases:
        x = make_inputs(WORKLOADS[workload], "local", DTYPES[dtype], device)
        for call in calls_of(x).values():
            for direction in plans.CONFIGS:
                for plan in dict.fromkeys(named_plans(call, direction)[1].values()):
                    if number % parts == part:
                        run = functools.partial(compile_only, plan)
                        with contextlib.suppress(*tuning.CANNOT_RUN):
                            launch_once(direction, call, gate.gradient(x), run)
                    number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for tune_sm_90.csv or its like (default: %(default)s)",
    )
    parser.add_argument("--python", type=Path, metavar="FILE", help="where to write lines for TABLE (default: nowhere)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all of the benchmark")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: %(default)s"
    )
    parser.add_argument(
        "--distribution", nargs="+", choices=DISTRIBUTIONS, default=["local", "uniform"], help="default: both"
    )
    parser.add_argument("--repeat", type=float, default=20, help="ms per timing (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="s after which no new case starts (default: none)"
    )
    add_dry_run(parser)
    parser.add_argument(
        "--compile", type=part_of, metavar="I/N", help="only compile every N-th kernel from the I-th on"
    )
    args = parser.parse_args()
    device = device_of(parser, args.dry_run)
    workloads = args.workload or (DRY_WORKLOADS if args.dry_run else GPU_WORKLOADS)
    if args.compile:
        compile_part(*args.compile, [(w, t) for w in workloads for t in args.dtype], device)
        return
    make_folder(parser, args.out)
    if args.python and not args.python.parent.is_dir():
        parser.error(f"--python: expected a file in a folder that exists, got {args.python}")
    place = environment(device) | {"architecture": architecture()}
    rows, path, end = [], args.out / f"tune_{architecture()}.csv", time.monotonic() + args.limit
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *place], lineterminator="\n")
        writer.writeheader()
        for case in [(w, d, t) for d in args.distribution for w in workloads for t in args.dtype]:
            if time.monotonic() > end:
                print(f"--limit of {args.limit:g} s reached: {' '.join(case)} and what follows are left out")
                break
            workload, distribution, dtype = case
            x = make_inputs(WORKLOADS[workload], distribution, DTYPES[dtype], device)
            for provider, call in calls_of(x).items():
                for found in time_call(call, gate.gradient(x), args.repeat):
                    rows.append(dict(zip(COLUMNS, (*case, provider, *found), strict=True)))
                    writer.writerow(rows[-1] | place)
                    file.flush()
                    print(*case, provider, *found[:3], f"{found[3]:.4f} ms", flush=True)
    print(f"wrote {path}; mean over the cases of a kind:")
    print(f"{'direction':10}{'kind':6} {'TABLE has':28}{'the fastest':28}  gain")
    for direction, kind, shipped, best, gain in winners(rows):
        print(f"{direction:10}{kind:6} {shipped:28}{best:28}{gain:5.3f}x")
    lines = table_lines(rows)
    print(*(lines or [f"nothing gains {tuning.GAIN - 1:.0%} over TABLE"]), sep="\n")
    if args.python:
        args.python.write_text("".join(f"{line}\n" for line in lines))
        print(f"wrote {args.python}")


def part_of(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text}")
    return int(part), int(parts)


if __name__ == "__main__":
    main()
