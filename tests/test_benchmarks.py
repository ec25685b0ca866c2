"""The benchmark harness: its inputs, its gate, what it times and its arithmetic. Nothing here asserts a time."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_op, gate, memory, providers, shim_coverage, shim_speed
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS, make_inputs
from msda_triton import checks
from msda_triton.call import Call
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans
from msda_triton.reference import ms_deform_attn_reference

ROOT = Path(__file__).parent.parent
DRY = WORKLOADS["dry_encoder"]
PLAIN = ("value", "locations", "weights")


def test_workloads_are_those_of_the_design():
    shapes = {name: (w.B, w.S, w.Q, w.M, w.D, w.P) for name, w in WORKLOADS.items()}
    design = {
        "encoder": (2, 22223, 22223, 8, 32, 4),
        "decoder": (2, 22223, 300, 8, 32, 4),
        "decoder_b4": (4, 22223, 300, 8, 32, 4),
        "dino_decoder": (2, 22223, 900, 8, 32, 4),
        "mask2former_encoder": (2, 21504, 21504, 8, 32, 4),
        "rtdetr_decoder": (8, 8400, 300, 8, 32, 4),
        "bev_cross": (6, 30825, 9675, 8, 32, 8),
        "l4_encoder": (2, 5440, 5440, 8, 32, 4),
        "tiny": (1, 189, 25, 4, 16, 4),
    }
    assert {name: shapes[name] for name in design} == design


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_both_forms_of_the_inputs_agree(distribution):
    x = make_inputs(DRY, distribution, torch.float32, "cpu")
    again = x.from_offsets_and_logits()
    torch.testing.assert_close(again.locations, x.locations)
    torch.testing.assert_close(again.weights, x.weights)
    torch.testing.assert_close(x.weights.flatten(3).sum(-1), torch.ones(2, 26, 2))
    assert torch.equal(x.starts, torch.tensor([0, 20]))


def test_uniform_locations_fill_the_map():
    locations = make_inputs(WORKLOADS["tiny_encoder"], "uniform", torch.float32, "cpu").locations
    assert locations.min() >= 0 and locations.max() <= 1
    assert abs(locations.mean() - 0.5) < 0.01 and abs(locations.var() - 1 / 12) < 0.005


def test_local_locations_lie_around_the_pixel_of_the_query():
    w = WORKLOADS["tiny_encoder"]
    x = make_inputs(w, "local", torch.float32, "cpu")
    query = 16 * 16 + 8 * 3 + 5  # level 1, row 3, column 5
    assert x.reference_points[0, query, 0].tolist() == [5.5 / 8, 3.5 / 8]
    shift = (x.locations - x.reference_points[:, :, None, :, None]) * torch.tensor([(16.0, 16), (8, 8), (4, 4)])[
        :, None
    ]
    # head 0 looks along +x, head 1 of 4 along +y; point p lies p + 1 pixels away, plus noise of 2 pixels
    torch.testing.assert_close(
        shift[:, :, 0].mean((0, 1, 2)), torch.tensor([(1.0, 0), (2, 0), (3, 0), (4, 0)]), atol=0.1, rtol=0
    )
    torch.testing.assert_close(
        shift[:, :, 1].mean((0, 1, 2)), torch.tensor([(0.0, 1), (0, 2), (0, 3), (0, 4)]), atol=0.1, rtol=0
    )
    assert abs(shift[:, :, 0, :, :, 1].std() - 2) < 0.05


def test_a_distribution_that_does_not_exist():
    with pytest.raises(ValueError, match="distribution: expected one of local, uniform, got 'gauss'"):
        make_inputs(DRY, "gauss", torch.float32, "cpu")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_oracle_is_the_specification(distribution):
    x = make_inputs(DRY, distribution, torch.float32, "cpu")
    exact = gate.oracle(x, PLAIN)
    leaves = [t.double().requires_grad_() for t in (x.value, x.locations, x.weights)]
    value, locations, weights = leaves[0], leaves[1].flatten(3, 4), leaves[2].flatten(3, 4)
    out = ms_deform_attn_reference(Call(value, x.shapes, None, locations, weights, [2, 2]))
    grads = torch.autograd.grad(out, leaves, gate.gradient(x).double())
    for name, want in zip(("out", *PLAIN), (out.detach(), *grads), strict=True):
        torch.testing.assert_close(exact[name], want, rtol=1e-9, atol=1e-9)


def test_oracle_differentiates_by_offsets_and_logits():
    x = make_inputs(DRY, "local", torch.float32, "cpu")
    plain, fused = gate.oracle(x, PLAIN), gate.oracle(x, ("value", "offsets", "logits"))
    # the chain rule by hand: locations = reference + offsets / size; softmax over levels and points
    torch.testing.assert_close(fused["offsets"], plain["locations"] / x.shapes.flip(1)[:, None], rtol=1e-4, atol=1e-6)
    weights, grad = x.weights.double().flatten(3), plain["weights"].flatten(3)
    logits = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    torch.testing.assert_close(fused["logits"].flatten(3), logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", gate.LIMITS)
@pytest.mark.parametrize("name", ["torch", "fallback"])
def test_gate_passes_what_is_right(name, dtype):
    x = make_inputs(DRY, "local", dtype, "cpu")
    assert gate.check(PROVIDERS[name], x, gate.oracle(x, PLAIN)) is None


def _detached_weights(x):
    return providers.grid_sample(replace(x, weights=x.weights.detach())) + 0 * x.weights.sum()


def _double(x):
    return providers.grid_sample(x).double()


def _query_first(x):
    return providers.grid_sample(x).transpose(0, 1)


WRONG = {
    "out: relative error": lambda x: providers.grid_sample(replace(x, locations=x.locations + 0.001)),
    "out: relative error nan": lambda x: providers.grid_sample(x) * torch.nan,
    "gradient of weights: relative error 1.0e+00, limit 1e-04": _detached_weights,
    "out: expected (2, 26, 16) torch.float32, got (2, 26, 16) torch.float64": _double,
    "out: expected (2, 26, 16) torch.float32, got (26, 2, 16) torch.float32": _query_first,
}


@pytest.mark.parametrize("reason", WRONG)
def test_gate_stops_what_is_wrong(reason):
    x = make_inputs(DRY, "uniform", torch.float32, "cpu")
    assert gate.check(Provider(WRONG[reason]), x, gate.oracle(x, PLAIN)).startswith(reason)


def test_gate_stops_coordinates_in_half_precision():
    def half_coordinates(x):
        return providers.grid_sample(replace(x, locations=x.locations.to(x.value.dtype).float()))

    workload = replace(WORKLOADS["l4_encoder"], Q=64)
    x = make_inputs(workload, "uniform", torch.bfloat16, "cpu")
    assert gate.check(Provider(half_coordinates), x, gate.oracle(x, PLAIN)).startswith("out: relative error")


def test_what_is_wrong_or_fails_is_reported_and_not_timed(monkeypatch):
    def fails(x):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(PROVIDERS, "wrong", Provider(lambda x: providers.grid_sample(x) * 2))
    monkeypatch.setitem(PROVIDERS, "fails", Provider(fails))
    rows = list(bench_op.bench(DRY, "uniform", torch.float32, "cpu", ["torch", "wrong", "fails"], repeat_ms=0))
    assert [(r.provider, r.mode, r.timer) for r in rows[:3]] == [
        ("torch", mode, "wall") for mode in ("fwd", "bwd", "fwd+bwd")
    ]
    assert all(r.p20_ms <= r.p50_ms <= r.p80_ms and r.ratio == 1 for r in rows[:3])
    assert [r.status for r in rows[3:]] == [
        "wrong: out: relative error 1.0e+00, limit 1e-04",
        "failed: RuntimeError: no kernel image",
    ]
    assert all(r.p50_ms is None and r.ratio is None for r in rows[3:])


def test_a_timer_that_fails_costs_its_row_only(monkeypatch):
    def wall(call, repeat_ms):
        if names.pop(0) != "bwd":
            raise KeyError("no clock")
        return 2.0, 1.0, 3.0

    names = ["fwd", "bwd", "fwd+bwd", "fwd", "bwd", "fwd+bwd"]
    monkeypatch.setitem(bench_op.TIMERS, "wall", wall)
    rows = list(bench_op.bench(DRY, "local", torch.float32, "cpu", ["torch", "fallback"], repeat_ms=0))
    timed = ("ok", 2.0, 1.0)
    lost = ("failed: KeyError: 'no clock'", None, None)
    assert [(r.status, r.p50_ms, r.ratio) for r in rows] == [lost, timed, lost] * 2


def test_inputs_that_cannot_be_made_are_reported(monkeypatch):
    def fails(*args):
        raise MemoryError("22 GiB")

    monkeypatch.setattr(bench_op, "make_inputs", fails)
    rows = list(bench_op.bench(DRY, "local", torch.float32, "cpu", ["torch", "fallback"], repeat_ms=0))
    assert [(r.provider, r.status) for r in rows] == [(p, "failed: MemoryError: 22 GiB") for p in ("torch", "fallback")]


def test_how_a_call_is_timed():
    def timers(provider, workload, device="cuda"):
        return bench_op.timers(PROVIDERS[provider], "fwd", WORKLOADS[workload], device)

    assert timers("triton", "encoder") == timers("triton", "bev_cross") == ["events"]
    assert timers("triton", "decoder_b4") == timers("torch", "l4_encoder") == ["events", "wall", "graph"]
    assert timers("fallback", "decoder") == ["events", "wall"]
    assert timers("triton", "decoder", "cpu") == ["wall"]


@pytest.mark.parametrize(("on_gpu", "block"), [(False, ["call"]), (True, ["drain", *["call"] * 50, "drain"])])
def test_wall_time_is_of_blocks_between_empty_queues(monkeypatch, on_gpu, block):
    done = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("drain"))
    clock = iter(range(1000))
    monkeypatch.setattr(bench_op.time, "perf_counter", lambda: next(clock))
    times = bench_op.wall_ms(lambda: done.append("call"), repeat_ms=0)
    assert done == block * 4  # the first warms up
    assert times == (1e3 / block.count("call"),) * 3  # a tick of the clock for each block


@pytest.mark.parametrize("workload", ["l4_encoder", "tiny_encoder", "dry_encoder"])
@pytest.mark.parametrize(("provider", "pixels"), [("triton", True), ("triton_fused", True), ("triton_tensors", False)])
def test_encoders_may_run_rectangles_where_the_host_knows_the_sizes(monkeypatch, workload, provider, pixels):
    """Nothing is computed: the launch is looked at, and what a configuration of rectangles becomes for it."""
    launched = []
    monkeypatch.setattr(checks, "on_host", lambda x: False)  # tensors are the device's, as on a GPU
    monkeypatch.setattr(launch, "_run_directly", lambda kernel, call, arguments, plan: launched.append((call, plan)))
    x = make_inputs(WORKLOADS[workload], "local", torch.float32, "cpu")
    with torch.no_grad():
        PROVIDERS[provider].function(x)
    ((call, plan),) = launched
    kind = plans.kind_of(call, "forward")
    assert kind.pixels == pixels and (plan.BLOCK_W > 0) == pixels  # as the interpreter runs it
    shipped = {sm: plans.named_plan(plans.choose(kind._replace(few=False), sm), kind, sm) for sm in ("sm_80", "sm_90")}
    plain = provider != "triton_fused"
    assert (shipped["sm_80"].BLOCK_W > 0) == (pixels and plain) and shipped["sm_90"].BLOCK_W == 0


def test_the_baseline_comes_first():
    with pytest.raises(ValueError, match="providers: expected torch first, got fallback"):
        next(bench_op.bench(DRY, "uniform", torch.float32, "cpu", ["fallback", "torch"], repeat_ms=0))


@pytest.mark.parametrize("mode", ["bwd", "fwd+bwd"])
def test_what_is_timed_computes_all_gradients(mode):
    x = make_inputs(DRY, "uniform", torch.float32, "cpu")
    exact = gate.oracle(x, PLAIN)
    for _ in range(2):  # a second call must work as the first did
        grads = bench_op.calls("fallback", x)[mode]()
        for name, grad in zip(PLAIN, grads, strict=True):
            torch.testing.assert_close(grad.double(), exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "card, dtype, microseconds",
    [("H100", torch.float32, 98), ("H100", torch.bfloat16, 49), ("H200", torch.float32, 98)],
)
def test_bound_of_the_encoder(card, dtype, microseconds):
    # the design's table: 22.8 M corners of 32 channels through 132 * 128 bytes a clock at 1.755 GHz
    x = make_inputs(WORKLOADS["encoder"], "uniform", dtype, "cpu")
    assert round(bench_op.bound_ms(x, f"NVIDIA {card} 80GB", 132) * 1e3) == microseconds
    assert bench_op.bound_ms(x, "Some other card", 132) is None


def test_bound_of_the_decoder_is_memory():
    x = make_inputs(WORKLOADS["decoder"], "uniform", torch.float32, "cpu")
    samples = 2 * 300 * 8 * 16
    expected_bytes = 4 * (2 * 22223 * 256 + samples * 3 + 2 * 300 * 256)
    assert bench_op.bound_ms(x, "H100", 132) == pytest.approx(expected_bytes / 3350e9 * 1e3)


STAGES = "correct bench tune knobs overhead end_to_end detector hardware profile"


@pytest.mark.parametrize("arguments", [["--fast"], ["bench", "--dry-run"], ["--dry-run", "speed"]])
def test_on_gpu_script_refuses_unknown_arguments(arguments):
    done = subprocess.run(["bash", ROOT / "benchmarks/on_gpu.sh", *arguments], capture_output=True, text=True)
    usage = "usage: benchmarks/on_gpu.sh [--dry-run] [STAGE...]"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{usage}; expected stages of {STAGES}, got {arguments[-1]}\n"


def test_on_gpu_script_fits_into_nine_minutes():
    """The limits of its stages, which README repeats, and what the programs are told."""
    script = (ROOT / "benchmarks/on_gpu.sh").read_text()
    limits = {name: int(s) for name, s in re.findall(r"\[(\w+)\]=(\d+)", script)}
    total = re.search(r"^total=(\d+)$", script, re.M)[1]
    assert list(limits) == STAGES.split() and sum(limits.values()) == 540 == int(total)
    table = re.findall(r"^\| (\w+) \| (\d+) \|", (ROOT / "benchmarks/README.md").read_text(), re.M)
    assert {name: int(s) for name, s in table} == limits


def test_on_gpu_script_keeps_what_a_stage_left_when_another_fails(tmp_path):
    """With a Python that only says what it was asked for, and fails for one."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *knobs*) exit 3;; *-c*) exit 1;; esac\necho "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = ["bash", ROOT / "benchmarks/on_gpu.sh", "profile", "knobs", "tune", "overhead"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("===", "---", "-m", "all"))]
    out = tmp_path / "out"
    assert [line.split(",")[0].split(" after")[0] for line in lines] == [
        "=== tune",
        f"-m benchmarks.tune --out {out} --python {out}/table.py --limit 38 --workload encoder decoder --repeat 10",
        "--- tune: exit 0", "=== knobs", "--- knobs: exit 3",
        "=== overhead", f"-m benchmarks.overhead --out {out}/overhead.csv --limit 16",
        "--- overhead: exit 0", "=== profile", "all: 0 s",
    ]  # fmt: skip
    assert done.returncode == 1 and "something failed" in done.stdout
    assert (out / "log.txt").read_text() == done.stdout


def test_the_cost_of_every_stand_in_is_counted():
    costs = shim_speed.overheads(number=2)
    assert len(costs) >= 12 and all(isinstance(cost, float) for cost in costs.values())
    # the operator is back in its place
    assert shim_speed.shim.ms_deform_attn is shim_speed.msda_triton.functional.ms_deform_attn


def test_the_table_of_entry_points():
    collector = shim_coverage.Collector()
    collector.tests.update({"b": ["tests/t.py::one[x]", "tests/t.py::one[y]"], "a": ["tests/u.py::two"]})
    collector.results.update({"tests/t.py::one[x]": "passed", "tests/t.py::one[y]": "failed"})
    assert collector.table().splitlines()[2:] == ["| a | u.py::two | not run |", "| b | t.py::one | failed, passed |"]


def test_the_fused_operator_keeps_at_most_two_thirds_for_its_backward():
    B, S, Q, M, D, K = 2, 22223, 22223, 8, 32, 16
    points, mask = 4 * B * Q * 4 * 2, B * S
    assert memory.saved_bytes(memory.fused) == pytest.approx(
        2 * B * (S * M * D + Q * M * K * 3) + points + mask, abs=1e3
    )
    assert memory.saved_bytes(memory.fused) <= 0.65 * memory.saved_bytes(memory.unfused)
