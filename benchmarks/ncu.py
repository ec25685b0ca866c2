"""What Nsight Compute counts in the four kernels that ship: forward and backward of the encoder, `local` locations.

    python -m benchmarks.ncu --csv benchmarks/results/h100/5_ncu.csv --limit 90
    TRITON_INTERPRET=1 python -m benchmarks.ncu --dry-run    # prints the command, interprets the launches
    python -m benchmarks.ncu --launches                      # what ncu watches: the second launch of each kernel

Writes a line for each metric and a column for each kernel. Metrics whose names this ncu does not know are left out, as
it would refuse all of them. If it refuses nevertheless, it is asked for the sections that every version has.
"""

import argparse
import contextlib
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gate
from benchmarks.rehearsal import add_dry_run, device_of
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton.checks import plain_call
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans

ELAPSED = ".avg.pct_of_peak_sustained_elapsed"
STALLS = (
    "long_scoreboard", "short_scoreboard", "lg_throttle", "mio_throttle", "math_pipe_throttle", "tex_throttle", "wait",
    "not_selected", "selected", "no_instruction", "branch_resolving", "barrier", "dispatch_stall", "drain", "imc_miss",
    "membar", "sleeping",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum", "sm__cycles_elapsed.max", "smsp__inst_executed.sum", f"sm__issue_active{ELAPSED}",
    "sm__warps_active.avg.pct_of_peak_sustained_active", f"sm__inst_executed_pipe_lsu{ELAPSED}",
    "launch__registers_per_thread", "launch__occupancy_limit_registers", "launch__waves_per_multiprocessor",
    "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "l1tex__t_output_wavefronts_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_requests_pipe_lsu_mem_global_op_red.sum",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_red.sum", "l1tex__data_pipe_lsu_wavefronts.sum",
    f"l1tex__data_pipe_lsu_wavefronts{ELAPSED}", f"l1tex__data_bank_reads{ELAPSED}", f"l1tex__lsuin_requests{ELAPSED}",
    f"l1tex__f_wavefronts{ELAPSED}", f"l1tex__throughput{ELAPSED}", "l1tex__t_sector_hit_rate.pct",
    "l1tex__m_xbar2l1tex_read_bytes.sum", "l1tex__m_l1tex2xbar_write_bytes.sum", "lts__t_sectors_op_red.sum",
    "lts__t_requests.sum", "lts__t_sectors.sum", "lts__t_bytes.sum", "lts__t_sector_hit_rate.pct",
    f"lts__t_sectors{ELAPSED}", f"lts__throughput{ELAPSED}", f"lts__d_atomic_input_cycles_active{ELAPSED}",
    "dram__bytes.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", f"dram__throughput{ELAPSED}",
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS),
)  # fmt: skip
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
PROFILED = "profiled: "  # begins the lines that say which launches ncu saw, in their order


def launches(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what launches) of the four kernels; a name ends with that of the configuration."""
    workload = WORKLOADS["dry_encoder" if device == "cpu" else "encoder"]
    architecture = plans.architecture(torch.device(device))
    inputs = {dtype: make_inputs(workload, "local", dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    for direction in ("forward", "backward"):
        for dtype, x in inputs.items():
            call = plain_call(x.value, workload.levels, x.locations, x.weights)
            config = plans.choose(plans.kind_of(call, direction), architecture)
            name = f"{direction} {str(dtype).removeprefix('torch.')} {config}"
            if direction == "forward":
                yield name, lambda call=call: launch.forward(call)
            else:
                grad_out = gate.gradient(x)
                yield name, lambda call=call, out=grad_out: launch.backward(out, call, [True, True, True, False])


def launch_all(device: str) -> None:
    """Run each launch twice, the second time for the profiler."""
    for name, run in launches(device):
        try:
            run()
            with profiled(device):
                run()
            print(PROFILED + name, flush=True)
        except Exception as error:  # the other kernels count without this one
            print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)


@contextlib.contextmanager
def profiled(device: str):
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.cudart().cudaProfilerStop()


def command(options: list[str], log: Path) -> list[str]:
    return [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", "regex:_msda", *options,
        "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
        sys.executable, "-m", "benchmarks.ncu", "--launches",
    ]  # fmt: skip


def known_metrics(listing: str) -> list[str]:
    """Those of METRICS that `ncu --query-metrics` lists; all if it lists none. It does not list launch__*."""
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    if not any(metric.partition(".")[0] in names for metric in METRICS):
        return list(METRICS)
    return [metric for metric in METRICS if metric.startswith("launch__") or metric.partition(".")[0] in names]


def output_of(arguments: list[str], seconds: float) -> str:
    """What a command prints, errors too, until it ends or the time is up; then all its processes are killed."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=max(seconds, 1))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{process.communicate()[0]}\nended after {seconds:.0f} s: {arguments[0]}"


def tidy(log: str, names: list[str]) -> list[list[str]]:
    """The lines of the CSV: a header, then a metric each; from ncu's log, which has a line for each launch.

    Args:
        names: of the launches in their order.
    """
    table = list(csv.DictReader(line for line in log.splitlines() if line.startswith('"')))
    rows = [row for row in table if row.get("ID")]  # the line without one has the units
    if len(rows) != len(names):
        raise ValueError(f"ncu's log: expected {len(names)} launches, got {len(rows)}")
    metrics = sorted({name for row in rows for name in row if "__" in name})
    return [["metric", *names], *([metric, *(row[metric].replace(",", "") for row in rows)] for metric in metrics)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("ncu.csv"), help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=90, help="s for all (default: %(default)s)")
    parser.add_argument("--launches", action="store_true", help="only launch, as ncu has it done")
    add_dry_run(parser)
    args = parser.parse_args()
    device = device_of(parser, args.dry_run)
    if args.launches or args.dry_run:
        if args.dry_run:
            print(shlex.join(command(["--metrics", ",".join(METRICS)], Path("ncu.log"))))
        launch_all(device)
        return 0
    end = time.monotonic() + args.limit
    try:
        listing = output_of(["ncu", "--query-metrics"], 25)
    except FileNotFoundError:
        parser.error("expected ncu on the PATH, got none")
    metrics = known_metrics(listing)
    print("ncu does not know:", ", ".join(sorted(set(METRICS) - set(metrics))) or "nothing that is asked for")
    with tempfile.TemporaryDirectory() as folder:
        for options in (["--metrics", ",".join(metrics)], [x for name in SECTIONS for x in ("--section", name)]):
            log = Path(folder) / "log"
            printed = output_of(command(options, log), end - time.monotonic())
            print(printed, flush=True)
            names = re.findall(f"^{PROFILED}(.*)$", printed, re.MULTILINE)
            text = log.read_text() if log.exists() else ""
            try:
                lines = tidy(text, names)
            except ValueError as error:
                print(error, *text.splitlines()[:5], sep="\n", flush=True)
                continue
            if names:
                with args.csv.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(lines)
                print(f"ncu: {len(lines) - 1} metrics of {len(names)} kernels in {args.csv}")
                return 0
    print("ncu: nothing was counted")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
