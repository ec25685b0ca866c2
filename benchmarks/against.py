"""Two commits of msda_triton, timed in turns: what `python -m benchmarks.run --base REV` does.

The benchmark is this checkout's. Two processes import one package each, and take turns for every number, so that both
see what else the machine does. They share Triton's cache of compiled kernels, whose keys are the sources; plans that
were found by timing stay in their process.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TextIO

import torch

import msda_triton
from benchmarks.bench_op import Case
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
TURNS = 5
COLUMNS = (
    "workload", "distribution", "provider", "mode", "dtype", "timer", "base_ms", "now_ms", "ratio", "ratio_min",
    "ratio_max", "status",
)  # fmt: skip


def package_of(base: str, folder: Path) -> Path:
    """The folder, with the `msda_triton` of base and nothing else.

    Args:
        base: a commit, or another folder that has the package, for machines without git.
    """
    package = Path(base) / "msda_triton"
    if package.is_dir():
        shutil.copytree(package, folder / "msda_triton", ignore=shutil.ignore_patterns("__pycache__"))
        return folder
    expected = f"expected a commit or a folder that has msda_triton, got {base!r}"
    if not shutil.which("git"):
        raise ValueError(f"{expected}; there is no git here")
    done = subprocess.run(["git", "archive", base, "msda_triton"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"{expected}; git says: {done.stderr.decode().strip().splitlines()[0]}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


class Side:
    """A process that times the package of a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def start(self, *case) -> None:
        """Begin with a case: arguments of `_serve`."""
        if self._process is None:
            path = os.pathsep.join(filter(None, (str(self._folder), str(ROOT), os.environ.get("PYTHONPATH"))))
            here, there = os.pipe()  # not stdout, where a package may print
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.against", str(self._folder), str(there)],
                cwd=self._folder, env=os.environ | {"PYTHONPATH": path}, text=True,
                stdin=subprocess.PIPE, stdout=2, pass_fds=[there],
            )  # fmt: skip
            os.close(there)
            self._answers = os.fdopen(here)
        self._send(case)

    def next_row(self) -> dict | None:
        """The next row of the case, None after the last."""
        self._send(None)
        answer = self._answers.readline()
        return json.loads(answer) if answer else {"mode": "", "timer": "", "status": "failed: the process ended"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._answers.close()
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process = None

    def _send(self, request) -> None:
        with contextlib.suppress(OSError):  # of a process that ended: then there is no answer
            print(json.dumps(request), file=self._process.stdin, flush=True)


def compare(
    base: Path, cases: Iterable[tuple[str, str, str]], providers: list[str], device: str, repeat_ms: float, end: float
) -> Iterator[dict]:
    """Rows of `COLUMNS`. Ratios are base / now: above 1 the working tree is faster.

    Args:
        base: the folder with the other package. cases: workload, distribution, dtype. end: by `time.monotonic`.
    """
    sides = [Side(base), Side(ROOT)]
    try:
        for case in cases:
            for name in providers:
                if time.monotonic() > end:
                    return
                workload, distribution, dtype = case
                known = {"workload": workload, "distribution": distribution, "provider": name, "dtype": dtype}
                for row in _compare_case(sides, (*case, name, device, repeat_ms)):
                    yield known | row
    finally:
        for side in sides:
            side.close()


def _compare_case(sides: list[Side], request: tuple) -> Iterator[dict]:
    for side in sides:
        side.start(*request)
    spoiled = set()
    timed = True  # whether both passed the gate
    while timed and (first := [side.next_row() for side in sides]) != [None, None]:
        timed = all(row and row["mode"] for row in first)
        turns = [first]
        if timed:
            for n in range(1, TURNS):  # who comes first changes
                found = {side: side.next_row() for side in sides[:: -1 if n % 2 else 1]}
                turns.append([found[side] for side in sides])
        reasons = {}
        for turn in turns:
            for label, side, row in zip(("base", "now"), sides, turn, strict=True):
                if row is None or row["status"] != "ok":
                    reasons[f"{label} {row['status'] if row else 'has no such row'}"] = side
        row = first[0] or first[1]
        found = {"mode": row["mode"], "timer": row["timer"]}
        if reasons:
            spoiled |= {side for reason, side in reasons.items() if " failed: " in reason}
            yield found | {"status": "; ".join(reasons)}
        elif timed:
            before, now = ([row["p50_ms"] for row in rows] for rows in zip(*turns, strict=True))
            ratios = [a / b for a, b in zip(before, now, strict=True)]
            base_ms, now_ms = statistics.median(before), statistics.median(now)
            yield found | {
                "base_ms": base_ms, "now_ms": now_ms, "ratio": base_ms / now_ms,
                "ratio_min": min(ratios), "ratio_max": max(ratios), "status": "ok",
            }  # fmt: skip
    for side in spoiled:
        side.close()  # an error of the device spoils all that comes after it


def _serve(folder: Path, answers: TextIO) -> None:
    """The other process: a case starts a series of rows, null asks for the next of them."""
    if not Path(msda_triton.__file__).is_relative_to(folder):
        sys.exit(f"expected msda_triton of {folder}, got {msda_triton.__file__}")
    case, rows = None, iter(())
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            row = next(rows, None)
            print(json.dumps(row and asdict(row)), file=answers, flush=True)
        else:
            workload, distribution, dtype, name, device, repeat_ms = request
            wanted = Case(WORKLOADS[workload], distribution, getattr(torch, dtype), device)
            case = case if case == wanted else wanted  # which keeps its inputs
            rows = case.rows(name, repeat_ms, TURNS)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w"))
