"""`benchmarks.tune`: what it times, what never wins, and what it says. Kernels are stand-ins, and so is the clock."""

import csv
import math
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import gate, knobs, tune
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton.kernels import launch, tuning
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
        # once to compare and twice on the clock; configurations that become one plan are one
        assert all(runs.count(plan) == 3 for plan in runs)
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

    def in_runs(call, direction):
        kind, named = tune.named_plans(call, direction)
        return kind, {name: replace(plan, BLOCK_W=0) for name, plan in named.items()}

    with pytest.raises(AssertionError, match="rectangles: expected for pixels=True, got columns "):
        list(tune.time_call(encoder, calls()[1], 1.0, in_runs))
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


PROGRAM = ["tune", "--dry-run", "--workload", "dry_decoder", "--dtype", "float32", "--distribution", "local"]


@pytest.mark.parametrize("faster", [False, True])
def test_the_program(faster, runs, monkeypatch, tmp_path, capsys):
    if faster:
        monkeypatch.setattr(tune, "_once", lambda f, ms: f() or (1.0 if runs[-1].warps == 4 else 5.0,))
    places = ["--out", str(tmp_path / "new"), "--python", str(tmp_path / "t.py")]
    monkeypatch.setattr(sys, "argv", [*PROGRAM, *places])
    monkeypatch.setattr(tune, "device_of", lambda parser, dry_run: "cpu")
    tune.main()
    with (tmp_path / "new/tune_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * sum(map(len, plans.CONFIGS.values()))
    assert {r["torch"] for r in rows} == {torch.__version__} and {r["ms"] for r in rows} >= {"5.0"}
    out = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "t.py").read_text().splitlines()
    if faster:
        assert lines == out[-1 - len(lines) : -1] and len(lines) >= 2
        assert all(line.startswith('TABLE["') and '["cpu"] = ' in line and " # 5.000 times " in line for line in lines)
    else:
        assert lines == [] and out[-2] == "nothing gains 2% over TABLE"
        assert out[-3].split() == ["backward", "large", "large", "large", "1.000x"]


def test_the_limit_of_the_program(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "device_of", lambda parser, dry_run: "cpu")
    monkeypatch.setattr(sys, "argv", [*PROGRAM, "--out", str(tmp_path), "--limit", "-1"])
    tune.main()
    assert "dry_decoder local float32 and what follows are left out" in capsys.readouterr().out
    assert len((tmp_path / "tune_cpu.csv").read_text().splitlines()) == 1


def test_kernels_are_compiled_in_parts(monkeypatch):
    def of_parts(parts):
        found = []
        for part in range(parts):
            monkeypatch.setattr(tune, "compile_only", lambda plan, kernel, *a: found.append((part, str(kernel), plan)))  # noqa: B023
            tune.compile_part(part, parts, [("dry_decoder", "float32")], "cpu")
        return found

    one, three = of_parts(1), of_parts(3)
    assert len(one) >= 12 and Counter(f[1:] for f in one) == Counter(f[1:] for f in three)
    assert max(Counter(f[0] for f in three).values()) <= len(one) // 3 + 1

    def cannot(*arguments):
        raise tuning.CANNOT_RUN[0](2, 1, "shared memory")

    monkeypatch.setattr(tune, "compile_only", cannot)
    tune.compile_part(0, 1, [("dry_decoder", "float32")], "cpu")


def test_what_is_launched_of_a_fused_backward():
    """All gradients, and sums of floats, whatever the caller's program asks of PyTorch."""
    seen = []
    call, grad_out = calls()[0]["triton_fused"], calls()[1]
    torch.use_deterministic_algorithms(True)
    try:
        tune.launch_once("backward", call, grad_out, lambda k, c, arguments, p: seen.append(arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 1 and seen[0]["grad_ref_ptr"] is not None and seen[0]["scale_ptr"] is None


@pytest.mark.parametrize("direction", plans.CONFIGS)
def test_the_tables_plan_is_the_first(direction):
    call = calls()[0]["triton"]
    kind, named = tune.named_plans(call, direction)
    assert next(iter(named)) == plans.choose(kind, tune.architecture())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile", "2/2"], "argument --compile: expected I/N with 0 <= I < N, got 2/2"),
        (["--out", __file__], f"--out: expected a folder that can be made, got {__file__}: File exists"),
        (["--python", "/no/such/t.py"], "--python: expected a file in a folder that exists, got /no/such/t.py"),
        (["--compile", "a"], "argument --compile: expected I/N with 0 <= I < N, got a"),
        ([], "TRITON_INTERPRET: expected 0 or unset without --dry-run, got 1"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments:
        monkeypatch.setattr(tune, "device_of", lambda parser, dry_run: "cpu")
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


def test_knobs_are_relative_to_the_table(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(knobs, "device_of", lambda parser, dry_run: "cpu")
    count = iter(range(1, 10**6))
    monkeypatch.setattr(tune, "_once", lambda f, ms: f() or (float(next(count)),))
    monkeypatch.setattr(sys, "argv", ["knobs", "--dry-run", "--out", str(tmp_path)])
    knobs.main()
    with (tmp_path / "knobs.csv").open() as file:
        rows = list(csv.DictReader(file))
    base = {}
    for row in rows:
        first = base.setdefault((row["provider"], row["direction"]), row)
        assert first["change"] == "table"
        assert float(row["relative"]) == pytest.approx(float(row["ms"]) / float(first["ms"]), rel=1e-3)
    assert len(base) == 4 and {row["change"] for row in rows} > {"table", "warps 2"}
    monkeypatch.setattr(sys, "argv", ["knobs", "--dry-run", "--out", str(tmp_path), "--limit", "-1"])
    knobs.main()
    assert "dry_decoder bfloat16 and what follows are left out" in capsys.readouterr().out
