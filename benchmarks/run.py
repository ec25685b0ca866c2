"""Benchmark what this machine can run, and write a CSV, a Markdown table and, with matplotlib, a plot.

    python -m benchmarks.run                        # a CPU: five workloads, about 3 minutes; a GPU: all, under 8
    python -m benchmarks.run --workload decoder --provider torch fallback --dtype float32
    python -m benchmarks.run --base HEAD~3          # this working tree against a commit, ours only
    python -m benchmarks.run --base /tmp/old        # or against a folder that has msda_triton, without git
    TRITON_INTERPRET=1 python -m benchmarks.run --dry-run --repeat 1    # rehearses a GPU's run on a CPU

Every provider passes the accuracy gate before it is timed; what fails is listed as wrong or failed, not timed. The CSV
gets each row when it is known. Cases come by worth, as --limit may leave out the last. What the timers are stands in
`bench_op.py`, how two commits take turns in `against.py`.

Each line names the commit: MSDA_COMMIT of the environment, for machines that have no `.git`, else what git says.
"""

import argparse
import importlib.util
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import against, bars, report
from benchmarks.bench_op import Row, bench
from benchmarks.providers import BASELINE, PROVIDERS, available
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS

GPU_WORKLOADS = (  # by worth
    "encoder", "decoder", "decoder_b4", "dino_decoder", "rtdetr_decoder", "mask2former_encoder", "bev_cross",
    "l4_encoder",
)  # fmt: skip
CPU_WORKLOADS = ("decoder", "l4_encoder", "tiny", "tiny_encoder", "tiny_decoder")
DRY_WORKLOADS = ("dry_encoder", "dry_decoder")
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float32", "float16")}  # by worth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: those meant for the device")
    parser.add_argument("--distribution", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS, help="default: both")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all on a GPU, float32 on a CPU")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, help="default: all that can run here")
    parser.add_argument("--base", metavar="REV", help="compare with a commit, or with a folder that has msda_triton")
    parser.add_argument(
        "--repeat", type=float, default=100 if on_gpu else 400, help="ms per timing (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=480, help="s after which nothing new is timed (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes that rehearse the run; times mean nothing")
    args = parser.parse_args()

    end = time.monotonic() + args.limit
    device = args.device
    workloads = args.workload or (
        DRY_WORKLOADS if args.dry_run else CPU_WORKLOADS if device == "cpu" else GPU_WORKLOADS
    )
    dtypes = args.dtype or (["float32"] if device == "cpu" and not args.dry_run else list(DTYPES))
    if device not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {device}")
    if device == "cuda" and not on_gpu:
        parser.error("--device: expected cpu, as torch finds no GPU; got cuda")
    possible = available(device, interpreter=os.environ.get("TRITON_INTERPRET") == "1")
    providers = args.provider or possible
    missing = [name for name in providers if name not in possible]
    if missing:
        parser.error(f"--provider: {', '.join(missing)} cannot run here; {', '.join(possible)} can")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "dry_run" if args.dry_run else "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "_")
    path = args.out / f"{name}.csv"
    place = environment(device)
    print(", ".join(f"{key} {value}" for key, value in place.items()), flush=True)
    cases = [(d, w, t) for w, d, t in itertools.product(workloads, args.distribution, dtypes)]

    if args.base is not None:
        ours = args.provider or [p for p in possible if p.startswith("triton")] or ["fallback"]
        path = path.with_name(f"{name}_base.csv")
        with tempfile.TemporaryDirectory() as folder:
            try:
                base = against.package_of(args.base, Path(folder))
            except ValueError as error:
                parser.error(f"--base: {error}")
            file = report.RowFile(path, against.COLUMNS, place | {"base": commit_of(args.base)})
            cases = [(w, d, t) for d, w, t in cases]
            for row in against.compare(base, cases, ours, device, args.repeat, end):
                file.write(row)
                times = "{base_ms:10.4f} ms, now {now_ms:10.4f} ms {ratio:6.2f}x ({ratio_min:.2f} to {ratio_max:.2f})"
                print(_case(row), times.format_map(row) if row["status"] == "ok" else row["status"], flush=True)
        if time.monotonic() > end:
            print(f"--limit of {args.limit:g} s reached: what follows is left out")
        print(f"wrote {path}; ratio is base / now, above 1 is faster than {args.base}")
        return

    providers = [BASELINE] + [name for name in providers if name != BASELINE]
    file = report.RowFile(path, [field.name for field in fields(Row)], place)
    for distribution, workload, dtype in cases:
        torch._dynamo.reset()  # else the compiled baseline reaches the limit of recompilations and runs uncompiled
        for row in bench(WORKLOADS[workload], distribution, DTYPES[dtype], device, providers, args.repeat):
            file.write(asdict(row))
            ratio = "" if row.ratio is None else f"{row.ratio:8.2f}x"
            print(_case(asdict(row)), f"{row.p50_ms:10.4f} ms{ratio}" if row.status == "ok" else row.status, flush=True)
            if time.monotonic() > end:
                break
        if time.monotonic() > end and (distribution, workload, dtype) != cases[-1]:
            print(f"--limit of {args.limit:g} s reached at {workload} {distribution} {dtype}: what follows is left out")
            break
    path.with_suffix(".md").write_text(report.markdown(file.lines))
    written = [f"{name}.csv", f"{name}.md"]
    if bars.chosen(file.lines) and importlib.util.find_spec("matplotlib"):
        bars.draw(file.lines).savefig(path.with_suffix(".png"))
        written.append(f"{name}.png")
    print(f"wrote {', '.join(written)} to {args.out}")


def _case(row: dict) -> str:
    return "{workload:20}{distribution:9}{dtype:9}{provider:16}{mode:8}{timer:7}".format_map(row)


def environment(device: str) -> dict[str, str]:
    """What times depend on, for every line of the CSV."""
    if device == "cpu":
        place = {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "driver": ""}
    else:
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        place = {"device": torch.cuda.get_device_name(), "driver": driver}
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else ""
    commit = os.environ.get("MSDA_COMMIT") or _said("git", "describe", "--always", "--dirty")
    return place | {"torch": torch.__version__, "triton": triton, "commit": commit}


def commit_of(base: str) -> str:
    """The short name of a commit; of a folder its path."""
    return _said("git", "describe", "--always", base) or base


def _said(*command: str) -> str:
    """What a command prints, nothing if it is not installed."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, cwd=against.ROOT, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
