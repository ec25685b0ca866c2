"""Benchmark what this machine can run, and write a CSV, a Markdown table and a plot.

    python -m benchmarks.run                        # a CPU: three workloads, about 3 minutes; a GPU: all, under 8
    python -m benchmarks.run --workload decoder --provider torch fallback --dtype float32

Every provider passes the accuracy gate before it is timed; what fails is listed as wrong or failed, not timed.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.bench_op import Row, bench
from benchmarks.gate import LIMITS
from benchmarks.providers import BASELINE, PROVIDERS, available
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS

GPU_WORKLOADS = (
    "encoder", "decoder", "dino_decoder", "mask2former_encoder", "rtdetr_decoder", "bev_cross", "l4_encoder"
)  # fmt: skip
CPU_WORKLOADS = ("decoder", "l4_encoder", "tiny", "tiny_encoder", "tiny_decoder")
DRY_WORKLOADS = ("dry_encoder", "dry_decoder")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: those meant for the device")
    parser.add_argument("--distribution", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS, help="default: both")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all on a GPU, float32 on a CPU")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, help="default: all that can run here")
    parser.add_argument(
        "--repeat", type=float, default=100 if on_gpu else 400, help="ms per timing (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=480, help="s after which no new case starts (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes that rehearse the run; times mean nothing")
    args = parser.parse_args()

    device = args.device
    workloads = args.workload or (
        DRY_WORKLOADS if args.dry_run else CPU_WORKLOADS if device == "cpu" else GPU_WORKLOADS
    )
    dtypes = args.dtype or (["float32"] if device == "cpu" and not args.dry_run else list(DTYPES))
    possible = available(device, interpreter=os.environ.get("TRITON_INTERPRET") == "1")
    providers = [BASELINE] + [name for name in args.provider or possible if name != BASELINE]
    missing = [name for name in providers if name not in possible]
    if missing:
        parser.error(f"--provider: {', '.join(missing)} cannot run here; {', '.join(possible)} can")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "dry_run" if args.dry_run else "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "_")
    place = environment(device)
    print(", ".join(f"{key} {value}" for key, value in place.items()), flush=True)

    rows: list[Row] = []
    end = time.monotonic() + args.limit
    for case in [(w, d, t) for w in workloads for t in dtypes for d in args.distribution]:
        if time.monotonic() > end:
            print(f"--limit of {args.limit:g} s reached: {' '.join(case)} and what follows are left out")
            break
        workload, distribution, dtype = case
        if distribution == args.distribution[0]:
            torch._dynamo.reset()  # else the compiled baseline reaches the limit of recompilations and runs uncompiled
        for row in bench(WORKLOADS[workload], distribution, DTYPES[dtype], device, providers, args.repeat):
            rows.append(row)
            times = f"{row.p50_ms:10.4f} ms {row.ratio:8.2f}x {row.timer}" if row.status == "ok" else row.status
            print(f"{workload:20}{distribution:9}{dtype:9}{row.provider:16}{row.mode:8}{times}", flush=True)
        report.write_csv(args.out / f"{name}.csv", rows, place)  # after every case, so that an early end loses little
    (args.out / f"{name}.md").write_text(report.markdown(rows, place))
    report.plot(args.out / f"{name}.png", rows, f"{place['device']}, torch {place['torch']}")
    print(f"wrote {name}.csv, {name}.md and {name}.png to {args.out}")


def environment(device: str) -> dict[str, str]:
    """What times depend on, for every line of the CSV."""
    if device == "cpu":
        place = {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "driver": ""}
    else:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
            if shutil.which(query[0])
            else ""
        )
        place = {"device": torch.cuda.get_device_name(), "driver": driver}
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else ""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return place | {"torch": torch.__version__, "triton": triton, "commit": commit}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
