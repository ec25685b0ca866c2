"""Launches that are found again, beside those that Triton makes: what `test_launch.py` runs in a process of its own.

    python -m tests.fake_launches [--calls 400] [--seed 0]

Nothing is interpreted here, and nothing is compiled or launched: `benchmarks.fake_gpu` records which kernel would have
been launched, and with which arguments. A call goes once by Triton's own way, and then twice by `launch.py`'s, which
may find what an earlier call has left there. All three must launch the same.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import fake_gpu
from msda_triton import user_cache
from msda_triton.checks import fused_call, plain_call
from msda_triton.kernels import launch, tuning
from msda_triton.kernels import plan as plans

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


class Case(NamedTuple):
    """One call in all that a launch may depend on."""

    sizes: tuple  # of the levels
    form: str  # of the sizes and starts
    B: int
    Q: int
    M: int
    D: int
    points: tuple  # of each level
    listed: bool  # whether these are told
    dtypes: tuple  # of value, locations, weights, reference points, grad_out
    layout: str  # of value
    unaligned: tuple  # names of the tensors that begin 8 or 4 bytes or one number off a multiple of 16
    fused: int  # 0, or the numbers of a reference point
    one_point: bool  # for all levels
    mask: bool
    needs: tuple
    deterministic: bool
    device: int
    config: str | None
    autotune: bool


def random_case(rng: random.Random) -> Case:
    """Few choices of each kind, so that calls often differ in one thing only."""
    sizes = rng.choice([((3, 4), (2, 2)), ((4, 3), (2, 2)), ((2, 2), (3, 4)), ((3, 4), (2, 3)), ((2, 2),) * 4])
    S = sum(h * w for h, w in sizes)
    fused = rng.choice([0, 0, 0, 2, 4])
    wide = rng.random() < 0.2
    dtype = rng.choice(FLOATS if wide else (*HALF, torch.float32))
    names = ["value", "locations", "weights", "reference_points", "grad_out", "shapes", "starts"]
    return Case(
        sizes=sizes,
        form=rng.choice(["host", "host", "host", "host with starts", "device", "device int32", "device with starts"]),
        B=rng.choice([1, 2, 2]),
        Q=rng.choice([S, S, 5, 6]),
        M=rng.choice([1, 2, 3, 8]),
        D=rng.choice([32, 32, 24, 8, 64, 5]),
        points=rng.choice([(4, 4), (4, 4), (2, 2), (3, 5), (1, 1)]),
        listed=rng.random() < 0.3,
        dtypes=(dtype, *(rng.choice([torch.float32, dtype, rng.choice(FLOATS)]) for _ in range(3)), dtype),
        layout=rng.choice(
            [
                "plain",
                "plain",
                "head-major",
                "more heads",
                "wider rows",
                "odd rows",
                "one image",
                "reversed",
                "every other",
            ]
        ),
        unaligned=tuple(name for name in names if rng.random() < 0.08),
        fused=fused,
        one_point=rng.random() < 0.5,
        mask=fused > 0 and rng.random() < 0.4,
        needs=rng.choice(
            [
                (True,) * 4,
                (True,) * 4,
                (True, False, False, False),
                (False, True, True, True),
                (False, True, False, False),
            ]
        ),
        deterministic=rng.random() < 0.2,
        device=rng.choice([0, 0, 1]),
        config=rng.choice([None, None, None, "many", "large", "lanes of 16"]),
        autotune=rng.random() < 0.1,
    )


def changed(rng: random.Random, case: Case) -> Case:
    """A case that differs from another in one thing."""
    other, name = random_case(rng), rng.choice(Case._fields)
    return case._replace(**{name: getattr(other, name)})


def at_offset(x: Tensor, off: bool, rng: random.Random) -> Tensor:
    """The same numbers, in memory that begins at a multiple of 16 bytes or not."""
    if not off:
        return x
    numbers = rng.choice([n for n in (1, 2, 4) if n * x.itemsize < 16])
    memory = torch.zeros(x.numel() + 16, dtype=x.dtype)
    return memory[numbers : numbers + x.numel()].view(x.shape).copy_(x)


def value_of(case: Case, rng: random.Random) -> Tensor:
    B, S, M, D = case.B, sum(h * w for h, w in case.sizes), case.M, case.D
    dtype, off = case.dtypes[0], "value" in case.unaligned
    shapes = {
        "plain": (B, S, M, D), "head-major": (B, M, S, D), "more heads": (B, S, M + 1, D),
        "wider rows": (B, S, M, D + 8), "odd rows": (B, S, M, D + 1), "one image": (1, S, M, D),
        "reversed": (B, S, D, M), "every other": (B, S, M, 2 * D),
    }  # fmt: skip
    x = at_offset(torch.zeros(shapes[case.layout], dtype=dtype), off, rng)
    views = {
        "head-major": lambda: x.transpose(1, 2), "more heads": lambda: x[:, :, 1:], "wider rows": lambda: x[..., 8:],
        "odd rows": lambda: x[..., 1:], "one image": lambda: x.expand(B, S, M, D),
        "reversed": lambda: x.transpose(2, 3), "every other": lambda: x[..., ::2],
    }  # fmt: skip
    return views.get(case.layout, lambda: x)()


def call_of(case: Case, rng: random.Random):
    """The call, and grad_out."""
    B, Q, M, D, L = case.B, case.Q, case.M, case.D, len(case.sizes)
    points = case.points if len(case.points) == L else (max(sum(case.points) // L, 1),) * L
    K = sum(points)
    off = lambda name, x: at_offset(x, name in case.unaligned, rng)  # noqa: E731
    listed = case.listed or len(set(points)) > 1
    shape = (B, Q, M, K) if listed else (B, Q, M, L, points[0])
    locations = off("locations", torch.zeros(*shape, 2, dtype=case.dtypes[1]))
    weights = off("weights", torch.zeros(shape, dtype=case.dtypes[2]))
    options = {"num_points": points} if listed else {}
    shapes = list(case.sizes)
    starts = [sum(h * w for h, w in case.sizes[:level]) for level in range(L)]
    if case.form.startswith("device"):
        shapes = off("shapes", torch.tensor(shapes, dtype=torch.int32 if "int32" in case.form else torch.int64))
        starts = off("starts", torch.tensor(starts))
    if case.form.endswith("starts"):
        options["level_start_index"] = starts
    value = value_of(case, rng)
    grad_out = off("grad_out", torch.zeros(B, Q, M * D, dtype=case.dtypes[4]))
    if not case.fused:
        return plain_call(value, shapes, locations, weights, **options), grad_out
    reference = torch.zeros(B, Q, 1 if case.one_point else L, case.fused, dtype=case.dtypes[3])
    mask = torch.zeros(value.shape[:2], dtype=torch.bool) if case.mask else None
    reference = off("reference_points", reference)
    return fused_call(value, shapes, reference, locations, weights, value_mask=mask, **options), grad_out


def launches_of(fake, case: Case, call, grad_out: Tensor, run) -> list[tuple]:
    """What forward and backward launch, with pointers as whether they are null, and those of inputs in full."""
    fake.launches.clear()
    inputs = {x.data_ptr() for x in (*call, grad_out) if isinstance(x, Tensor) and x.is_contiguous()}
    plan = {"forward": None, "backward": None}
    if case.config is not None:
        for direction in plan:
            kind = plans.kind_of(
                call, direction, deterministic=direction == "backward" and case.deterministic and case.needs[0]
            )
            plan[direction] = plans.named_plan(case.config, kind, "sm_90")
    launch.forward(call, plan["forward"], run=run)
    needs = [*case.needs[:3], case.needs[3] and case.fused > 0]
    launch.backward(grad_out, call, needs, plan["backward"], deterministic=case.deterministic, run=run)

    def seen(x):
        pointer = x.data_ptr() if isinstance(x, Tensor) else x
        if isinstance(x, Tensor) or (type(x) is int and x > 2**32):
            return ("input", pointer) if pointer in inputs else ("made here", pointer % 16)
        return x

    return [entry._replace(arguments=tuple(map(seen, entry.arguments))) for entry in fake.launches]


def on_fake_devices(fake, key_of):
    """`launch._key` for tensors that claim to be on the fake's current device: all of them are on the CPU."""

    def key(kernel, call, *rest):
        fields = list(key_of(kernel, call, *rest))
        fields[fields.index(call.value.device)] = fake.device  # an error, if the key has no device
        return tuple(fields)

    return key


def repeats(fake, call, grad_out: Tensor, case: Case) -> int:
    """How many launches `launch.repeated` repeated, each with the same kernel, grid and arguments."""
    number = 0

    def run(kernel, call, arguments, plan):
        nonlocal number
        fake.launches.clear()
        launch.repeated(kernel, call, arguments, plan, launch.run)()
        first, second = (entry._replace(arguments=tuple(map(pointer, entry.arguments))) for entry in fake.launches)
        assert first == second, f"{case}\nfirst:  {first}\nagain: {second}"
        number += 1

    launch.forward(call, run=run)
    needs = [*case.needs[:3], case.needs[3] and call.reference_points is not None]
    launch.backward(grad_out, call, needs, deterministic=case.deterministic, run=run)
    return number


def with_results(repeated):
    """`launch.repeated` whose results are ones: a plan without any is not timed, and nothing is computed here."""

    def run(kernel, call, arguments, plan, run):
        for name in (*tuning.WRITTEN, tuning.SUMS):
            if arguments.get(name) is not None:
                arguments[name].fill_(1)
        return repeated(kernel, call, arguments, plan, run)

    return run


def pointer(x):
    return x.data_ptr() if isinstance(x, Tensor) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fake = fake_gpu.install(compiling=False)
    fake.record = True
    launch._key = on_fake_devices(fake, launch._key)
    rng = random.Random(args.seed)
    times = iter(range(10**9, 0, -1))

    def timing(function):
        function()
        return next(times)  # the last one is the fastest

    folder = tempfile.TemporaryDirectory()
    user_cache.folder = lambda: Path(folder.name)
    launch.repeated = with_results(launch.repeated)
    case, hits, kernels, again = random_case(rng), 0, set(), 0
    for number in range(args.calls):
        case = changed(rng, case) if rng.random() < 0.7 else random_case(rng)
        call, grad_out = call_of(case, rng)
        fake.device = case.device
        tuning.timing = timing if case.autotune else None
        launches_of(fake, case, call, grad_out, launch.run)  # times plans first, if it has to
        want = launches_of(fake, case, call, grad_out, launch.run)
        kept = len(launch._launches)
        got = launches_of(fake, case, call, grad_out, None)
        hits += kept == len(launch._launches)
        assert got == want, f"{case}\nmade:  {want}\nfound: {got}"
        found = launches_of(fake, case, call, grad_out, None)
        assert found == want, f"{case}\nmade:  {want}\nfound: {found}"
        kernels |= {entry.binary for entry in want}
        if number % 4 == 0:
            again += repeats(fake, call, grad_out, case)
    kept = len(launch._launches)
    print(f"{args.calls} calls, {kept} launches kept, {len(kernels)} kernels, {hits} calls found all, {again} repeated")


if __name__ == "__main__":
    main()
