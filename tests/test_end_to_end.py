"""The benchmark of whole Hugging Face models: what it runs, what it compares, and what a row says."""

import contextlib
import csv
import sys

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import DRY, FULL, MODELS, MODES, Case, Model
from msda_triton.shims import transformers as shim

CASE = Case("rt_detr", 2, "float32", "eager")


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which main sets too; as before after the test
    with pytest.raises(SystemExit) as stop:
        end_to_end.main()
    return stop.value.code


def rows(effort=DRY, case=CASE) -> dict[bool, dict]:
    return {row.get("patched"): row for row in end_to_end.guarded(case, "cpu", effort)}


def test_a_run_writes_both_rows_of_a_case(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "cases", lambda *_: [CASE])
    monkeypatch.setattr(end_to_end, "environment", lambda device: {"device": device})
    assert run(monkeypatch, "--out", str(tmp_path / "new" / "a.csv"), "--dry-run") == 0
    with (tmp_path / "new" / "a.csv").open() as file:
        unpatched, patched = csv.DictReader(file)
    assert [unpatched["patched"], patched["patched"]] == ["False", "True"]
    for row in (unpatched, patched):
        assert row["status"] == "ok" and row["device"] == "cpu" and row["image"] == "64x96"
        assert float(row["images_per_s"]) == pytest.approx(2 / float(row["seconds"]), rel=1e-2)
    ratio = float(unpatched["seconds"]) / float(patched["seconds"])
    assert float(patched["ratio"]) == pytest.approx(ratio, rel=1e-2) and unpatched["ratio"] == ""
    assert float(unpatched["error"]) == 0 and float(patched["error"]) < 1e-5


def test_a_wrong_attention_is_not_timed(monkeypatch):
    """Samples shifted by a fraction of the image, which the comparison of `patch` does not see."""

    @contextlib.contextmanager
    def shifted(name, patched, patching=end_to_end.patching, attend=shim.ms_deform_attn):
        with patching(name, patched), monkeypatch.context() as change:
            change.setattr(shim, "ms_deform_attn", lambda v, s, x, a, **names: attend(v, s, x + 0.02, a, **names))
            yield

    monkeypatch.setattr(end_to_end, "patching", shifted)
    found = rows()
    assert found[True]["status"].startswith("wrong: error ") and "seconds" not in found[True]
    assert found[False]["status"] == "ok" and "seconds" in found[False]


def test_a_model_that_was_not_patched_fails(monkeypatch):
    monkeypatch.setattr(shim, "ms_deform_attn", lambda value, *_, **__: value.new_zeros(1))
    found = rows()
    assert found[True]["status"].startswith("failed: RuntimeError: not patched: transformers.models.rt_detr")
    assert found[False]["status"] == "ok" and "seconds" in found[False]


def test_a_case_that_raises_is_one_row(monkeypatch):
    def build(name, tiny):
        raise MemoryError(f"no room\nfor {name}")

    monkeypatch.setattr(end_to_end, "build", build)
    [row] = end_to_end.guarded(CASE, "cpu", DRY)
    assert row == CASE._asdict() | {"status": "failed: MemoryError: no room for rt_detr"}


@pytest.mark.parametrize("name", MODELS)
def test_the_error_sees_an_attention_without_effect(name, monkeypatch):
    """The reference without its attention is far beyond every limit, so the check says something."""
    model, images = end_to_end.build(name, True), torch.randn(1, 3, 64, 96)
    with torch.no_grad(), end_to_end.float32_attention(name):
        reference = end_to_end.compared(MODELS[name], model(pixel_values=images))
    with torch.no_grad(), end_to_end.patching(name, True), monkeypatch.context() as change:
        attend = shim.ms_deform_attn
        change.setattr(shim, "ms_deform_attn", lambda *args, **names: 0 * attend(*args, **names))
        without = end_to_end.compared(MODELS[name], model(pixel_values=images))
    assert end_to_end.error(MODELS[name], without, reference) > max(end_to_end.LIMITS.values())


def test_errors_of_selected_queries():
    model, generator = Model((1, 1), ("features",), ("logits",)), torch.Generator().manual_seed(0)
    exact = {name: torch.randn(2, 9, 4, generator=generator) for name in ("features", "logits")}
    exact["init_reference_points"] = torch.rand(2, 9, 4, generator=generator)
    order = torch.randperm(9, generator=generator)
    got = {name: x if name == "features" else x[:, order] for name, x in exact.items()}
    assert end_to_end.error(model, got, exact) == 0
    few = got | {"logits": got["logits"].clone()}
    few["logits"][:, 0] += 1  # one query of nine
    assert end_to_end.error(model, few, exact) == 0
    scaled = got | {"features": exact["features"] + 0.5 * exact["features"].std()}
    assert end_to_end.error(model, scaled, exact) == pytest.approx(0.5, rel=1e-5)
    got["features"] = exact["features"] * float("nan")
    assert end_to_end.error(model, got, exact) != end_to_end.error(model, got, exact)


def test_the_order_of_the_cases():
    found = end_to_end.cases(FULL, MODELS, MODES)
    assert len(set(found)) == len(found) == 24
    assert [case.mode for case in found] == ["eager"] * 12 + ["compiled"] * 12
    assert found[:3] == [(model, 1, "float32", "eager") for model in MODELS]
    assert found[3] == ("deformable_detr", 8, "bfloat16", "eager")
    assert end_to_end.cases(FULL, ["rt_detr"], ["compiled"])[0] == ("rt_detr", 1, "float32", "compiled")
    assert {case.model for case in end_to_end.cases(DRY, MODELS, MODES)} == set(MODELS)


def test_the_limit_stops_before_the_next_case(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--out", str(tmp_path / "a.csv"), "--dry-run", "--limit", "1e-9") == 0
    assert "deformable_detr 2 float32 eager and what follows are left out" in capsys.readouterr().out
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.csv", "--limit", "-1"], "--limit: expected a number of seconds above 0, got '-1'"),
        (["--out", "a.csv", "--limit", "soon"], "--limit: expected a number of seconds above 0, got 'soon'"),
        (["--out", "a.txt"], "--out: expected a file that ends in .csv, got 'a.txt'"),
        (["--out", "a.csv"], "expected a GPU, or --dry-run; torch finds none"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")
