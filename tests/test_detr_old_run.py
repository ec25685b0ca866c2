"""A run that commit ccff825 began: it must load, say the same and resume, whatever changes after it.

The fixture is `tiny` with d_model 32 and one decoder layer (0.49 M parameters, 2.3 MB), stopped after two of four
steps, its six images of 64 x 64 pixels, what it says of the two of validation, and what ccff825 logged at step 4.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from detr import checkpoint, load
from detr.cli import main
from detr.data import validation_loader
from detr.splits import load_split

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_ccff825"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_logits_and_boxes(backend):
    cpu = torch.device("cpu")
    detector = load(FIXTURE / "run" / "checkpoint.pt", cpu)
    for module in detector.model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    split = load_split(FIXTURE / "dataset", "val", dict(zip(detector.category_ids, detector.classes, strict=True)))
    [(images, mask, _)] = validation_loader(split, detector.config, cpu, 0)
    with torch.no_grad():
        outputs = detector.model(images, mask)
    for name in ("logits", "boxes"):
        torch.testing.assert_close(outputs[name], torch.tensor(EXPECTED[name]), rtol=0, atol=1e-5)


def test_resumes(tmp_path, monkeypatch):
    shutil.copytree(FIXTURE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")  # the run names its data relative to there
    assert main(["train", "--resume", "run", "--workers", "0", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 4 and "loss" in row)
    wanted = {name: EXPECTED["step_4"][name] for name in EXPECTED["step_4"]}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert checkpoint.load(Path("run/checkpoint.pt"))["steps_done"] == 4
