"""`benchmarks.tune`: what it times, what never wins, and what it says. Kernels are stand-ins, and so is the clock."""

import csv
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gate, knobs, tune
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans

DRY = WORKLOADS["dry_encoder"]


@pytest.fixture
def runs(monkeypatch):
    """The plans that ran, in order; `runs.ms` and `runs.wrong` say what is of each."""

    class Runs(list):
        ms, wrong = {}, ()

    runs = Runs()

    def run(kernel, call, arguments, plan):
        runs.append(plan)
        for name in ("out_ptr", "grad_loc_ptr", "grad_attn_ptr", "grad_ref_ptr"):
            if arguments.get(name) is not None:
                arguments[name].fill_(2.0 if plan in runs.wrong else 1.0)
        if arguments.get("grad_value_ptr") is not None:
            assert not arguments["grad_value_ptr"].any()
            arguments["grad_value_ptr"] += 1

    def once(function, repeat_ms):
        function()
        return (runs.ms.get(runs[-1], 5.0),)

    monkeypatch.setattr(launch, "repeated", lambda *a, run=run: run(*a) or (lambda: run(*a)))
    monkeypatch.setattr(tune, "_once", once)
    monkeypatch.setattr(plans, "_FEW_ROWS", 0)
    return runs


def calls(workload=DRY):
    x = make_inputs(workload, "local", torch.float32, "cpu")
    return tune.calls_of(x), gate.gradient(x)


def test_every_configuration_is_timed_once_with_zeroed_sums(runs):
    for call in calls()[0].values():
        found = list(tune.time_call(call, calls()[1], 1.0))
        for direction, configs in plans.CONFIGS.items():
            assert sorted(name for d, _, name, _ in found if d == direction) == sorted(configs)
        assert all(ms == 5.0 for *_, ms in found)
        # once to compare and once on the clock; configurations that become one plan are one
        assert all(runs.count(plan) == 2 for plan in runs)
        runs.clear()


def test_a_wrong_configuration_has_no_time_and_never_wins(runs):
    call, grad_out = calls()[0]["triton"], calls()[1]
    rows = []
    for direction in plans.CONFIGS:
        _, named = tune.named_plans(call, direction)
        wrong = named["lanes of 8" if direction == "backward" else "many"]
        runs.wrong = (*runs.wrong, wrong)
        runs.ms = runs.ms | {wrong: 0.1, named["one warp" if direction == "forward" else "large"]: 3.0}
    with pytest.warns(UserWarning, match="not taken"):
        for direction, kind, config, ms in tune.time_call(call, grad_out, 1.0):
            case = {"workload": "w", "distribution": "d", "dtype": "t", "provider": "p"}
            rows.append(case | {"direction": direction, "kind": kind, "config": config, "ms": ms})
    by = {(row["direction"], row["config"]): row["ms"] for row in rows}
    assert by["forward", "many"] == by["backward", "lanes of 8"] == math.inf
    assert list(tune.winners(rows)) == [
        ("forward", "many", "lanes of 16", "one warp", pytest.approx(5 / 3)),
        ("backward", "many", "lanes of 16", "large", pytest.approx(5 / 3)),
    ]
    assert tune.table_lines(rows) == [
        'TABLE["forward", "many"]["cpu"] = "one warp"  # 1.667 times "lanes of 16"',
        'TABLE["backward", "many"]["cpu"] = "large"  # 1.667 times "lanes of 16"',
    ]
    for line in tune.table_lines(rows):
        compile(line, "table", "exec")


def test_rectangles_are_timed_where_queries_are_pixels(runs, monkeypatch):
    encoder, grad_out = calls()[0]["triton"], calls()[1]
    list(tune.time_call(encoder, grad_out, 1.0))
    assert any(plan.BLOCK_W for plan in runs) and not all(plan.BLOCK_W for plan in runs)
    runs.clear()
    (decoder, *_), grad_out = list(calls(WORKLOADS["dry_decoder"])[0].values()), calls(WORKLOADS["dry_decoder"])[1]
    list(tune.time_call(decoder, grad_out, 1.0))
    assert runs and not any(plan.BLOCK_W for plan in runs)
    # sizes that only the device knows are what the benchmark timed once
    tensors = encoder.changed(spatial_shapes=torch.tensor(DRY.levels), level_sizes=())
    with pytest.raises(AssertionError, match="rectangles: expected for pixels=True, got columns "):
        list(tune.time_call(tensors, calls()[1], 1.0))


def row(config, ms, workload="a", direction="forward", kind="many"):
    case = {"workload": workload, "distribution": "local", "dtype": "float32", "provider": "triton"}
    return case | {"direction": direction, "kind": kind, "config": config, "ms": ms}


def test_the_mean_slowdown_over_the_cases_decides():
    rows = [
        row("lanes of 16", 1.0), row("many", 1.5), row("not rotated", 1.2), row("large", math.inf),
        row("lanes of 16", 30.0, "b"), row("many", 10.0, "b"), row("not rotated", 11.0, "b"), row("large", 9.0, "b"),
        row("lanes of 16", math.inf, "c"), row("many", math.inf, "c"), row("not rotated", math.inf, "c"),
    ]  # fmt: skip
    means = tune.slowdowns_of(rows)["forward", "many"]
    assert means["many"] == pytest.approx((1.5 + 10 / 9) / 2) and means["large"] == math.inf
    ((_, _, shipped, best, gain),) = tune.winners(rows)
    assert (shipped, best) == ("lanes of 16", "not rotated")
    assert gain == pytest.approx((1 + 30 / 9) / (1.2 + 11 / 9))
    assert tune.table_lines([row("lanes of 16", 1.01), row("many", 1.0)]) == []  # a gain of noise


def test_the_program(runs, monkeypatch, tmp_path, capsys):
    arguments = ["--dry-run", "--workload", "dry_decoder", "--dtype", "float32", "--distribution", "local"]
    places = ["--out", str(tmp_path / "new"), "--python", str(tmp_path / "t.py")]
    monkeypatch.setattr(sys, "argv", ["tune", *arguments, *places])
    monkeypatch.setattr(tune, "device_of", lambda parser, dry_run: "cpu")
    tune.main()
    with (tmp_path / "new/tune_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(map(len, plans.CONFIGS.values()))
    assert {r["torch"] for r in rows} == {torch.__version__} and {r["ms"] for r in rows} == {"5.0"}
    assert (tmp_path / "t.py").read_text() == ""
    out = capsys.readouterr().out.splitlines()
    assert out[-2].split() == ["backward", "large", "large", "large", "1.000x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile", "2/2"], "argument --compile: expected I/N with 0 <= I < N, got 2/2"),
        (["--compile", "a"], "argument --compile: expected I/N with 0 <= I < N, got a"),
        ([], "TRITON_INTERPRET: expected 0 or unset without --dry-run, got 1"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("direction", plans.CONFIGS)
def test_knobs_are_the_table_s_plan_and_its_neighbours(direction):
    x = make_inputs(WORKLOADS["encoder"], "local", torch.bfloat16, "meta")
    call = tune.calls_of(x)["triton"]
    _, named = knobs.changed_plans(call, direction)
    names = list(named)
    assert names[0] == "table" and len(set(named.values())) == len(named) >= 10
    table = named["table"]
    assert named["warps 8"].warps == 8 and named["registers 96"].registers == 96
    assert table == plans.default_plan(plans.kind_of(call, direction), "meta") or plans.INTERPRETED
    if direction == "forward":
        assert (table.PAIRS, named["pairs 0"].PAIRS) == (2, 0)
        assert named["unroll 1"] == replace(table, UNROLL=1, PAIRS=1)
