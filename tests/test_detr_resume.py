"""A run goes on with the data that it began with, wherever that lies now, and with no other unless it is told to."""

import functools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from data_changes import CHANGES, add_class, edit, renumber, swap_names
from PIL import Image
from user_files import SMALL, assert_nothing_lost, snapshot

from detr import checkpoint, record
from detr.cli import main
from detr.output import MANIFEST
from detr.run import Run
from detr.split import Images, difference
from detr.splits import load_split
from detr.visualize import plot_curves

torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A dataset, and a run that stopped after two of four steps."""
    root = tmp_path_factory.mktemp("original")
    assert main(["synth", str(root / "data"), "--train", "5", "--val", "3", "--size", "64"]) == 0
    assert main(["train", "--data", str(root / "data"), "--out", str(root / "run"), "--steps", "2", *SMALL]) == 0
    state = checkpoint.load(root / "run" / "checkpoint.pt")
    state["config"]["steps"] = 4
    torch.save(state, root / "run" / "checkpoint.pt")
    return root


@pytest.fixture
def work(original, tmp_path):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    state["data"]["data"] = str(tmp_path / "data")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    return tmp_path


def resume(work, *flags):
    return main(["train", "--resume", str(work / "run"), "--device", "cpu", *map(str, flags)])


def steps_done(work):
    return checkpoint.load(work / "run" / "checkpoint.pt")["steps_done"]


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


MUST = "classes must be those of the training"
MORE = "(and 1 more; `detr check-data` lists them)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_names, f"category 1: name: expected 'disc', got 'square' (category 2 there): {MUST} {MORE}"),
        (renumber, f"category 1: name: expected 'disc', got 'square' (category 2 there): {MUST} {MORE}"),
        (add_class, f"category 9: name: expected no such category, got 'ghost': {MUST}"),
    ],
)
@pytest.mark.parametrize("accept", [[], ["--accept-changed-data"]])
def test_other_classes_are_refused(work, capsys, change, message, accept):
    before = (work / "run" / "checkpoint.pt").read_bytes()
    for split in ("train", "val"):
        edit(work, split, change)
    assert resume(work, *accept) == 1
    assert last_line(capsys) == f"detr train: error: {work}/data/instances_train.json: {message}"
    assert (work / "run" / "checkpoint.pt").read_bytes() == before
    # and where the data was moved besides
    shutil.move(work / "data", work / "moved")
    assert resume(work, *accept) == 1
    assert f"{work}/data: the dataset of this run is no longer there: say where it is now with --data" in last_line(
        capsys
    )
    assert resume(work, "--data", work / "moved", *accept) == 1
    assert last_line(capsys) == f"detr train: error: {work}/moved/instances_train.json: {message}"


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_and_can_be_accepted(work, capsys, name):
    change, message = CHANGES[name]
    path = work / "run" / "checkpoint.pt"
    before = path.read_bytes()
    change(work)
    assert resume(work) == 1
    text = f"{path}: the data is not what this run was trained on: {message}"
    assert last_line(capsys) == f"detr train: error: {text}; --accept-changed-data goes on all the same"
    assert path.read_bytes() == before
    if name not in ("a box", "an image", "one training image less", "one validation image less"):
        return
    assert resume(work, "--accept-changed-data") == 0 and steps_done(work) == 4
    assert f"warning: {text}\n" in capsys.readouterr().err
    # from here on this is its data
    assert resume(work) == 0
    assert "the data is not" not in capsys.readouterr().err


def test_what_is_no_change(work, capsys):
    """Another way to write the json, other ids of images and boxes, other annotations of annotations."""

    def rewrite(content):
        for entry in content["images"]:
            entry |= {"id": entry["id"] + 1000, "license": 3}
        for annotation in content["annotations"]:
            annotation |= {"image_id": annotation["image_id"] + 1000, "id": annotation["id"] + 7, "segmentation": []}
        content["info"] = "new"

    for split in ("train", "val"):
        edit(work, split, rewrite)
        path = work / "data" / f"instances_{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    (work / "data" / "train" / "unused.jpg").touch()
    assert resume(work) == 0 and steps_done(work) == 4
    lines = (line for line in capsys.readouterr().err.splitlines() if "not as in" not in line)
    assert "warning: " not in "".join(line for line in lines if "warning: warmup_steps: " not in line)


def test_moved_data(work, monkeypatch, capsys):
    shutil.move(work / "data", work / "elsewhere")
    assert resume(work, "--data", work / "nowhere") == 1
    assert f"{work}/nowhere: expected the folder of the dataset of this run, found nothing there" in last_line(capsys)
    monkeypatch.chdir(work / "elsewhere")
    assert resume(work, "--data", ".") == 0 and steps_done(work) == 4
    # and it remembers where
    monkeypatch.chdir("/")
    assert resume(work) == 0
    assert checkpoint.load(work / "run" / "checkpoint.pt")["data"]["data"] == str(work / "elsewhere")


def test_a_relative_path_from_another_directory(original, tmp_path, monkeypatch):
    shutil.copytree(original / "data", tmp_path / "project" / "data")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert main(["train", "--data", "data", "--out", "runs/a", "--steps", "2", *SMALL]) == 0
    monkeypatch.chdir(tmp_path / "other")
    assert main(["train", "--resume", "../project/runs/a", "--device", "cpu"]) == 0
    # runs of the first version kept what was typed: found above the run
    path = tmp_path / "project" / "runs" / "a" / "checkpoint.pt"
    state = checkpoint.load(path)
    state["data"]["data"] = "data"
    torch.save(state, path)
    assert main(["train", "--resume", "../project/runs/a", "--device", "cpu"]) == 0


def test_a_run_without_a_record_of_its_data(work, capsys):
    path = work / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    del state["data"]["content"]
    torch.save(state, path)
    (work / "run" / MANIFEST).unlink()
    assert resume(work) == 0 and steps_done(work) == 4
    assert f"warning: {path}: has no record of its data" in capsys.readouterr().err
    state = checkpoint.load(path)
    assert state["data"]["content"]["train"]["images"] == 5
    del state["data"]["content"]
    torch.save(state, path)
    edit(work, "train", swap_names)
    edit(work, "val", swap_names)
    assert resume(work) == 1
    assert "category 1: name: expected 'disc', got 'square'" in last_line(capsys)


def test_broken_lines_of_metrics(work):
    path = work / "run" / "metrics.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines + b"\xff\xfe\n" + b"[]\n" + b'{"step": "x"}\n' + b"{}\n" + b"\n" + b'{"step": 2, "los')
    assert resume(work) == 0
    rows = record.metrics_of(path)
    assert path.read_bytes().startswith(lines) and [row["step"] for row in rows] == [2, 2, 4, 4]


NO_NUMBERS = ['{"step":1,"loss":[1]}', '{"step":1,"loss":' + "9" * 4000 + "}", '{"step":1,"AP":"x"}']


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, *NO_NUMBERS])
def test_lines_of_metrics_that_hold_no_numbers(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.5, "loss": 2.5}\n' + line + "\n")
    before = path.read_text()
    record._forget_after(path, 5)
    assert path.read_text() == before  # somebody wrote it
    assert record.metrics_of(path) == [{"step": 1, "epoch": 0.5, "loss": 2.5}]
    assert plot_curves(record.metrics_of(path)).startswith(b"\x89PNG")


def test_a_copy_of_hard_links_stays_as_it_was(work):
    shutil.copytree(work / "run", work / "copy", copy_function=os.link)
    before = snapshot(work / "copy")
    assert resume(work) == 0
    assert snapshot(work / "copy") == before


OLD_RUN = Path(__file__).parent / "fixtures" / "run_of_ccff825"


def test_a_run_without_a_manifest_takes_what_is_a_runs(tmp_path, monkeypatch, capsys):
    shutil.copytree(OLD_RUN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    flags = ["--resume", "run", "--workers", "0", "--device", "cpu"]
    evaluate = ["eval", "--data", "dataset", "--checkpoint", "run/checkpoint.pt", "--device", "cpu", "--out"]
    assert main([*evaluate, "run/eval.json"]) == 0
    before = snapshot(tmp_path)
    assert main(["train", *flags]) == 1
    assert "run/eval.json: is there already" in last_line(capsys)
    Path("run/eval.json").unlink()
    for name, content in (("curves.png", b"mine"), ("predictions.png", Path("run/config.json").read_bytes())):
        Path("run", name).write_bytes(content)
        assert main(["train", *flags]) == 1
        assert f"run/{name}: is there already" in last_line(capsys)
        assert Path("run", name).read_bytes() == content
        Path("run", name).unlink()
    del before["old/run/eval.json"]
    assert_nothing_lost(before, tmp_path)
    assert main(["train", *flags]) == 0


def test_other_weights_in_the_place_of_the_best(work, capsys):
    best, precious = work / "run" / "best.pt", work / "precious.pt"
    shutil.copy(work / "run" / "checkpoint.pt", precious)
    before = precious.read_bytes()
    for put in (lambda: shutil.copy(precious, best), lambda: best.symlink_to(precious)):
        best.unlink()
        put()
        assert resume(work) == 1
        assert f"{best}: is there already, and was changed after `detr train` wrote it" in last_line(capsys)
        assert best.read_bytes() == precious.read_bytes() == before
    # without it there is only no --resume to speak of
    (work / "run" / "checkpoint.pt").unlink()
    assert main(["train", "--data", str(work / "data"), "--out", str(work / "run"), *SMALL]) == 1
    assert last_line(capsys).endswith("best.pt: a run is here already: choose another --out")
    assert resume(work) == 1 and "the file is missing: no run to continue" in last_line(capsys)
    assert main(["train", "--resume", str(precious)]) == 1
    assert last_line(capsys).endswith("the checkpoint.pt in it, which alone can be resumed")


def test_notes_in_metrics_stay(work):
    path = work / "run" / "metrics.jsonl"
    path.write_text('# mine\n{"epoch": 1, "mine": 3}\n' + path.read_text())
    assert resume(work) == 0
    assert path.read_text().startswith('# mine\n{"epoch": 1, "mine": 3}\n{"step": 2')


def test_a_run_whose_first_steps_overflowed(work, tmp_path, monkeypatch):
    """Steps that fp16 skips leave the optimiser without a state."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**60))
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda run, batches, stop=False: step(run, batches, stop=True))
    flags = ["--steps", "2", "--amp", "fp16", "--device", "cpu", *SMALL]
    assert main(["train", "--data", str(work / "data"), "--out", str(work / "new"), *flags]) == 130
    assert not checkpoint.load(work / "new" / "checkpoint.pt")["optimizer"]["state"]
    assert main(["train", "--resume", str(work / "new"), "--device", "cpu"]) in (0, 130)


def name_bitmaps(content):
    for entry in content["images"]:
        entry["file_name"] = entry["file_name"].replace(".jpg", ".bmp")


def test_bitmaps_that_were_replaced(work, tmp_path, capsys):
    """All have one length."""
    for split in ("train", "val"):
        for path in (work / "data" / split).glob("*.jpg"):
            Image.open(path).save(path.with_suffix(".bmp"))
        edit(work, split, name_bitmaps)
    before = load_split(work / "data", "train").content()
    path = work / "data" / "train" / "000000.bmp"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    assert difference(before, load_split(work / "data", "train").content()) == "other image files"


def test_a_name_that_is_no_text(work):
    name = os.fsdecode(b"\xff.jpg")
    (work / "data" / "train" / "000000.jpg").rename(work / "data" / "train" / name)
    edit(work, "train", lambda content: content["images"][0].update(file_name=name))
    assert resume(work) == 1 and resume(work, "--accept-changed-data") == 0


def test_weights_and_biases_that_is_not_installed_here(work, capsys):
    path = work / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    state["data"]["wandb"] = {"project": "p", "id": "i"}
    torch.save(state, path)
    assert resume(work) == 0
    assert "warning: the package wandb is not installed here: the run goes on without it" in capsys.readouterr().err
    assert checkpoint.load(path)["data"]["wandb"] == {"project": "p", "id": "i"}


def test_a_result_of_another_command_in_the_folder_of_a_run(work, capsys):
    """The run was interrupted before it wrote an eval.json of its own."""
    arguments = ["eval", "--data", str(work / "data"), "--checkpoint", str(work / "run" / "best.pt")]
    assert main([*arguments, "--out", str(work / "run" / "eval.json")]) == 1
    (work / "run" / "eval.json").unlink()
    assert main([*arguments, "--out", str(work / "run" / "eval.json")]) == 0
    before = (work / "run" / "eval.json").read_bytes()
    assert resume(work) == 1
    assert f"{work}/run/eval.json: is there already, and was changed after `detr train` wrote it" in last_line(capsys)
    assert (work / "run" / "eval.json").read_bytes() == before
    (work / "run" / "eval.json").unlink()
    (work / "run" / ".detr-mine.tmp").mkdir()
    (work / "run" / "nonfinite_step3_rank0.pt").write_text("mine")
    assert resume(work) == 0
    assert (work / "run" / ".detr-mine.tmp").exists()
    assert (work / "run" / "nonfinite_step3_rank0.pt").read_text() == "mine"


@pytest.mark.parametrize(
    "lines", ['{"file":"config.json","sha256":[1],"by":"detr train"}\n', "[" * 200_000, "null\n3\n"]
)
def test_a_manifest_with_other_lines(work, lines):
    path = work / "run" / MANIFEST
    path.write_text(path.read_text() + lines)
    assert resume(work) == 0


def test_a_manifest_that_is_a_link(work, capsys):
    shutil.move(work / "run" / MANIFEST, work / "mine")
    (work / "run" / MANIFEST).symlink_to(work / "mine")
    (work / "run" / "curves.png").unlink()
    before = (work / "mine").read_bytes()
    assert resume(work) == 1
    assert "expected the list of files that detr writes, found something else" in last_line(capsys)
    assert (work / "mine").read_bytes() == before


def test_accept_is_for_a_resume(work, capsys):
    arguments = ["train", "--data", str(work / "data"), "--accept-changed-data", "--out", str(work / "new"), *SMALL]
    assert main(arguments) == 1
    assert "accept_changed_data: expected resume beside it" in last_line(capsys)


def test_files_of_somebody_else_in_the_folder_of_a_checkpoint(work, capsys):
    """A checkpoint that was copied beside other files is continued there only if none of them is in the way."""
    (work / "new").mkdir()
    shutil.copy(work / "run" / "checkpoint.pt", work / "new")
    (work / "new" / "config.json").write_text('{"mine": 1}')
    assert main(["train", "--resume", str(work / "new"), "--device", "cpu"]) == 1
    assert f"{work}/new/config.json: is there already" in last_line(capsys)
    assert (work / "new" / "config.json").read_text() == '{"mine": 1}'
    (work / "new" / "config.json").unlink()
    assert main(["train", "--resume", str(work / "new"), "--device", "cpu"]) == 0


def test_the_content_of_a_split(work):
    split = load_split(work / "data", "train")
    content = split.content()
    assert difference(content, content) == ""
    assert content == load_split(work / "data", "train").content()
    # kept as arrays, given as images
    images = list(split.images)
    random.Random(0).shuffle(images)
    again = Images(images)
    assert [image.image_id for image in again] == [image.image_id for image in images]
    for ours, theirs in zip(again, images, strict=True):
        for name in ("boxes", "labels", "areas", "crowd"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
        assert (ours.path, ours.width, ours.height) == (Path(theirs.path), theirs.width, theirs.height)
    assert again[-1].image_id == images[-1].image_id and len(again[1:3]) == 2
    with pytest.raises(IndexError):
        again[len(images)]
    # what one gives is a copy
    again[0].boxes.zero_()
    assert again[0].boxes.any()
