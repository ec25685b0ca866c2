"""Training survives: what is broken is skipped, replaced or named, and a run that was killed goes on."""

import contextlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detr_runs import advance, synthetic_splits, trained
from PIL import Image
from user_files import full_disk

from detr import checkpoint, run_folder
from detr.data import validation_loader
from detr.errors import OutputError, TrainingError
from detr.evaluate import detect, evaluate
from detr.model import build_model
from detr.presets import preset
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset
from detr.visualize import draw_predictions

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
# dropout: the random state counts
SMALL = preset(
    "tiny",
    **{"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "dropout": 0.1},
    **{"image_size": 64, "max_size": 64, "batch_size": 2, "steps": 20, "warmup_steps": 5, "eval_steps": 10},
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return synthetic_splits(tmp_path_factory.mktemp("synthetic"))


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def poison(run, monkeypatch, steps):
    """Boxes that are NaN in these steps, counted from 1."""
    step = Run.step

    def poisoned(run, batches, stop=False):
        if run.steps_done + 1 in steps:
            target = batches[-1][2][-1]
            target["boxes"] = target["boxes"] * float("nan")
        return step(run, batches, stop)

    monkeypatch.setattr(Run, "step", poisoned)


@pytest.mark.filterwarnings("ignore:matching cost")
def test_a_loss_that_is_not_finite_skips_the_step(splits, tmp_path, monkeypatch):
    config = replace(SMALL, steps=8, eval_steps=None, ema=0.9)
    val = validation_loader(splits[1], config, CPU)
    run = Run(config, splits[0], CPU)
    poison(run, monkeypatch, {3, 5})
    before = {}
    for batches in itertools.islice(run.batches(), 3):
        if run.steps_done == 2:
            before = {name: tensor.clone() for name, tensor in run.state()["model"].items()}
        loss = run.step(batches).loss
    assert math.isnan(loss) and run.skipped == 1 and run.steps_done == 3
    torch.testing.assert_close(dict(run.learner.model.state_dict()), before, rtol=0, atol=0)

    run = Run(config, splits[0], CPU)
    ids = [[target["image_id"] for target in batch[2]] for [batch] in run.batches()]
    with (
        pytest.warns(UserWarning, match=r"step 3: the loss is not finite, on the images .*; the step is skipped"),
        pytest.warns(UserWarning, match=r"step 5: the loss is not finite"),
    ):
        metrics = trained(run, val, tmp_path, {})
    assert metrics["step"] == 8 and run.skipped == 0
    noted = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    files = ["nonfinite_step3_rank0.pt", "nonfinite_step5_rank0.pt"]
    assert noted == [
        {"step": step, "rank": 0, "loss": None, "image_ids": ids[step - 1], "file": file}
        for step, file in zip((3, 5), files, strict=True)
    ]
    [kept] = torch.load(tmp_path / files[0], weights_only=True)
    assert kept["images"].shape == (2, 3, 64, 64) and kept["targets"][1]["boxes"].isnan().all()
    [row] = [row for row in rows(tmp_path) if "loss" in row]
    assert math.isfinite(row["loss"])  # the mean of the steps that were made


@pytest.mark.filterwarnings("ignore:matching cost")
def test_too_many_losses_in_a_row_that_are_not_finite_end_the_run(splits, tmp_path, monkeypatch):
    config = replace(SMALL, steps=8, eval_steps=2, max_nonfinite=3)
    val = validation_loader(splits[1], config, CPU)
    run = Run(config, splits[0], CPU)
    poison(run, monkeypatch, {3, 5, 6, 7})
    with (
        pytest.raises(TrainingError, match=r"step 7: the loss is not finite, on the images \[\d, \d\].*3 such steps"),
        pytest.warns(UserWarning, match="the step is skipped"),
    ):
        trained(run, val, tmp_path, {})
    assert checkpoint.load(tmp_path / "checkpoint.pt")["steps_done"] == 6
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 4
    assert len(list(tmp_path.glob("nonfinite_step*.pt"))) == 3  # tensors of the first ones only


def test_an_overflow_of_float16_halves_the_scale(splits):
    run = Run(replace(SMALL, amp="fp16"), splits[0], CPU)
    advance(run, 1)
    before = [parameter.clone() for parameter in run.learner.model.parameters()]
    run.learner.scaler.load_state_dict(run.learner.scaler.state_dict() | {"scale": 2.0**60})
    [loss] = advance(run, 1)
    assert math.isfinite(loss) and run.skipped == 0 and run.steps_done == 2
    assert run.learner.scaler.get_scale() == 2.0**59
    torch.testing.assert_close(list(run.learner.model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("augment", ["official", "tiny"])  # images read when they are wanted, and kept in memory
def test_an_image_that_is_truncated_while_training_is_replaced(splits, tmp_path, augment):
    config = replace(SMALL, augment=augment, steps=7, eval_steps=None, eval_every=9, max_unreadable=1)
    write_dataset(tmp_path / "data", 7, 3, 64, 0)
    split = load_split(tmp_path / "data", "train")
    broken = split.images[4]
    broken.path.write_bytes(broken.path.read_bytes()[:-500])
    run = Run(config, split, CPU, workers=0)
    assert (run.dataset.cache is None) == (augment == "official")
    val = validation_loader(splits[1], config, CPU)
    with pytest.warns(UserWarning, match=f"image {broken.image_id}: {broken.path}: not a readable image") as caught:
        assert trained(run, val, tmp_path / "run", {}) is not None
    assert len([w for w in caught if "not a readable image" in str(w.message)]) == 1  # in two epochs
    assert len(run.unreadable) == 1
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["unreadable"] == run.unreadable

    second = split.images[1]
    second.path.write_bytes(second.path.read_bytes()[:-500])
    run = Run(config, split, CPU, workers=1)
    with (
        pytest.raises(TrainingError, match=r"step \d: 2 image files cannot be read, and max_unreadable is 1; "),
        pytest.warns(UserWarning, match="not a readable image"),
    ):
        advance(run, 7)


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_an_image_that_is_truncated_counts_as_missed_in_the_evaluation(tmp_path, monkeypatch, room):
    monkeypatch.setattr("detr.data.CACHE_BYTES", room)
    write_dataset(tmp_path, 1, 3, 64, 0)
    split = load_split(tmp_path, "val")
    split.images[1].path.write_bytes(split.images[1].path.read_bytes()[:-500])
    val = validation_loader(split, SMALL, CPU, workers=0)
    model = build_model(SMALL, 4)
    with pytest.warns(UserWarning, match=f"{split.images[1].path}: not a readable image.*; nothing is detected in it"):
        metrics, _ = evaluate(model, val, CPU)
    assert (metrics["images"], metrics["unreadable"]) == (3, 1)
    detections, _ = detect(model, val, CPU)
    assert [len(detections[image.image_id]["scores"]) for image in split.images] == [32, 0, 32]
    sheet = np.asarray(Image.open(io.BytesIO(draw_predictions(split, detections, metrics))))
    grey = (sheet == 128).all(2).mean(0)  # of each column: the image that cannot be read is in the third and fourth
    assert grey[660:970].mean() > 0.3 and grey[:640].max() < 0.05


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from detr import checkpoint, run_folder
from detr.config import Config
from detr.data import validation_loader
from detr.splits import load_split
from detr.run import Run
torch.set_num_threads(1)
root, out, cpu = Path(sys.argv[1]), Path(sys.argv[2]), torch.device("cpu")
config = Config.from_dict(eval(sys.argv[3]))
split = load_split(root, "train")
val = load_split(root, "val", split.categories)
save = torch.save
def kill_in_the_middle(content, file):
    save(content, file)
    file = file.file
    if content["steps_done"] == 4 and "optimizer" in content:
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = kill_in_the_middle
Run(config, split, cpu).train(validation_loader(val, config, cpu), out, {"data": str(root)})
"""


def test_killed_while_a_checkpoint_is_written_and_resumed(tmp_path):
    config = replace(SMALL, steps=6, eval_steps=2)
    data, killed, straight = (tmp_path / name for name in ("data", "killed", "straight"))
    write_dataset(data, 7, 3, 64, 0)
    split = load_split(data, "train")
    val = validation_loader(load_split(data, "val", split.categories), config, CPU)
    command = [sys.executable, "-c", KILLED, str(data), str(killed), repr(config.to_dict())]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == -signal.SIGKILL
    path = killed / "checkpoint.pt"
    state = checkpoint.load(path)
    assert state["steps_done"] == 2 and list(killed.glob(".detr-*.tmp"))
    resumed = Run(config, split, CPU)
    resumed.load_state(state, path)
    metrics = trained(resumed, val, killed, {})
    assert metrics == trained(Run(config, split, CPU), val, straight, {})
    torch.testing.assert_close(
        *(checkpoint.load(run / "checkpoint.pt")["model"] for run in (killed, straight)), rtol=0, atol=0
    )
    with run_folder.hold(killed, resume=True):
        assert not list(killed.glob(".detr-*.tmp"))


def test_a_disk_that_fills_up(splits, tmp_path, monkeypatch):
    config = replace(SMALL, steps=4, eval_steps=2)
    val = validation_loader(splits[1], config, CPU)
    path = tmp_path / "checkpoint.pt"
    step, full = Run.step, contextlib.ExitStack()

    def disk_is_full(run, batches, stop=False):
        if run.steps_done == 3:
            full.enter_context(full_disk(100_000))
        return step(run, batches, stop)

    monkeypatch.setattr(Run, "step", disk_is_full)
    with full, pytest.raises(OutputError, match=r"(best|checkpoint)\.pt: not written: File too large"):
        trained(Run(config, splits[0], CPU), val, tmp_path, {})
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*.tmp"))
    resumed = Run(config, splits[0], CPU)
    resumed.load_state(checkpoint.load(path), path)
    assert resumed.steps_done == 2
    assert trained(resumed, val, tmp_path, {})["step"] == 4


def test_a_class_without_examples_and_images_without_objects(splits, tmp_path):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing |= {"areas": torch.zeros(0, dtype=torch.float64), "crowd": torch.zeros(0, dtype=torch.bool)}
    images = [replace(image, **nothing) if i % 2 else image for i, image in enumerate(splits[0].images)]
    categories = splits[0].categories | {77: "ghost"}
    split = replace(splits[0], images=images, categories=categories)
    config = replace(SMALL, batch_size=1, steps=7, eval_steps=7)  # every other batch has no object
    val = validation_loader(replace(splits[1], categories=categories), config, CPU)
    metrics = trained(Run(config, split, CPU), val, tmp_path, {})
    assert metrics["per_class"]["ghost"]["AP"] is None and metrics["per_class"]["ghost"]["boxes"] == 0
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_more_objects_than_queries(splits):
    image = splits[0].images[0]
    many = 400
    crowded = replace(image, boxes=image.boxes[:1].repeat(many, 1), labels=image.labels[:1].repeat(many),
                      areas=image.areas[:1].repeat(many), crowd=torch.zeros(many, dtype=torch.bool))  # fmt: skip
    config = replace(SMALL, n_queries=300, batch_size=1, steps=2, two_stage=False)
    run = Run(config, replace(splits[0], images=[crowded]), CPU)
    assert all(math.isfinite(loss) for loss in advance(run, 2)) and run.skipped == 0
