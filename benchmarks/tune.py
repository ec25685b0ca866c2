"""Time every kernel configuration on this GPU, and print lines for `TABLE` in `msda_triton/tuning.py`.

    python -m benchmarks.tune
    TRITON_INTERPRET=1 python -m benchmarks.tune --dry-run    # rehearsed on a CPU; its times mean nothing

Workloads, dtypes and location distributions are those of the benchmark; a class of calls gets the configuration whose
slowdown against the best of each case, averaged over its cases, is the least. Writes all times as CSV.
"""

import argparse
import csv
import functools
import math
import statistics
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks import gate
from benchmarks.bench_op import TIMERS
from benchmarks.providers import PROVIDERS
from benchmarks.run import DRY_WORKLOADS, DTYPES, GPU_WORKLOADS, environment
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS, make_inputs
from msda_triton import tuning

PROVIDER_NAMES = ("triton", "triton_fused")
CPU = torch.device("cpu")


def candidates(direction: str) -> list[triton.Config]:
    """What autotuning tries, and what the table has besides."""
    found = list(tuning.CONFIGS[direction])
    for (of, _), row in tuning.TABLE.items():
        found += [config for config in row.values() if of == direction and config not in found]
    return found


def name_of(config: triton.Config) -> str:
    numbers = config.kwargs | {"num_warps": config.num_warps} | ({"maxnreg": config.maxnreg} if config.maxnreg else {})
    return " ".join(f"{key}={number}" for key, number in numbers.items())


def time_case(provider_name: str, x, repeat_ms: float):
    """(direction, class of the call, name of the configuration, ms) of every configuration of both directions."""
    provider = PROVIDERS[provider_name]
    leaves, grad_out = gate.differentiable(x, provider.leaves), gate.gradient(x)
    wanted = [getattr(leaves, leaf) for leaf in provider.leaves]
    out = provider.function(leaves)
    calls = {
        "forward": lambda: provider.function(x),
        "backward": lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True),
    }
    for direction, call in calls.items():
        for config in candidates(direction):
            classes = []

            def configuration(of, rows, arguments, config=config, direction=direction, classes=classes):
                if of != direction:
                    return tuning.choose(of, tuning.call_class(of, rows, arguments), architecture())
                classes.append(tuning.call_class(of, rows, arguments))
                return config

            with (
                mock.patch.object(tuning, "configuration", configuration),
                torch.set_grad_enabled(direction != "forward"),
            ):
                try:
                    ms = TIMERS["wall" if x.value.device.type == "cpu" else "events"](call, repeat_ms)[0]
                except triton.runtime.errors.OutOfResources:
                    ms = math.inf
            yield direction, classes[0], name_of(config), ms


@functools.cache
def architecture() -> str:
    return tuning.architecture(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU)


def best_of(rows: list[dict]) -> dict[tuple[str, str], tuple[str, float]]:
    """(direction, class) to (configuration, its mean slowdown against the best of each case)."""
    times = defaultdict(dict)
    for row in rows:
        case = tuple(row[key] for key in ("workload", "distribution", "dtype", "provider"))
        times[row["direction"], row["class"], case][row["config"]] = row["ms"]
    slowdowns = defaultdict(lambda: defaultdict(list))
    for (direction, call_class, _), by_config in times.items():
        least = min(by_config.values())
        for config, ms in by_config.items():
            slowdowns[direction, call_class][config].append(ms / least)
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
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.dry_run):
        parser.error("expected a GPU, torch finds none")
    device = "cpu" if args.dry_run else "cuda"
    workloads = args.workload or (DRY_WORKLOADS if args.dry_run else GPU_WORKLOADS)
    place = environment(device) | {"architecture": architecture()}
    rows = []
    for workload, dtype, distribution in ((w, t, d) for w in workloads for t in args.dtype for d in DISTRIBUTIONS):
        x = make_inputs(WORKLOADS[workload], distribution, DTYPES[dtype], device)
        for provider in PROVIDER_NAMES:
            case = {"workload": workload, "distribution": distribution, "dtype": dtype, "provider": provider}
            for direction, call_class, config, ms in time_case(provider, x, args.repeat):
                rows.append(case | {"direction": direction, "class": call_class, "config": config, "ms": ms} | place)
                print(*case.values(), direction, call_class, f"{config}: {ms:.4f} ms", flush=True)
    path = args.out / f"tune_{architecture()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}; lines for TABLE, with the mean slowdown against the best of each case:")
    for (direction, call_class), (config, slowdown) in best_of(rows).items():
        print(f'    ("{direction}", "{call_class}"): "{architecture()}": {config}  # {slowdown:.3f}')


if __name__ == "__main__":
    main()
