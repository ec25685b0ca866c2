"""The programs of benchmarks/ that need a GPU, as far as they go without one: conformance, sanitize, hardware, ncu."""

import csv
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conformance, hardware, ncu, sanitize
from benchmarks.workloads import WORKLOADS, make_inputs
from msda_triton.checks import plain_call
from msda_triton.kernels import launch, plan
from tests import fuzz

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("program", [conformance, hardware, ncu])
def test_where_nothing_can_run(program, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for interpreted, arguments, message in [
        (False, [], "expected a GPU, or --dry-run; torch finds none"),
        (False, ["--dry-run"], "--dry-run: expected TRITON_INTERPRET=1"),
        (True, [], "TRITON_INTERPRET: expected 0 or unset without --dry-run, got 1"),
    ]:
        monkeypatch.setattr("benchmarks.rehearsal.INTERPRETED", interpreted)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as error:
            program.main()
        assert error.value.code == 2 and message in capsys.readouterr().err


# conformance


def test_every_configuration_meets_every_call_and_what_ships_comes_first():
    calls, found = list(conformance.grid(False)), conformance.variants(False)
    assert len({str(variant) for variant in found}) == len(found)
    assert {str(variant.call) for variant in found[: len(calls)]} == {str(call) for call in calls}
    assert all(variant.configs is None for variant in found[: len(calls)])
    for call in calls:
        pairs = [variant.configs for variant in found[len(calls) :] if variant.call == call]
        for direction, configs in plan.CONFIGS.items():
            assert {pair[direction] for pair in pairs} == set(configs)


@pytest.fixture
def variant() -> conformance.Variant:
    """Plain bfloat16 with queries for pixels."""
    call = next(conformance.grid(True))
    return conformance.Variant(call, {"forward": "many", "backward": "lanes of 8"})


def test_a_variant_runs_its_configurations(variant, device, monkeypatch):
    plans, run = {}, launch._run_directly

    def spy(kernel, call, arguments, plan):
        plans[kernel.fn.__name__] = plan
        return run(kernel, call, arguments, plan)

    monkeypatch.setattr(launch, "_run_directly", spy)
    assert conformance.faults(variant, device) == [[], []]
    forward, backward = plans["_msda_fwd_kernel"], plans["_msda_bwd_kernel"]
    assert (forward.VEC, forward.CHUNKS, forward.BLOCK_W, forward.warps) == (4, 1, 0, 4)
    assert (backward.VEC, backward.CHUNKS, backward.BLOCK_Q, backward.warps) == (4, 2, 8, 1)


def test_a_wrong_result_is_a_fault_of_each_call(variant, device, monkeypatch):
    right = fuzz.ms_deform_attn
    monkeypatch.setattr(fuzz, "ms_deform_attn", lambda *x, **options: right(*x, **options) * 1.05)
    assert all(conformance.faults(variant, device))


def test_what_the_processes_report_is_counted(capsys):
    """One that is done, one that finds a fault and dies, and one that is killed when the time is up."""
    workers, killed = {}, []
    for number in range(3):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        workers[ours] = SimpleNamespace(
            name=str(number), exitcode=-11, join=lambda seconds: None, kill=lambda n=number: killed.append(n)
        )
        if number == 0:
            theirs.send((True, "first", [[], []]))
            theirs.send(None)
        elif number == 1:
            theirs.send((False, "second", [["out: 1 of 2 wrong", "another"]]))
            theirs.close()
        else:
            open_end = theirs  # noqa: F841
    counts = conformance.collect(workers, time.monotonic() + 0.2)
    assert (counts.passed, counts.failed, counts.variants, counts.random) == (2, 2, 1, 1) and killed == [2]
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "FAIL process 1 ended before its last variant, exit code -11",
        "FAIL second: out: 1 of 2 wrong; another",
    ]


def test_nothing_that_ran_is_no_success(monkeypatch, capsys):
    process = SimpleNamespace(start=lambda: None)
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=lambda **_: process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(conformance, "collect", lambda workers, end: conformance.Counts())
    monkeypatch.setattr(conformance, "device_of", lambda parser, dry_run: "cpu")
    monkeypatch.setattr(sys, "argv", ["conformance", "--processes", "2"])
    assert conformance.main() == 1
    assert "conformance: 0 passed, 0 failed, 0 of" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["conformance", "--processes", "0"])
    with pytest.raises(SystemExit):
        conformance.main()
    assert "--processes: expected at least 1, got 0" in capsys.readouterr().err


# sanitize


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinity in interpreted kernels
def test_sanitize_runs_all_its_calls(monkeypatch, capsys):
    for name, small in (("M", 1), ("P", 1), ("DTYPES", [(torch.float32, 2)]), ("DRY_LEVELS", [(1, 2), (1, 1)])):
        monkeypatch.setattr(sanitize, name, small)
    sanitize.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-1] == "sanitize: 7 calls done"


def test_sanitize_refuses_gradients_that_are_not_finite():
    with pytest.raises(AssertionError, match="a call: expected finite gradients"):
        sanitize.run("a call", lambda x: x.sqrt(), torch.zeros(1, requires_grad=True))
    strange = sanitize.with_strange(torch.zeros(10000))
    assert 0.1 < (strange != 0).float().mean() < 0.3 and strange.isnan().any() and strange.isinf().any()


# hardware


def test_what_each_variant_leaves_out(tmp_path, device):
    """Of the gradients of value, locations and weights, which are right and which are zero."""
    x = make_inputs(WORKLOADS["dry_decoder"], "local", torch.float32, device)
    call = plain_call(x.value, x.workload.levels, x.locations, x.weights)
    grad_out, needs = torch.randn(1, 3, 16, device=device), [True, True, True, False]
    right = launch.backward(grad_out, call, needs)[:3]
    assert all(x.any() for x in right)
    found = {name: hardware.patched(name, tmp_path).backward(grad_out, call, needs)[:3] for name in hardware.PATCHES}
    same = {
        name: [torch.allclose(x, y, atol=1e-6) for x, y in zip(grads, right, strict=True)]
        for name, grads in found.items()
    }
    assert same["base"] == [True, True, True]
    assert same["no_adds"] == [False, True, True] and not found["no_adds"][0].any()
    assert same["adds_only"][0]
    assert not any(x.any() for x in found["no_samples"])


COMPILE = """
import json, re, sys
from pathlib import Path
from unittest import mock
from benchmarks import compile_table, hardware

counts = {}
for name in hardware.PATCHES:
    compile_table.launch_of.cache_clear()
    with mock.patch.object(compile_table, "launch", hardware.patched(name, Path(sys.argv[1]))):
        compiled = compile_table.compile_case(compile_table.Case("backward", "plain", "fp32", 32, "many", "sm_90"))
    ptx = compiled.asm["ptx"]
    counts[name] = [len(re.findall(p, ptx)) for p in (r"\\b(?:red|atom)\\.", r"\\bld\\.global", r"\\bst\\.global")]
    assert compiled.asm["cubin"]
print(json.dumps(counts))
"""


@pytest.mark.long
def test_variants_compile_and_leave_out_what_they_say(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    adds, loads, stores = counts["base"]
    assert adds and loads and stores
    assert counts["no_adds"] == [0, loads, stores]
    assert counts["adds_only"][0] == adds and counts["adds_only"][1] < loads and counts["adds_only"][2] < stores
    assert counts["no_samples"] == counts["base"]


def test_a_patch_that_does_not_apply(monkeypatch, tmp_path):
    monkeypatch.setitem(hardware.PATCHES, "old", [("backward.py", "no such text", "")])
    with pytest.raises(ValueError, match=r"patch old of backward.py: expected once, found 0 times: no such text"):
        hardware.patched("old", tmp_path)


def test_a_variant_that_fails_is_a_row(monkeypatch, tmp_path):
    def backward(name):
        if name == "no_adds":
            raise RuntimeError("no\nway")
        return SimpleNamespace(backward=lambda *_: None)

    monkeypatch.setattr(hardware, "patched", lambda name, folder: backward(name))
    assert not hardware.write_variants(tmp_path / "variants.csv", "cpu", 0, math.inf)
    with (tmp_path / "variants.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and [row["distribution"] for row in rows] == ["local"] * 8 + ["uniform"] * 8
    for row in rows:
        failed = row["variant"] == "no_adds"
        assert row["status"] == ("failed: RuntimeError: no" if failed else "ok") and bool(row["p50_ms"]) != failed


def test_micro_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hardware.shutil, "which", lambda *_, **__: None)
    assert not hardware.write_micro(tmp_path / "micro.csv", True, 1)
    assert "micro: expected nvcc on the PATH" in capsys.readouterr().out
    monkeypatch.setattr(hardware.shutil, "which", lambda *_, **__: "false")
    assert not hardware.write_micro(tmp_path / "micro.csv", False, 9)
    assert "micro: CalledProcessError" in capsys.readouterr().out


# ncu

WIDE = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","launch__grid_size"
"","","ns",""
"0","_msda_fwd_kernel","1,234","8"
"1","_msda_bwd_kernel","5678","16"
"""


def test_a_metric_a_line_and_a_kernel_a_column():
    assert ncu.tidy(WIDE, ["forward", "backward"]) == [
        ["metric", "forward", "backward"], ["gpu__time_duration.sum", "1234", "5678"], ["launch__grid_size", "8", "16"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected 1 launches, got 2"):
        ncu.tidy(WIDE, ["forward"])
    assert ncu.tidy("==ERROR== no", []) == [["metric"]]


def test_metrics_that_ncu_does_not_know_are_left_out():
    listing = "Device\n\ngpu__time_duration   the time\nlts__t_sectors  sectors\n"
    assert [m for m in ncu.known_metrics(listing) if not m.startswith("launch__")] == [
        "gpu__time_duration.sum", "lts__t_sectors.sum", "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    ]  # fmt: skip
    assert ncu.known_metrics("==ERROR== usage") == list(ncu.METRICS)


def test_a_launch_that_fails_takes_no_other_with_it(monkeypatch, capsys):
    monkeypatch.setattr(ncu, "launches", lambda device: [("one", lambda: 1 / 0), ("two", lambda: None)])
    ncu.launch_all("cpu")
    assert capsys.readouterr().out == "failed: one: ZeroDivisionError: division by zero\nprofiled: two\n"


def test_the_four_kernels_that_ship():
    names = [name for name, _ in ncu.launches("cpu")]
    assert [name.split()[:2] for name in names] == [
        [direction, dtype] for direction in ("forward", "backward") for dtype in ("bfloat16", "float32")
    ]
    assert all(" ".join(name.split()[2:]) in plan.CONFIGS[name.split()[0]] for name in names)


def test_what_a_command_printed_before_its_time_was_up():
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert ncu.output_of([sys.executable, "-c", code], 1).split("\n", 1)[0] == "begun"
    assert ncu.output_of(["sh", "-c", "echo out; echo err >&2"], 5) == "out\nerr\n"
