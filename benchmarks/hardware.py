"""What a GPU can do at most, and what each part of the backward kernel costs on it.

    python -m benchmarks.hardware --out benchmarks/results/h100 --limit 90
    TRITON_INTERPRET=1 python -m benchmarks.hardware --dry-run --out /tmp/hardware    # compiles, interprets kernels

`micro.csv`: gathers from the L1 and L2 caches and vector reds, by `hardware.cu`, which nvcc compiles here.
`variants.csv`: device times of a backward of the encoder with a part of the kernel left out, by patches of a temporary
copy of `msda_triton/kernels`. Their results are wrong on purpose:
    base          nothing left out
    no_adds       nothing is added to grad_value, and what would be added is not computed
    adds_only     value is not read, and no gradients of locations and weights are computed or stored
    no_samples    no sample is taken: all instructions, but neither value nor grad_value is touched
"""

import argparse
import csv
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import gate
from benchmarks.bench_op import TIMERS
from benchmarks.rehearsal import add_dry_run, device_of, make_folder
from benchmarks.run import environment
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton import kernels
from msda_triton.checks import plain_call
from msda_triton.kernels import plan as plans

SOURCE = Path(__file__).with_suffix(".cu")
# (file, text, what it becomes); each text occurs once
PATCHES = {
    "base": [],
    "no_adds": [("backward.py", "    if NEEDS_VALUE:\n", "    if False:\n")],
    "adds_only": [
        ("backward.py", "= grad_loc_ptr is not None or grad_attn_ptr is not None\n", "= False\n"),
    ],
    "no_samples": [("sample.py", "    taken = tl.minimum(x, y) > -1\n", "    taken = tl.minimum(x, y) > 1e30\n")],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("variant", "workload", "distribution", "dtype", "p50_ms", "p20_ms", "p80_ms", "status")


def patched(name: str, folder: Path) -> ModuleType:
    """The launcher of a patched copy of the kernels, which lies in the folder."""
    package = f"kernels_{name}"
    copy = folder / package
    shutil.copytree(kernels.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in PATCHES[name]:
        text = (copy / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"patch {name} of {file}: expected once, found {text.count(old)} times: {old.strip()}")
        (copy / file).write_text(text.replace(old, new))
    for path in copy.glob("*.py"):
        path.write_text(re.sub(r"\bmsda_triton\.kernels\b", package, path.read_text()))
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.launch")
    finally:
        sys.path.remove(str(folder))


def time_variants(device: str, folder: Path, repeat_ms: float) -> Iterator[dict]:
    """A row for each variant, dtype and distribution, `local` first."""
    launchers, workload = {}, WORKLOADS["dry_decoder" if device == "cpu" else "encoder"]
    time_ms = TIMERS["wall" if device == "cpu" else "events"]
    for distribution in ("local", "uniform"):
        for dtype_name, dtype in DTYPES.items():
            x = make_inputs(workload, distribution, dtype, device)
            call, grad_out = plain_call(x.value, workload.levels, x.locations, x.weights), gate.gradient(x)
            for name in PATCHES:
                row = dict(zip(COLUMNS, (name, workload.name, distribution, dtype_name), strict=False))
                try:
                    if name not in launchers:
                        launchers[name] = patched(name, folder)
                    run = functools.partial(launchers[name].backward, grad_out, call, [True, True, True, False])
                    row |= zip(COLUMNS[4:7], (f"{ms:.5g}" for ms in time_ms(run, repeat_ms)), strict=True)
                    row["status"] = "ok"
                except Exception as error:  # the other variants count without this one
                    row["status"] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                yield row


def write_variants(path: Path, device: str, repeat_ms: float, end: float) -> bool:
    """Write each row when it is known, until the time is `end`; whether all are there and have a time."""
    place, good, left = environment(device), True, 2 * len(DTYPES) * len(PATCHES)
    with path.open("w", newline="") as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.DictWriter(file, [*COLUMNS, *place], lineterminator="\n")
        writer.writeheader()
        for row in time_variants(device, Path(folder), repeat_ms):
            writer.writerow(row | place)
            file.flush()
            print(*row.values(), flush=True)
            good, left = good and row["status"] == "ok", left - 1
            if left and time.monotonic() > end:
                print("the time is up: what follows is left out")
                return False
    return good


def write_micro(path: Path, run: bool, seconds: float) -> bool:
    """Compile `hardware.cu`, and run it if asked for; its lines go to the file as they come. Whether that worked."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        print("micro: expected nvcc on the PATH or in CUDA_HOME/bin, got none")
        return False
    targets = [plans.architecture(torch.device("cuda"))] if run else ["sm_80", "sm_90"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/micro"
            for target in targets:
                compiling = [nvcc, "-O3", "-std=c++17", f"-arch={target}", "-cudart", "static", "-o", program, SOURCE]
                subprocess.run(compiling, check=True, timeout=seconds)
            if run:
                with path.open("w") as file:
                    subprocess.run([program], stdout=file, check=True, timeout=seconds)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"micro: {type(error).__name__}: {error}", flush=True)
        return False
    print(f"micro: {path}" if run else "micro: compiled", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=90, help="s after which nothing starts (default: %(default)s)")
    add_dry_run(parser)
    args = parser.parse_args()
    end, device = time.monotonic() + args.limit, device_of(parser, args.dry_run)
    make_folder(parser, args.out)
    micro = write_micro(args.out / "micro.csv", not args.dry_run, args.limit / 3)
    variants = write_variants(args.out / "variants.csv", device, 1 if args.dry_run else 100, end)
    return 0 if micro and variants else 1


if __name__ == "__main__":
    raise SystemExit(main())
