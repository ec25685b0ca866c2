"""What the benchmarks write: CSV, Markdown, bars; and what compares two commits. Nothing here asserts a time."""

import contextlib
import csv
import gc
import re
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from benchmarks import against, bars, overhead, report, run
from benchmarks.bench_op import Row
from benchmarks.workloads import WORKLOADS, make_inputs

H100 = Path(__file__).parent.parent / "benchmarks/results/h100"
PLACE = {"device": "a machine", "driver": "", "commit": "abc"}
ROWS = [
    Row("decoder", "local", "torch", "fwd", "float32", "wall", 10.0, 9.0, 12.0, None, 1.0),
    Row("decoder", "local", "fallback", "fwd", "float32", "wall", 2.5, 2.0, 3.0, None, 4.0),
    Row("decoder", "local", "peer", "", "float32", status="wrong: out"),
]


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "x.csv"
    file = report.RowFile(path, [field.name for field in fields(Row)], PLACE)
    for i, row in enumerate(ROWS):
        file.write(asdict(row))
        assert len(path.read_text().splitlines()) == 2 + i  # an early end loses nothing
    assert file.lines == report.read([path])
    return path


def test_csv(written):
    columns = ("provider", "p50_ms", "ratio", "peak_mib", "status", "device", "commit")
    with written.open(newline="") as file:
        lines = [tuple(line[column] for column in columns) for line in csv.DictReader(file)]
    assert lines == [
        ("torch", "10", "1", "", "ok", "a machine", "abc"),
        ("fallback", "2.5", "4", "", "ok", "a machine", "abc"),
        ("peer", "", "", "", "wrong: out", "a machine", "abc"),
    ]


def test_the_later_of_two_measurements_stays(written, tmp_path):
    later = tmp_path / "later.csv"
    later.write_text(written.read_text().replace(",2.5,", ",2.75,"))
    assert [line["p50_ms"] for line in report.read([written, later])] == ["10", "2.75", ""]


def test_markdown(written):
    lines = report.markdown(report.read([written])).splitlines()
    assert lines[2:7] == [
        "- device a machine, commit abc",
        "",
        "| workload | locations | dtype | mode | timer | torch | fallback |",
        "|---|---|---|---|---|---:|---:|",
        "| decoder | local | float32 | fwd | wall | 10 | 2.5 (4x) |",
    ]
    assert lines[-1] == "- peer, decoder, local, float32: wrong: out"


@pytest.mark.parametrize(("number", "text"), [("0.0047712", "0.00477"), ("1414.2", "1410"), ("0.99952", "1")])
def test_three_digits(number, text):
    assert report.short(number) == text


def test_every_number_of_the_page_is_in_the_csv(tmp_path, monkeypatch):
    committed = (H100 / "bars.md").read_text()
    sources = [H100 / name for name in re.search("Drawn from (.*) by", committed)[1].split(", ")]
    monkeypatch.setattr(sys, "argv", ["bars", *map(str, sources), "--out", str(tmp_path)])
    bars.main()
    page = (tmp_path / "bars.md").read_text()
    assert page == committed
    lines = [line for line in report.read(sources) if line["distribution"] == "local" and line["status"] == "ok"]
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| ") and "| workload" not in row]
    cells = [cell for row in rows for cell in re.findall(r"[\d.]+", " ".join(row[5:]))]
    numbers = [line["p50_ms"] for line in lines] + [r["ratio"] for r in lines if r["provider"] != "torch"]
    assert sorted(cells) == sorted(map(report.short, numbers))
    for line in lines:
        assert all(line[key] in page for key in ("device", "torch", "triton", "commit"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_bars():
    place = {"status": "ok", "distribution": "local", "dtype": "float32", "device": "a GPU"}
    times = [
        ("decoder", "triton", "events", 0.3), ("decoder", "triton", "wall", 0.2), ("decoder", "triton", "graph", 0.01),
        ("decoder", "fallback", "events", 4.0), ("encoder", "triton", "events", 2.0),
        ("encoder", "triton_tensors", "events", 7.0),
    ]  # fmt: skip
    lines = [
        place | {"workload": w, "provider": p, "timer": timer, "p50_ms": str(ms), "mode": "bwd"}
        for w, p, timer, ms in times
    ]
    lines.append(lines[0] | {"distribution": "uniform", "p50_ms": "99"})
    figure = bars.draw(lines)
    panel = figure.axes[1]
    assert not figure.axes[0].patches and not figure.axes[2].patches
    # of a graph where there is one; what has none beside it is hatched; other forms of ours are not drawn
    assert [(bar.get_width(), bool(bar.get_hatch())) for bar in panel.patches] == [
        (0.01, False), (4.0, True), (2.0, False)
    ]  # fmt: skip
    assert [text.get_text() for text in panel.texts] == ["0.01", "4", "2"]
    assert [line.get_xdata()[0] for line in panel.lines] == [0.2]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["decoder\nfloat32", "encoder\nfloat32"]
    assert figure.get_supxlabel().startswith("device a GPU")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "x.csv: [Errno 2] No such file or directory"),
        ("a,b\n1,2\n", "x.csv, which has no column 'workload'"),
        ("workload,distribution,dtype,provider,mode,timer,status\n", "csv: expected a time with local locations"),
    ],
)
def test_bars_of_nothing(tmp_path, monkeypatch, capsys, text, error):
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["bars", str(path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        bars.main()
    assert error in capsys.readouterr().err


def test_run_writes_its_files(tmp_path, monkeypatch, capsys):
    arguments = "--device cpu --dry-run --provider fallback --dtype float32 --repeat 0 --distribution local --out"
    monkeypatch.setattr(sys, "argv", ["run", *arguments.split(), str(tmp_path)])
    monkeypatch.setenv("MSDA_COMMIT", "of the environment")
    run.main()
    lines = report.read([tmp_path / "dry_run.csv"])
    cases = [
        (w, p, m)
        for w in ("dry_encoder", "dry_decoder")
        for p in ("torch", "fallback")
        for m in ("fwd", "bwd", "fwd+bwd")
    ]
    assert [(r["workload"], r["provider"], r["mode"]) for r in lines] == cases
    assert all(r["status"] == "ok" and float(r["p50_ms"]) > 0 and r["torch"] == torch.__version__ for r in lines)
    assert {r["commit"] for r in lines} == {"of the environment"}
    assert (tmp_path / "dry_run.md").read_text().count("| dry_") == 6
    assert (tmp_path / "dry_run.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote dry_run.csv" in capsys.readouterr().out


def test_run_ends_at_its_limit(tmp_path, monkeypatch, capsys):
    arguments = "--device cpu --dry-run --provider fallback --dtype float32 --repeat 0 --limit 0 --out"
    monkeypatch.setattr(sys, "argv", ["run", *arguments.split(), str(tmp_path)])
    run.main()
    assert len(report.read([tmp_path / "dry_run.csv"])) == 1
    assert "--limit of 0 s reached at dry_encoder local float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--provider", "mmcv"], "--provider: mmcv cannot run here; torch, torch_compiled, fallback, inductor"),
        (["--base", "no-such"], "--base: expected a commit or a folder that has msda_triton, got 'no-such'; git says:"),
    ],
)
def test_run_refuses_what_cannot_run_here(tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert error in capsys.readouterr().err


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("MSDA_COMMIT", raising=False)
    assert run.environment("cpu")["commit"] == ""
    with pytest.raises(ValueError, match="got 'HEAD'; there is no git here"):
        against.package_of("HEAD", tmp_path)
    folder = against.package_of(str(against.ROOT), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["msda_triton"]  # an older `benchmarks` must not be run
    assert (folder / "msda_triton/op.py").read_bytes() == (against.ROOT / "msda_triton/op.py").read_bytes()


def test_the_package_of_a_commit(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(against, "ROOT", tmp_path / "here")
    (tmp_path / "here/msda_triton").mkdir(parents=True)
    (tmp_path / "here/msda_triton/a.py").write_text("old")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path / "here", check=True)
    (tmp_path / "here/msda_triton/a.py").write_text("new")
    (tmp_path / "there").mkdir()
    folder = against.package_of("HEAD", tmp_path / "there")
    assert (folder / "msda_triton/a.py").read_text() == "old"


BASE = f"""
import sys
print("not an answer")
sys.modules.pop("msda_triton")
sys.path.insert(0, {str(against.ROOT)!r})
from msda_triton import ms_deform_attn_fused
from msda_triton import ms_deform_attn as now
sys.modules["msda_triton"].__file__ = __file__

def ms_deform_attn(value, *args, **options):
    if value.shape[2] == 4:
        raise RuntimeError("not written yet")
    return now(value, *args, **options)

sys.modules["msda_triton"].ms_deform_attn = ms_deform_attn
"""


@pytest.mark.long
def test_two_packages_in_turns(tmp_path):
    """The base is today's package, but for one error; so each side runs its own."""
    (tmp_path / "msda_triton").mkdir()
    (tmp_path / "msda_triton/__init__.py").write_text(BASE)
    cases = [("dry_decoder", "local", "float32"), ("tiny", "local", "float32")]
    rows = list(against.compare(tmp_path, cases, ["fallback"], "cpu", 0, time.monotonic() + 100))
    assert [(r["workload"], r["mode"], r["status"]) for r in rows] == [
        ("dry_decoder", "fwd", "ok"), ("dry_decoder", "bwd", "ok"), ("dry_decoder", "fwd+bwd", "ok"),
        ("tiny", "", "base failed: RuntimeError: not written yet"),
    ]  # fmt: skip
    for row in rows[:3]:
        assert row["ratio"] == row["base_ms"] / row["now_ms"]
        assert row["ratio_min"] <= row["ratio_max"] and set(row) == set(against.COLUMNS)


def test_a_process_that_ends_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    rows = list(against.compare(tmp_path, [("tiny", "local", "float32")], ["fallback"], "cpu", 0, time.monotonic() + 9))
    assert [row["status"] for row in rows] == ["base failed: the process ended; now failed: the process ended"]


def test_rows_of_a_loop_take_gradients(monkeypatch):
    results, seen = [], []

    def wall_us(call):
        seen.append((torch._C._is_multithreading_enabled(), gc.isenabled()))
        results.append(call())
        return 1.0

    monkeypatch.setattr(overhead, "wall_us", wall_us)
    x = make_inputs(WORKLOADS["dry_decoder"], "local", torch.float32, "cpu")
    value = x.value.requires_grad_()
    rows = dict(
        overhead.loop_rows("f", lambda: value * 2, lambda out, **kept: torch.autograd.grad(out.sum(), value, **kept))
    )
    for name, measure in rows.items():
        us = measure()
        assert us > 0 and (us == 1.0 or "its" in name)
    assert not results[0].requires_grad and results[1].requires_grad
    for (grad,) in results[2:]:
        assert torch.equal(grad, torch.full_like(value, 2))
    assert len(results) == 7 and seen == [(True, True)] * 5 + [(False, True), (True, False)]
    assert torch._C._is_multithreading_enabled() and gc.isenabled()


def test_overhead_refuses_a_commit_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(sys, "argv", ["overhead", "--against", "no-such"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with contextlib.suppress(SystemExit):
        overhead.main()
    assert "--against: expected a commit or a folder that has msda_triton, got 'no-such'" in capsys.readouterr().err
