"""Random calls of the operator, compared with an oracle that shares no code with the package: NumPy in float64.

    python -m tests.fuzz --backend torch --calls 10000
    python -m tests.fuzz --backend triton --calls 1500        # interpreted
    python -m tests.fuzz --backend triton --device cuda       # compiled and run on a GPU

A call is any that the docstrings allow: sizes from 0, every dtype in every place, strides, forms of the sizes, levels
out of order, overlapping or apart, plain and fused, bilinear and discrete, deterministic, under autocast, after a dry
run under another mode, with NaN, infinity and huge numbers in every tensor. All memory around value and between its
levels is NaN. `test_fuzz.py` runs some of them.
"""

import argparse
import contextlib
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch

if __name__ == "__main__" and not torch.cuda.is_available():  # before Triton decorates a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
from torch import Tensor

from msda_triton import ms_deform_attn, ms_deform_attn_fused
from tests.fuzz_calls import Call, Inputs, calls, make_inputs
from tests.fuzz_oracle import difference, fixed_point, oracle
from tests.interpreter import patch_the_language_once_a_launch

BATCH = 50  # calls, from a seed of their own
BACKENDS = ("torch", "triton", "inductor", "exported")
NAMES = ("out", "grad of value", "grad of locations", "grad of weights", "grad of reference points")


def sizes_in_form(call: Call, x: Inputs):
    """spatial_shapes and level_start_index as a caller may give them."""
    given = call.starts != "none"
    if call.form in ("tuples", "lists"):
        kind = tuple if call.form == "tuples" else list
        return kind(kind(s) for s in call.levels), kind(x.first) if given else None
    if call.form == "array":
        return np.array(call.levels), np.array(x.first) if given else None
    dtype = getattr(torch, call.form)
    sizes = torch.tensor(call.levels, dtype=dtype, device=x.memory.device)
    return sizes, torch.tensor(x.first, dtype=dtype, device=x.memory.device) if given else None


def run(call: Call, x: Inputs, backend: str, inputs: list[Tensor | None]) -> Tensor:
    value, locations, weights, reference = inputs
    shapes, starts = sizes_in_form(call, x)
    options = {"level_start_index": starts, "method": call.method}
    if backend == "exported":
        with mock.patch("torch.compiler.is_exporting", lambda: True):
            return run(call, x, "torch", inputs)
    options["backend"] = backend
    if call.listed:
        options["num_points"] = list(call.points)
    else:
        L, P = len(call.levels), call.points[0]
        locations, weights = locations.unflatten(3, (L, P)), weights.unflatten(3, (L, P))
    if reference is None:
        return ms_deform_attn(value, shapes, locations, weights, **options)
    return ms_deform_attn_fused(value, shapes, reference, locations, weights, value_mask=x.mask, **options)


def try_before(call: Call, x: Inputs, backend: str) -> None:
    """A call with the same sizes under another mode, or a wrong one; neither may leave anything behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = [x.value, x.locations, x.weights, x.reference]
    if call.before == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # the value of a mode's own sizes is known only where they are listed
            listed = Call(**{**vars(call), "form": "lists"})
            fake = [None if t is None else mode.from_tensor(t) for t in inputs]
            masked = Inputs(**{**vars(x), "mask": None if x.mask is None else mode.from_tensor(x.mask)})
            assert run(listed, masked, backend, fake).shape == x.grad_out.shape
    elif call.before == "meta default":
        torch.set_default_device("meta")
        try:
            run(call, x, backend, inputs)
        finally:
            torch.set_default_device(None)
    elif call.before == "functionalize":
        torch.func.functionalize(lambda *t: run(call, x, backend, [*t, *inputs[len(t) :]]))(*inputs[:3])
    elif call.before == "inference":
        with torch.inference_mode():
            run(call, x, backend, inputs)
    elif call.before == "wrong":
        wrong = {"num_points": [float(n) for n in call.points]} if call.listed else {}
        sizes = [tuple(float(n) for n in size) for size in call.levels]
        try:
            ms_deform_attn(x.value, sizes, x.locations, x.weights, **wrong)
        except (TypeError, ValueError):
            return
        raise AssertionError("sizes or points that are floats were accepted")


def results(call: Call, x: Inputs, backend: str) -> list[Tensor | None]:
    """out and the gradients that were asked for."""
    tensors = [x.value, x.locations, x.weights, x.reference]
    wanted = [t is not None and need for t, need in zip(tensors, call.needs, strict=True)]
    inputs = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]

    def autocast(part: str):
        on = call.autocast in (part, "both")
        device = x.memory.device.type
        return torch.autocast(device, call.autocast_dtype) if on else contextlib.nullcontext()

    with autocast("forward"):
        out = run(call, x, backend, inputs)
    if not any(wanted):
        assert not out.requires_grad
        return [out, None, None, None, None]
    with autocast("backward"):
        grads = iter(torch.autograd.grad(out, [t for t, w in zip(inputs, wanted, strict=True) if w], x.grad_out))
    return [out.detach(), *(next(grads) if w else None for w in wanted)]


def on_device(x: Inputs, device: str) -> Inputs:
    """The same numbers in the same layouts."""
    memory = x.memory.to(device)
    tensors = {name: t.to(device) for name, t in vars(x).items() if isinstance(t, Tensor)}
    value = memory.as_strided(x.value.shape, x.value.stride(), x.value.storage_offset())
    return replace(x, **tensors | {"memory": memory, "value": value})


def faults(call: Call, backend: str, device: str = "cpu") -> list[str]:
    """What is wrong with a call's results, in a line each."""
    x = make_inputs(call)
    memory = x.memory.clone()
    want = oracle(call, x)
    tensors = [x.grad_out, x.value, x.locations, x.weights, x.reference]
    double = any(t.dtype == torch.float64 for t in tensors[1:] if t is not None)
    if backend == "triton" and call.deterministic and call.method == "default":
        fixed_point(call, x, want[1], torch.float64 if double else torch.float32)
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        x = x if device == "cpu" else on_device(x, device)
        try_before(call, x, backend)
        got = [None if t is None else t.cpu() for t in results(call, x, backend)]
        found = [] if same_bits(memory, x.memory.cpu()) else ["value, or what lies around it, was written to"]
        for name, like, result, number in zip(NAMES, tensors, got, want, strict=False):
            if result is not None and (fault := difference(result, like, number, double)):
                found.append(f"{name}: {fault}")
        return found
    except Exception as error:  # whatever comes is a fault to count
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25)) and torch.equal(a.isnan(), b.isnan())


def draw(number: int, seed: int, small: bool, check: Callable[[Call], None]) -> None:
    """Hand so many calls of a seed to check, one after the other."""
    examples = hypothesis.settings(
        max_examples=number, deadline=None, database=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    random = hypothesis.given(call=calls(small=small))(lambda call: check(call))
    hypothesis.seed(seed)(examples(random))()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help='"exported": as torch.export sees it')
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="no batch of calls begins later (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the calls (default: %(default)s)")
    parser.add_argument("--show", type=int, default=5, help="wrong calls that are printed whole (default: %(default)s)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_the_language_once_a_launch()
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of the interpreted kernels
    wrong, kinds, begin = [], Counter(), time.perf_counter()

    def count(call: Call) -> None:
        kinds.update(["calls", call.method, "fused" if call.fused else "plain", *["strange contents"] * any(call.wild)])
        if found := faults(call, args.backend, args.device):
            wrong.append((call, found))
            if len(wrong) <= args.show:
                print(call, *found, sep="\n    ", flush=True)

    for batch in range(0, args.calls, BATCH):
        if time.perf_counter() - begin > args.seconds:
            break
        draw(min(BATCH, args.calls - batch), args.seed + batch, args.backend == "triton", count)
    sorts = Counter(re.sub(r"\d+ of \d+ ", "", line.split(", at")[0])[:100] for _, lines in wrong for line in lines)
    for what, number in sorts.most_common():
        print(f"{number:6} {what}")
    shares = ", ".join(f"{n} {name}" for name, n in kinds.most_common())
    print(f"{args.backend} on {args.device}: {shares}: {len(wrong)} wrong, in {time.perf_counter() - begin:.0f} s")
    return min(len(wrong), 1)


if __name__ == "__main__":
    raise SystemExit(main())
