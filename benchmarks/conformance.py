"""The kernels against float64 on a GPU: every configuration on a grid of calls, and random calls, in several processes.

    python -m benchmarks.conformance --processes 8 --limit 100
    TRITON_INTERPRET=1 python -m benchmarks.conformance --dry-run --processes 2 --limit 40    # rehearsed on a CPU

A variant is a call and how it is planned: as it ships, or by a configuration of `plan.CONFIGS` for each direction. It
runs with ordinary numbers, and with locations that are NaN, infinite or huge. `tests/fuzz.py` compares the result and
all gradients with its oracle. It keeps samples 0.001 pixel away from pixel centres, where gradients of locations jump,
or puts them where every dtype sees the centre. What ships comes first, then the other configurations in random order;
after every few variants a process takes some of the random calls of `tests/fuzz.py`. Exits with 1 if a call was wrong,
a process died, or nothing ran. Compiling takes most of the time: a second run finds the kernels in Triton's cache.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.rehearsal import add_dry_run, device_of
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans
from tests import fuzz
from tests.fuzz_calls import Call
from tests.interpreter import patch_the_language_once_a_launch

LEVELS = [((6, 4), (3, 2)), ((7, 5), (1, 9), (4, 4)), ((5, 8), (3, 4), (2, 2), (1, 1), (1, 2))]
# B, Q, M, D, P, and whether the host knows the levels; without Q a query for each pixel, in rectangles if it does
SIZES = [
    (2, None, 8, 32, 4, True),
    (2, None, 8, 32, 4, False),
    (1, 40, 4, 64, 4, True),
    (2, 9, 2, 30, 4, True),
    (3, 5, 3, 8, 1, True),
    (1, 17, 2, 71, 3, True),
]
DRY_LEVELS = ((2, 3), (1, 1))
DRY_SIZES = [(1, None, 1, 32, 2, True), (1, 3, 2, 6, 1, False)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
FORMS = ["plain", "points", "boxes"]
STRANGE = 8  # locations that are NaN, infinite or huge
BETWEEN, RANDOM = 8, 4  # variants between two parts of random calls, and calls of a part


class Variant(NamedTuple):
    """A call, and the names of its configurations by direction; None: what ships."""

    call: Call
    configs: dict[str, str] | None

    def __str__(self) -> str:
        call = self.call
        form = "plain" if not call.fused else "boxes" if call.dim == 4 else "points"
        sizes = f"B {call.B}, Q {call.Q}, M {call.M}, D {call.D}, P {call.points[0]}"
        return f"{form} {call.dtypes[0]} {call.levels} as {call.form}, {sizes}, {self.configs or 'as it ships'}"


def grid(dry: bool) -> Iterator[Call]:
    """The calls, levels in turn: how many there are decides little in a kernel."""
    cases = itertools.product(DRY_SIZES if dry else SIZES, DTYPES, FORMS)
    for number, ((B, Q, M, D, P, known), dtype, form) in enumerate(cases):
        levels = DRY_LEVELS if dry else LEVELS[number % len(LEVELS)]
        fused, wide = form != "plain", torch.promote_types(dtype, torch.float32)
        yield Call(
            seed=number, B=B, Q=Q or sum(h * w for h, w in levels), M=M, D=D, levels=levels,
            points=(P,) * len(levels), listed=False, pixels=False,
            dtypes=(dtype, dtype if fused else wide, dtype, wide, dtype), layout="plain", strided=False, starts="none",
            form="tuples" if known else "int64", fused=fused, dim=4 if form == "boxes" else 2,
            one_reference=form == "points", mask=form == "boxes", method="default", deterministic=False,
            autocast="none", autocast_dtype=dtype, needs=(True,) * 4, wild=(0,) * 5, before="nothing",
        )  # fmt: skip


def variants(dry: bool) -> list[Variant]:
    """All, in the order in which they run."""
    calls = list(grid(dry))
    forward, backward = list(plans.CONFIGS["forward"]), itertools.cycle(plans.CONFIGS["backward"])
    pairs = [{"forward": name, "backward": next(backward)} for name in forward]
    shipped = [Variant(call, None) for call in calls]
    others = [Variant(call, pair) for call in calls for pair in pairs]
    shuffle = random.Random(0).shuffle
    shuffle(shipped)
    shuffle(others)
    return shipped + others


@contextlib.contextmanager
def planned(configs: dict[str, str] | None):
    """Within, calls run these configurations. Launches are not kept: another configuration may have made them."""

    def named(kind: plans.Kind, architecture: str) -> plans.Plan:
        return plans.named_plan(configs[kind.direction], kind, architecture)

    launch._launches.clear()
    with mock.patch.object(plans, "default_plan", named if configs else plans.default_plan):
        yield
    launch._launches.clear()


def faults(variant: Variant, device: str) -> list[list[str]]:
    """What is wrong with each call of a variant."""
    strange = replace(variant.call, wild=(0, STRANGE, 0, 0, 0))
    with planned(variant.configs):
        return [fuzz.faults(call, "triton", device) for call in (variant.call, strange)]


def work(report: Connection, index: int, processes: int, dry: bool) -> None:
    """One process: (is a variant, what ran, faults of its calls) of all that is its share, then None."""
    device = "cpu" if dry else "cuda"
    if dry:
        patch_the_language_once_a_launch()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of numbers that are not finite

    def send(is_variant: bool, name: str, found: list[list[str]]) -> None:
        report.send((is_variant, name, found))
        if any(found) and device == "cuda":
            torch.cuda.synchronize()  # raises if no call can be right any more

    for number, variant in enumerate(variants(dry)[index::processes]):
        send(True, str(variant), faults(variant, device))
        if number % BETWEEN == BETWEEN // 2:
            seed = 1000 + number * processes + index
            fuzz.draw(RANDOM, seed, True, lambda call: send(False, str(call), [fuzz.faults(call, "triton", device)]))
    report.send(None)


class Counts:
    """What came out so far; failures are printed at once."""

    def __init__(self):
        self.passed = self.failed = self.variants = self.random = 0

    def add(self, is_variant: bool, name: str, found: list[list[str]]) -> None:
        self.variants += is_variant
        self.random += not is_variant
        self.passed += sum(not lines for lines in found)
        for lines in filter(None, found):
            self.fail(f"{name}: {'; '.join(lines)}")

    def fail(self, what: str) -> None:
        self.failed += 1
        print(f"FAIL {what}", flush=True)


def collect(workers: dict[Connection, multiprocessing.Process], end: float) -> Counts:
    """Count what the processes report, until all are done or the time is `end`; those that still run are killed."""
    counts, running = Counts(), dict(workers)
    while running and (left := end - time.monotonic()) > 0:
        for pipe in wait(list(running), left):
            try:
                message = pipe.recv()
            except EOFError:
                process = running.pop(pipe)
                process.join(5)
                counts.fail(f"process {process.name} ended before its last variant, exit code {process.exitcode}")
                continue
            if message is None:
                del running[pipe]
            else:
                counts.add(*message)
    for process in running.values():
        process.kill()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=100, help="s for all (default: %(default)s)")
    add_dry_run(parser)
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes: expected at least 1, got {args.processes}")
    begin = time.monotonic()
    device_of(parser, args.dry_run)
    context, workers = multiprocessing.get_context("spawn"), {}
    for index in range(args.processes):
        ours, theirs = context.Pipe(duplex=False)
        given = theirs, index, args.processes, args.dry_run
        process = context.Process(target=work, args=given, name=str(index), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process ends the pipe
        workers[ours] = process
    counts = collect(workers, begin + args.limit)
    print(
        f"conformance: {counts.passed} passed, {counts.failed} failed, "
        f"{counts.variants} of {len(variants(args.dry_run))} variants in {time.monotonic() - begin:.0f} s; "
        f"{counts.random} random calls"
    )
    return 1 if counts.failed or not counts.passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
