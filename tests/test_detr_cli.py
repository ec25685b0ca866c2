"""The command from end to end: every file of a run, every error in one line."""

import importlib.machinery
import json
import runpy
import shutil
import sys
import types
from urllib.error import URLError

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detr import demo
from detr.cli import main
from detr.config import Config

torch.set_num_threads(1)  # test processes share the cores
SMALL = ["--set", "d_model=32", "--set", "n_heads=2", "--set", "ffn_dim=32", "--image-size", "64", "--batch-size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    assert main(["synth", str(root), "--train", "6", "--val", "4", "--size", "64", "--seed", "3"]) == 0
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "new"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "2", *SMALL]) == 0
    return out


def test_the_files_of_a_run(data, run):
    names = {path.name for path in run.iterdir()}
    [events] = [name for name in names if name.startswith("events.out.tfevents")]
    assert names - {events} == {
        *("config.json", "metrics.jsonl", "checkpoint.pt", "best.pt", "eval.json", "curves.png", "predictions.png"),
        *(".detr-files.jsonl", ".detr-lock"),
    }
    record = json.loads((run / "config.json").read_text())
    config = Config.from_dict(record["config"])
    assert (config.name, config.d_model, config.image_size, config.batch_size, config.steps) == ("tiny", 32, 64, 2, 2)
    assert record["data"].keys() == {"data", "content", "format"} and record["data"]["data"] == str(data)
    assert [record["data"]["content"][name]["images"] for name in ("train", "val")] == [6, 4]
    assert record["classes"] == {"1": "disc", "2": "square", "3": "triangle", "4": "star"}

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {"loss", "loss_ce", "loss_bbox", "loss_giou", "grad_norm", "lr", "seconds_per_step"}
    assert [row["step"] for row in rows] == [2, 2]
    assert losses <= rows[0].keys() and all(rows[0][name] > 0 for name in losses - {"lr"})
    assert {"AP", "AP50", "AP75", "AR100"} <= rows[1].keys()

    metrics = json.loads((run / "eval.json").read_text())
    assert metrics["AP"] == rows[1]["AP"] and metrics["step"] == 2 and metrics["best_AP"] == metrics["AP"]
    assert list(metrics["per_class"]) == list(record["classes"].values())

    board = EventAccumulator(str(run)).Reload()
    assert board.Scalars("loss")[0].value == pytest.approx(rows[0]["loss"], rel=1e-6)
    assert board.Scalars("AP")[0].step == 2

    last, best = (torch.load(run / name, weights_only=True) for name in ("checkpoint.pt", "best.pt"))
    assert last["steps_done"] == 2 and last["category_ids"] == [1, 2, 3, 4]
    torch.testing.assert_close(last["model"], best["model"], rtol=0, atol=0)
    assert "optimizer" in last and "optimizer" not in best
    for name in ("curves.png", "predictions.png"):
        pixels = np.asarray(Image.open(run / name).convert("RGB"))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 1000 and pixels.std() > 10


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
def test_eval_repeats_the_metrics_of_the_training(data, run, tmp_path, capsys, name):
    out = tmp_path / "metrics.json"
    assert main(["eval", "--data", str(data), "--checkpoint", str(run / name), "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ]" in table
    assert "triangle" in table
    metrics, trained = json.loads(out.read_text()), json.loads((run / "eval.json").read_text())
    assert metrics["images"] == 4
    for key in ("AP", "AP50", "AR100", "per_class"):
        assert metrics[key] == trained[key]


def test_eval_says_what_it_leaves_out(data, run, tmp_path, capsys):
    arguments = ["eval", "--data", str(data), "--checkpoint", str(run / "best.pt"), "--out"]
    content = {}
    for n in (30, 100, 150):  # of 50 queries and 4 classes
        capsys.readouterr()
        assert main([*arguments, str(tmp_path / f"{n}.json"), "--max-dets", str(n)]) == 0
        said = "left out: 80 detections of 4 images, those beyond the best 30 of each (--max-dets counts more)"
        assert (said in capsys.readouterr().out) == (n == 30)
        content[n] = json.loads((tmp_path / f"{n}.json").read_text())
        assert (content[n]["max_dets"], content[n]["left_out"]) == (n, 80 if n == 30 else 0)
        assert f"AR{n}" in content[n]
    assert content[150]["AR150"] >= content[100]["AR100"] >= content[30]["AR30"]
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "0.json"), "--max-dets", "0"])


def test_predict(data, run, tmp_path):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(run / "best.pt"), "--out", str(out), "--threshold", "0"]
    assert main(["predict", str(data / "val"), *arguments]) == 0
    results = json.loads((out / "predictions.json").read_text())
    assert [result["file"] for result in results] == [str(data / "val" / f"{i:06d}.jpg") for i in range(4)]
    for result in results:
        assert len(result["detections"]) == 50  # as many as there are queries
        assert {row["category_id"] for row in result["detections"]} <= {1, 2, 3, 4}
        scores = [row["score"] for row in result["detections"]]
        assert scores == sorted(scores, reverse=True)
    assert Image.open(out / "000003.jpg").size == (64, 64)
    (data / "val" / "broken.jpg").write_text("x")
    assert main(["predict", str(data / "val"), *arguments]) == 1
    (data / "val" / "broken.jpg").unlink()


def test_resume_of_a_finished_run_changes_nothing(run, capsys):
    files = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "checkpoint.pt", "eval.json")}
    assert main(["train", "--resume", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in files} == files
    assert main(["train", "--resume", str(run), "--lr", "1"]) == 1
    out, error = capsys.readouterr()
    assert f"finished already, at step 2; to go on, start a run with --weights {run}/best.pt" in out
    assert "resume: the run goes on as it was: lr cannot be changed" in error
    assert main(["train", "--resume", str(run), "--out", "elsewhere"]) == 1
    assert "resume: the run goes on as it was: out cannot be changed" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--preset", "tiny"]) == 1
    assert "resume: the run goes on as it was: preset cannot be changed" in capsys.readouterr().err


def test_weights_of_another_label_set(data, run, tmp_path, capsys):
    content = coco_files.content()
    content["categories"] = [{"id": 4, "name": "bee"}, {"id": 8, "name": "star"}]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = 4 if i % 2 else 8
    for split in ("train", "val"):
        coco_files.write(tmp_path / "data", content, split)
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--steps", "1", "--lr", "0", *SMALL]
    assert main(["train", "--weights", str(run / "best.pt"), *arguments]) == 0
    old, new = (torch.load(path / "best.pt", weights_only=True)["model"] for path in (run, tmp_path / "run"))
    assert new["class_embed.1.weight"].shape == (2, 32)
    torch.testing.assert_close(new["class_embed.1.weight"][1], old["class_embed.1.weight"][3], rtol=0, atol=0)
    torch.testing.assert_close(new["bbox_embed.0.layers.0.weight"], old["bbox_embed.0.layers.0.weight"], rtol=0, atol=0)
    # and two-stage weights do not fit silently
    capsys.readouterr()
    (tmp_path / "other.pt").write_text("x")
    assert (
        main(["train", "--weights", str(tmp_path / "other.pt"), *arguments[:2], "--out", str(tmp_path / "b"), *SMALL])
        == 1
    )
    assert f"detr train: error: {tmp_path / 'other.pt'}:" in capsys.readouterr().err


def test_names_that_would_move_the_cursor_of_a_terminal(data, run, tmp_path, capsys):
    for split in ("train", "val"):
        content = coco_files.content()
        content["categories"] = [{"id": 4, "name": "\x1b[31mbee\n"}, {"id": 8, "name": "\x9bst\u00e4r\r"}]
        for i, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = 4 if i % 2 else 8
        coco_files.write(tmp_path / "data", content, split)
    place, out = str(tmp_path / "data"), tmp_path / "run"
    best = str(out / "best.pt")
    image = str(next((tmp_path / "data").rglob("*.[jp][pn]g")))
    assert main(["check-data", place, "--image-size", "64"]) in (0, 1)
    assert main(["train", "--data", place, "--out", str(out), "--steps", "1", "--weights", str(run), *SMALL]) == 0
    assert main(["eval", "--data", place, "--checkpoint", best]) == 0
    assert main(["inspect", best]) == 0
    assert main(["inspect", best, "--image", image, "--out", str(tmp_path / "x.png")]) == 0
    assert main(["convert", place, str(tmp_path / "yolo"), "--to", "yolo"]) == 0
    assert main(["eval", "--data", place, "--checkpoint", f"{tmp_path}/\x1b[31m"]) == 1
    # names of folders, of splits and of tensors
    odd = tmp_path / "a\x1bb\u202ec"
    content = torch.load(run / "best.pt", weights_only=True)["model"] | {"\x1b[31mevil\r0": torch.zeros(1)}
    torch.save({"model": content}, tmp_path / "weights.pt")
    assert main(["synth", str(odd / "data"), "--train", "4", "--val", "2", "--size", "64"]) == 0
    names = [f"{odd}/data/instances_{split}.json" for split in ("val", "\x1b[31mx")]
    shutil.copytree(odd / "data" / "val", odd / "data" / "\x1b[31mx")
    shutil.copy(*names)
    weights = ["--weights", str(tmp_path / "weights.pt"), "--steps", "1", *SMALL]
    assert main(["train", "--data", str(odd / "data"), "--out", str(odd / "run"), *weights]) == 0
    assert main(["train", "--resume", str(odd / "run")]) == 0
    assert main(["check-data", str(odd / "data"), "--image-size", "64"]) == 0
    assert main(["convert", str(odd / "data"), str(odd / "coco")]) == 0
    assert main(["eval", "--data", str(odd / "data"), "--checkpoint", str(odd / "run")]) == 0
    inputs = ["--checkpoint", str(odd / "run"), "--out", str(odd / "found"), str(odd / "data" / "val")]
    assert main(["predict", *inputs]) == 0
    captured = capsys.readouterr()
    # two splits of check-data, the tables of train and eval, inspect twice
    assert all(captured.out.count(name) >= 6 for name in ("\\x1b[31mbee\\n", "\\x9bst\u00e4r\\r"))
    assert "skipped 1: \\x1b[31mevil\\r0" in captured.out and "images of \\x1b[31mx" in captured.out
    strange = {c for c in captured.out if ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e"}
    assert strange == {"\n"}
    assert "\x1b[31m" not in captured.err and "\\x1b[31m: " in captured.err


def test_a_real_backbone_from_random_weights_exported(data, tmp_path, capsys, monkeypatch):
    out, exported = tmp_path / "run", tmp_path / "official.pth"
    small = ["--epochs", "1", "--batch-size", "6", "--image-size", "64", "--workers", "0"]
    small += [text for field in ("backbone=resnet18", "enc_layers=1", "dec_layers=1") for text in ("--set", field)]
    arguments = ["--data", str(data), "--preset", "deformable_detr_r50_two_stage", "--out", str(out), *small]
    assert main(["train", "--no-pretrained", *arguments]) == 0
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["steps"], config["epochs"], config["max_size"]) == (None, 1, 107)
    assert main(["export", "--checkpoint", str(out / "best.pt"), "--to", "official", "--out", str(exported)]) == 0
    ours = torch.load(out / "best.pt", weights_only=True)["model"]
    theirs = torch.load(exported, weights_only=True)["model"]
    torch.testing.assert_close(
        theirs["backbone.0.body.conv1.weight"], ours["backbone.body.conv1.weight"], rtol=0, atol=0
    )

    # without a network the pre-trained weights are missed in one line
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    capsys.readouterr()
    assert main(["train", *arguments[:4], "--out", str(tmp_path / "b"), *small]) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("detr train: error: pretrained_backbone: ")
    assert all(line.startswith("warning: few tokens: ") for line in warnings)
    # weights of a whole detector need no others
    assert main(["train", "--weights", str(exported), *arguments[:4], "--out", str(tmp_path / "b"), *small]) == 0


def test_errors_are_one_line(data, run, tmp_path, capsys):
    broken = tmp_path / "broken"
    json_path, _ = coco_files.write(broken)
    content = coco_files.content()
    content["annotations"][1]["category_id"] = 4
    json_path.write_text(json.dumps(content))
    other = tmp_path / "other"
    coco_files.write(other, split="val")
    best = str(run / "best.pt")
    for arguments, message in (
        (["train"], "data: expected the folder of a dataset, got nothing"),
        (["train", "--data", str(tmp_path / "none")], f"{tmp_path / 'none'}: expected a folder"),
        (["train", "--data", str(broken)], f"{json_path}: annotation 11: category_id: 4 is none of the 3"),
        (["train", "--data", str(data), "--out", str(run)], f"{run / 'checkpoint.pt'}: a run is here already"),
        (["train", "--data", str(data), "--set", "colour=red"], "config: unknown field 'colour'"),
        (["train", "--data", str(data), "--set", "n_queries"], "--set: expected FIELD=VALUE, got 'n_queries'"),
        (
            ["train", "--data", str(data), "--set", 'dropout="x"'],
            "config: dropout: expected a number from 0 to below 1, got 'x'",
        ),
        (
            ["train", "--data", str(data), "--device", "abacus"],
            "device: expected one of cpu",
        ),
        (["train", "--resume", str(tmp_path)], f"{tmp_path / 'checkpoint.pt'}: the file is missing"),
        (["train", "--resume", str(run), "--set", "lr=2"], "resume: the run goes on as it was: lr cannot be changed"),
        (
            ["eval", "--data", str(data), "--checkpoint", str(json_path)],
            f"{json_path}: refused: damaged, or of another program",
        ),
        (["eval", "--data", str(data), "--checkpoint", best, "--split", "test"], "no split 'test'"),
        (
            ["eval", "--data", str(other), "--checkpoint", best],
            "category 3: name: expected 'triangle', got 'ant': classes must be those of the training (and 2 more",
        ),
        (["predict", str(tmp_path / "none.jpg"), "--checkpoint", best], "none.jpg: expected an image"),
        (
            ["export", "--checkpoint", best, "--to", "hf", "--out", str(tmp_path / "x")],
            "to: hf has no model with backbone small",
        ),
    ):
        assert main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"detr {arguments[0]}: error: ") and message in error
        assert error.count("\n") == 1


def test_evaluation_of_named_files(data, run, capsys):
    arguments = ["eval", "--data", str(data), "--checkpoint", str(run), "--split", "mini", "--images", "val"]
    assert main([*arguments, "--annotations", "instances_val.json"]) == 0
    assert "triangle" in capsys.readouterr().out
    assert main([*arguments, "--annotations", "other.json"]) == 1
    assert f"{data}: no COCO json of the split 'mini': looked for other.json\n" in capsys.readouterr().err


def test_more_objects_than_queries_are_warned_of(data, tmp_path, capsys):
    arguments = ["--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL, "--set", "n_queries=1"]
    assert main(["train", *arguments]) == 0
    error = capsys.readouterr().err
    assert "warning: too many objects: 5, the first: " in error and "only n_queries = 1 can be found" in error


def test_check_data(data, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["check-data", str(data), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["train"]["images"] == 6 and found["train_problems"] == [] and found["val"]["images"] == 4
    printed = capsys.readouterr().out
    assert f"{data / 'instances_train.json'}, for tiny at 160 pixels" in printed
    assert "6, 0 of them without objects" in printed and printed.count("triangle") == 2
    assert main(["check-data", str(data), "--n-queries", "1", "--image-size", "64"]) == 0
    assert "warning too many objects" in capsys.readouterr().out
    json_path, image_dir = coco_files.write(tmp_path / "bad")
    coco_files.write(tmp_path / "bad", split="val")
    (image_dir / "c.png").write_bytes((image_dir / "c.png").read_bytes()[:-300])
    capsys.readouterr()
    assert main(["check-data", str(tmp_path / "bad"), "--json", str(report)]) == 1
    output = capsys.readouterr().out
    assert f"error image file: 1, the first: {json_path}: image 9: file_name:" in output
    assert output.endswith("fatal problems: 1\n")
    [problem] = json.loads(report.read_text())["train_problems"]
    assert (problem["entry"], problem["field"], problem["fatal"]) == ("image 9", "file_name", True)


def test_inspect(data, run, tmp_path, capsys):
    best = str(run / "best.pt")
    assert main(["inspect", best]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preset tiny, recipe tiny: ") and "M parameters, as trained" in lines[0]
    assert lines[1].startswith("step 2; its weights: AP 0.")
    assert lines[3] == "4 classes (id): disc (1), square (2), triangle (3), star (4)"
    assert main(["inspect", str(run / "checkpoint.pt")]) == 0
    assert "a run that can be resumed" in capsys.readouterr().out
    image, out = data / "val" / "000001.jpg", tmp_path / "new" / "points.png"
    assert main(["inspect", best, "--image", str(image), "--query", "3", "--layer", "1", "--out", str(out)]) == 0
    # heads x levels x points
    assert "the 12 points that query 3 (" in capsys.readouterr().out
    before, after = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (image, out))
    assert before.shape == after.shape and (np.abs(before - after).max(2) > 60).sum() > 100
    for flags, message in (
        (["--query", "50"], "--query: expected a number below 50, got 50"),
        (["--layer", "4"], "--layer: expected at most 3, got 4"),
    ):
        assert main(["inspect", best, "--image", str(image), *flags, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err


def test_what_a_run_says_of_itself(data, tmp_path, capsys):
    arguments = ["--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", "--epochs", "1", *SMALL[:-1], "4"]
    arguments += ["--recipe", "finetune", "--accumulate", "2", "--set", "warmup_steps=0"]
    assert main(["train", *arguments]) == 0
    printed = capsys.readouterr()
    assert (
        "recipe finetune: 1 steps of 4 images = 0.7 epochs; a step: 1 processes x 2 accumulated batches x 2 images"
        in (printed.out)
    )
    assert "AdamW rates: rest 0.0001, backbone 1e-05, offsets 1e-05; warm-up 0 steps, x0.1 after 80 %" in printed.out
    assert "EMA 0.999" in printed.out
    assert "recipe finetune is for the --weights of a detector, and none are given" in printed.err
    assert "not as in recipe finetune: batch_size 16 -> 4; the rates were not scaled with the batch" in printed.err
    assert "--lr 5e-05" in printed.err
    content = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert content["averaged"] and content["config"]["recipe"] == "finetune"


def test_weights_and_biases(data, tmp_path, capsys, monkeypatch):
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1", *SMALL]
    assert main([*arguments, "--wandb", "mine"]) == 1
    assert "wandb: the package wandb is not installed" in capsys.readouterr().err
    calls = []

    class Run:
        log = staticmethod(lambda row, step: calls.append((step, row)))
        finish = staticmethod(lambda: calls.append("finished"))

    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    package.init = lambda **options: calls.append(options) or Run
    monkeypatch.setitem(sys.modules, "wandb", package)
    assert main([*arguments, "--wandb", "mine"]) == 0
    started, (step, losses), (_, metrics), end = calls
    assert started["project"] == "mine" and started["resume"] == "allow" and started["config"]["d_model"] == 32
    assert step == 1 and losses["loss"] > 0 and "AP" in metrics and end == "finished"
    # a resumed run is the same run there
    calls.clear()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert calls[0]["id"] == started["id"]


@pytest.mark.parametrize("command", ["synth", "check-data", "train", "eval", "predict", "inspect", "export"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert command in capsys.readouterr().out


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detr", "eval"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("detr", run_name="__main__")
    assert ended.value.code == 2
    assert "the following arguments are required: --data, --checkpoint" in capsys.readouterr().err


def test_demo(tmp_path, capsys, monkeypatch):
    arguments = ["--out", str(tmp_path / "demo"), "--train", "4", "--val", "2", "--steps", "1"]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr()
    assert (
        "1 steps on 4 images show that every part works here. How well the detector learns they cannot" in printed.out
    )
    # one step does not reach the AP that the whole demo does
    monkeypatch.setattr(demo, "IMAGES", 4)
    monkeypatch.setattr(demo, "STEPS", 1)
    assert demo.main(arguments) == 1
    printed = capsys.readouterr()
    for name in ("run2/curves.png", "run2/predictions.png", "predict2"):
        assert str(tmp_path / "demo" / name) in printed.out
        assert (tmp_path / "demo" / name).exists()
    assert "expected an AP of at least 0.62" in printed.err
    monkeypatch.setattr(demo, "MIN_AP", 0.0)
    assert demo.main(arguments) == 0
