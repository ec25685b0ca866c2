"""What each knob of a configuration is worth: those of `TABLE`, with one field changed at a time.

    python -m benchmarks.knobs --out benchmarks/results/h100
    python -m benchmarks.knobs --compile 0/8                   # only compile, the first of eight parts: for many cores
    TRITON_INTERPRET=1 python -m benchmarks.knobs --dry-run    # rehearsed on a CPU; its times mean nothing

Encoder and decoder, `local` locations. A knob stays in `plan.Config` while some value of it is slower by more than
noise. Prints, for each direction, kind and change, the time relative to the table's plan; writes the times as CSV. What
is wrong or cannot run has the time inf.
"""

import argparse
import csv
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks import gate, tune
from benchmarks.rehearsal import add_dry_run, device_of, make_folder
from benchmarks.run import DTYPES, environment
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton.call import Call
from msda_triton.kernels import plan as plans

TABLE = "table"  # the name of what ships
VALUES = {
    "unroll": (1, 2, 4), "warps": (1, 2, 4, 8), "registers": (None, 64, 80, 96, 128), "width": (0, 4, 8),
    "rotate": (False, True), "turn": (False, True), "split": (1, 2, 4), "lane": (4, 8, 16),
    "tile": (256, 512, 1024, 2048), "vec": (4, 8),
}  # fmt: skip
COLUMNS = ("workload", "dtype", "provider", "direction", "kind", "change", "ms", "relative")


def changed_plans(call: Call, direction: str) -> tuple[plans.Kind, dict[str, plans.Plan]]:
    """The kind of a call, and the plans by what was changed in the table's configuration, each plan once."""
    architecture = tune.architecture()
    kind = plans.kind_of(call, direction)
    config = plans.CONFIGS[direction][plans.choose(kind, architecture)]
    named = {TABLE: plans.named_plan(plans.choose(kind, architecture), kind, architecture)}
    if kind.pairs:
        named["pairs 0"] = plans.plan_of(config, kind._replace(pairs=0))
    for field, values in VALUES.items():
        for value in values:
            if value != getattr(config, field):
                named[f"{field} {value}"] = plans.plan_of(replace(config, **{field: value}), kind)
    first = {}
    for name, plan in named.items():
        first.setdefault(plan, name)
    return kind, {name: plan for plan, name in first.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--repeat", type=float, default=10, help="ms per timing (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="s after which no new case starts (default: none)"
    )
    parser.add_argument(
        "--compile", type=tune.part_of, metavar="I/N", help="only compile every N-th kernel from the I-th on"
    )
    add_dry_run(parser)
    args = parser.parse_args()
    device = device_of(parser, args.dry_run)
    dtypes = ("bfloat16",) if args.dry_run else ("bfloat16", "float32")
    cases = [(w, t) for w in (("dry_decoder",) if args.dry_run else ("encoder", "decoder")) for t in dtypes]
    if args.compile:
        tune.compile_part(*args.compile, cases, device, changed_plans)
        return
    make_folder(parser, args.out)
    place, end, found = environment(device), time.monotonic() + args.limit, defaultdict(list)
    with (args.out / "knobs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *place], lineterminator="\n")
        writer.writeheader()
        for workload, dtype in cases:
            if time.monotonic() > end:
                print(f"--limit of {args.limit:g} s reached: {workload} {dtype} and what follows are left out")
                break
            x = make_inputs(WORKLOADS[workload], "local", DTYPES[dtype], device)
            for provider, call in tune.calls_of(x).items():
                base = {}
                for direction, kind, change, ms in tune.time_call(call, gate.gradient(x), args.repeat, changed_plans):
                    base.setdefault(direction, ms)  # the table's comes first
                    relative = ms / base[direction]
                    values = workload, dtype, provider, direction, kind, change, f"{ms:.5g}", f"{relative:.4f}"
                    writer.writerow(dict(zip(COLUMNS, values, strict=True)) | place)
                    file.flush()
                    found[direction, kind, change].append(f"{workload} {dtype} {provider} {relative:.3f}")
    for key, relatives in found.items():
        print(*key, "|", ", ".join(relatives), flush=True)


if __name__ == "__main__":
    main()
