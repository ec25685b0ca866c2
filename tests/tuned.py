"""What tests of `set_autotune` share: calls, stand-ins for the kernels and for `do_bench`, and the right results.

The one for the kernels writes and adds what the oracle says, the one for `do_bench` says how long a plan takes.
"""

import pytest
import torch
from attention import oracle, oracle_gradients

from msda_triton import user_cache
from msda_triton.checks import plain_call
from msda_triton.kernels import launch, tuning
from msda_triton.kernels import plan as plans

LEVELS = [(3, 4), (2, 2)]
ALL = [True, True, True, False]
NAMES = {"forward": ("out_ptr",), "backward": ("grad_value_ptr", "grad_loc_ptr", "grad_attn_ptr")}


class Clock:
    """The runs of plans, and the milliseconds that each is said to take."""

    def __init__(self):
        self.ms, self.timed, self.runs = {}, [], []
        self.spoil = None  # (plan, what it does to the arguments after its run)
        self.results = {}  # by argument

    def run(self, kernel, call, arguments, plan):
        sums = arguments.get("grad_value_ptr")
        self.runs.append((plan, None if sums is None else bool((sums == 0).all())))
        for name, result in self.results.items():
            arguments[name].add_(result) if name == tuning.SUMS else arguments[name].copy_(result)
        if self.spoil is not None and self.spoil[0] == plan:
            self.spoil[1](arguments)

    def time(self, call):
        for _ in range(3):
            call()
        plan = self.runs[-1][0]
        self.timed.append(plan)
        return self.ms.get(plan, 5.0)


def start(monkeypatch, tmp_path) -> Clock:
    """Autotuning on, with a cache of its own; calls count as large ones."""
    clock = Clock()
    monkeypatch.setattr(plans, "INTERPRETED", False)
    monkeypatch.setattr(plans, "_FEW_ROWS", 0)
    monkeypatch.setattr(user_cache, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tuning, "timing", clock.time)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(launch, "_launches", {})
    plans.choose.cache_clear()
    return clock


def tensors(B=1, M=2, Q=16, D=32, P=2, dtype=torch.float32):
    """value, locations, weights, grad_out."""
    rng = torch.Generator().manual_seed(0)
    L, S = len(LEVELS), sum(h * w for h, w in LEVELS)
    value = torch.randn(B, S, M, D, generator=rng).to(dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=rng) * 1.2 - 0.1
    weights = torch.rand(B, Q, M, L, P, generator=rng).to(dtype)
    return value, locations, weights, torch.randn(B, Q, M * D, generator=rng).to(dtype)


def call_of(**sizes):
    value, locations, weights, grad_out = tensors(**sizes)
    return plain_call(value, LEVELS, locations, weights), grad_out


def go(direction, clock, **sizes):
    """A call of one direction: its results."""
    call, grad_out = call_of(**sizes)
    clock.results = dict(zip(NAMES[direction], wanted(direction, **sizes), strict=True))
    if direction == "forward":
        return (launch.forward(call, run=clock.run),)
    return launch.backward(grad_out, call, ALL, run=clock.run)[:3]


def candidates(direction, **sizes):
    call, _ = call_of(**sizes)
    return plans.timed_plans(plans.kind_of(call, direction), "cpu")


def wanted(direction, **sizes):
    value, locations, weights, grad_out = tensors(**sizes)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    out, *grads = oracle_gradients(lambda v, x, a: oracle(v, LEVELS, x, a), inputs, grad_out)
    return (out,) if direction == "forward" else grads


def assert_right(direction, got, dtype=torch.float32, **sizes):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip(got, wanted(direction, dtype=dtype, **sizes), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())


BOTH = pytest.mark.parametrize("direction", ["forward", "backward"])
