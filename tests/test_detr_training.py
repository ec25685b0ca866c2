"""`detr.train` in a program: the same run as the command's, and nothing of the program is changed."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import detr
from detr import ArgumentError, CheckpointError, DataError, DetrError, OutputError, TrainingError, checkpoint
from detr.cli import main
from detr.presets import preset
from detr.synth import write_dataset
from detr.training import _first_weights

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # test processes share the cores
SMALL = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "image_size": 64, "batch_size": 2, "steps": 4, "eval_steps": 2}
GIVEN = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 6, 4, 64, 3)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run, what trained it, and the process before and after."""
    out = tmp_path_factory.mktemp("runs") / "new"
    train = detr.train  # libraries are imported with it, which is nothing of a run
    before = state_of_process()
    detector = train(data, out=out, **GIVEN, **SMALL)
    return out, detector, before, state_of_process()


def state_of_process():
    generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    others = warnings.showwarning, threading.excepthook, sys.stdout, Image.MAX_IMAGE_PIXELS, os.getcwd()
    others += (threading.enumerate(),)
    return generators, handlers, list(warnings.filters), others


def same_weights(a, b):
    states = [checkpoint.load(Path(folder) / "checkpoint.pt")["model"] for folder in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_run_is_the_commands(run, data, tmp_path, capsys):
    out, *_ = run
    flags = ["--image-size", "64", "--batch-size", "2", "--steps", "4", "--device", "cpu", "--workers", "0"]
    for name in ("d_model", "n_heads", "ffn_dim", "eval_steps"):
        flags += ["--set", f"{name}={SMALL[name]}"]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    same_weights(out, tmp_path / "run")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "run")]
    assert configs[0] == configs[1]
    names = [sorted(p.name for p in folder.iterdir() if "tfevents" not in p.name) for folder in (out, tmp_path / "run")]
    assert names[0] == names[1] and "best.pt" in names[0]
    printed = capsys.readouterr().out
    assert "tiny: 0." in printed and "see curves.png and predictions.png there" in printed


def test_what_comes_back_is_the_best_step(run):
    out, detector, *_ = run
    assert detector.path == out / "best.pt" and not detector.stopped and not detector.model.training
    best = checkpoint.load(out / "best.pt")
    torch.testing.assert_close(dict(detector.model.state_dict()), best["model"], rtol=0, atol=0)
    assert detector.metrics == best["metrics"] and detector.classes == ["disc", "square", "triangle", "star"]
    again = detr.load(out, "cpu")
    assert again.path == detector.path and again.config == detector.config


def test_nothing_of_the_process_is_changed(run):
    *_, before, after = run
    assert before == after


def test_evaluate_is_what_the_run_and_the_command_say(run, data, tmp_path, capsys):
    out, detector, *_ = run
    of_run, evaluated = json.loads((out / "eval.json").read_text()), detr.load(out / "checkpoint.pt").evaluate(data)
    for name in ("AP", "AP50", "AR100", "per_class"):
        assert evaluated[name] == of_run[name]
    assert evaluated["images"] == 4
    capsys.readouterr()
    assert main(["eval", "--data", str(data), "--checkpoint", str(out / "checkpoint.pt"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{evaluated}\n"
    assert "Average Precision" in str(evaluated) and "triangle" in str(evaluated) and isinstance(evaluated, dict)
    assert detector.evaluate(data, split="train", max_dets=5)["images"] == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "test"}, DataError, "test"),
        ({"max_dets": 0}, ArgumentError, "max_dets: expected an integer from 1 to"),
        ({"batch_size": "2"}, ArgumentError, "batch_size: expected an integer from 1 to 16384, got '2'"),
        ({"exif": "off"}, ArgumentError, "exif: expected one of turn, ignore, got 'off'"),
        ({"format": "csv"}, ArgumentError, "format: expected one of coco, roboflow, yolo, voc, got 'csv'"),
        ({"classes": "disc"}, ArgumentError, "classes: expected a list of names, no two the same, got 'disc'"),
        ({"split": ["val"]}, ArgumentError, "split: expected the name of a split, got a list"),
        ({"annotations": 7}, ArgumentError, "annotations: expected the name of a file or folder, got 7"),
        ({"classes": ["a"]}, ArgumentError, "classes: expected with Pascal VOC"),
        ({"val_fraction": 0.3}, ArgumentError, "val_fraction and split_seed: .* has a split val, which is taken"),
        ({"val_fraction": 1.0}, ArgumentError, "val_fraction: expected a number from 0.001 to 0.999, got 1.0"),
    ],
)
def test_bad_arguments_of_evaluate(run, data, arguments, error, message):
    with pytest.raises(error, match=message):
        run[1].evaluate(data, **arguments)
    with pytest.raises(DataError, match="nothing"):
        run[1].evaluate(data / "nothing", **{"split": "val"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stepz": 3}, "config: unknown field 'stepz' (is steps meant?); known: backbone, "),
        ({"learning_rate": 3}, "config: unknown field 'learning_rate'"),
        ({"lr": "fast"}, "config: lr: expected a number from 0 to 1, got 'fast'"),
        ({"d_model": 40}, "config: d_model: expected a multiple of 32"),
        ({"preset": "huge"}, "preset: expected one of tiny, "),
        ({"recipe": "fast"}, "recipe: expected one of official, finetune, tiny, got 'fast'"),
        ({"data": None}, "data: expected the folder of a dataset, got nothing"),
        ({"data": 7}, "data: expected the name of a file or folder, got 7"),
        ({"out": ""}, "out: expected the name of a file or folder, got ''"),
        ({"minutes": 0}, "minutes: expected a number from 0.01 to 1000000, got 0"),
        ({"minutes": float("nan"), "steps": 1}, "minutes: expected a number"),
        ({"minutes": 1}, "minutes: expected without steps"),
        ({"workers": -1}, "workers: expected an integer from 0 to 256, got -1"),
        ({"split_seed": 1.5}, "split_seed: expected an integer from 0 to"),
        ({"val_fraction": 2}, "val_fraction: expected a number from 0.001 to 0.999, got 2"),
        ({"exif": "off"}, "exif: expected one of turn, ignore, got 'off'"),
        ({"classes": ["a", "a"]}, "classes: expected a list of names, no two the same"),
        ({"device": "cuda:77"}, "device: expected one of cpu"),
        ({"batch_size": 1000}, "batch_size: expected at most 600, 100 times the 6 training images, got 1000"),
        ({"stop": threading.Event()}, "stop: expected a function, such as is_set of a threading.Event, got a Event"),
        ({"wandb": True}, "wandb: expected the name of a project, got True"),
        ({"recipe": np.array(["a", "b"])}, "recipe: expected one of official, finetune, tiny, got a ndarray"),
        ({"exif": np.array(["a", "b"])}, "exif: expected one of turn, ignore, got a ndarray"),
        ({"accept_changed_data": True}, "accept_changed_data: expected resume beside it"),
    ],
)
def test_bad_arguments_of_train(data, tmp_path, arguments, message):
    with pytest.raises(ArgumentError) as error:
        detr.train(**{"data": data, "out": tmp_path / "run"} | GIVEN | SMALL | arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(run, data, tmp_path):
    out, *_ = run
    with pytest.raises(OutputError, match=r"best\.pt|checkpoint\.pt: a run is here already"):
        detr.train(data, out=out, **GIVEN, **SMALL)
    with pytest.raises(DataError, match="nowhere"):
        detr.train(data / "nowhere", out=tmp_path / "run", **GIVEN, **SMALL)
    with pytest.raises(CheckpointError, match="no run to continue"):
        detr.train(resume=tmp_path)
    with pytest.raises(ArgumentError, match="resume: the run goes on as it was: steps cannot be changed"):
        detr.train(resume=out, steps=8)
    with pytest.raises(CheckpointError, match=r"none\.pth: the file is missing"):
        detr.train(data, out=tmp_path / "run", weights=tmp_path / "none.pth", **GIVEN, **SMALL)
    assert not list(tmp_path.iterdir())


def test_stopped_and_resumed_off_the_main_thread_and_in_an_event_loop(run, data, tmp_path):
    out, *_ = run
    event, found, asked = threading.Event(), [], []

    def stop():
        asked.append(1)
        if len(asked) == 4:  # at the start, and before the third step
            event.set()
        return event.is_set()

    def work():
        found.append(detr.train(data, out=tmp_path / "run", stop=stop, **GIVEN, **SMALL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].stopped and checkpoint.load(tmp_path / "run" / "checkpoint.pt")["steps_done"] == 3
    assert found[0].predict(np.zeros((50, 70, 3), np.uint8), 0.0).size == (70, 50)

    async def resumed():
        await asyncio.sleep(0)
        detector = detr.train(resume=tmp_path / "run", device="cpu", workers=0)
        return detector, detector.predict(np.zeros((50, 70, 3), np.uint8))

    detector, _ = asyncio.run(resumed())
    assert not detector.stopped
    same_weights(out, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "weights", "state", "asked"),
    [
        ({}, None, None, ["resnet18"]),
        ({"pretrained_backbone": False}, None, None, []),
        ({}, Path("file.pth"), None, []),
        ({}, None, {"steps_done": 3}, []),
    ],
)
def test_imagenets_weights_are_for_new_models_without_others(monkeypatch, changes, weights, state, asked):
    loaded = []
    monkeypatch.setattr("detr.training.load_imagenet", lambda backbone, name: loaded.append(name))
    monkeypatch.setattr("detr.training.load_weights", lambda *_: "a report")
    config = preset("deformable_detr_r50", backbone="resnet18", **changes)
    initialise = _first_weights(config, SimpleNamespace(class_names=["a"]), weights, state)
    assert (initialise is None) == (state is not None)
    if initialise:
        initialise(SimpleNamespace(backbone=None))
    assert loaded == asked


def test_one_training_at_a_time(data, tmp_path):
    refused = []

    def stop():
        with pytest.raises(TrainingError, match="another thread of this process is training"):
            detr.train(data, out=tmp_path / "second", **GIVEN, **SMALL)
        refused.append(1)
        return True

    thread = threading.Thread(
        target=detr.train, args=(data,), kwargs={"out": tmp_path / "a", "stop": stop} | GIVEN | SMALL
    )
    thread.start()
    thread.join()
    assert refused and not (tmp_path / "second").exists()


def test_evaluations_in_threads_leave_standard_output_alone(run, data):
    before, said = sys.stdout, []
    threads = [threading.Thread(target=lambda: said.append(run[1].evaluate(data, workers=0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        assert sys.stdout is before
    tables = {str(each) for each in said}
    assert len(said) == 4 and len(tables) == 1 and "maxDets=100" in tables.pop()


def test_numbers_of_numpy(data, tmp_path):
    """They are plain numbers in the checkpoint, which else could not be read."""
    fields = SMALL | {"lr": np.float64(1e-3), "steps": np.int64(2), "amp": np.str_("none"), "beta2": np.float32(0.5)}
    shutil.rmtree(shutil.copytree(data, tmp_path / "data") / "val")
    (tmp_path / "data" / "instances_val.json").unlink()
    held = {"val_fraction": np.float64(0.4), "split_seed": np.int32(3)}
    detector = detr.train(tmp_path / "data", out=tmp_path / "run", **held, **GIVEN, **fields)
    assert (detector.config.lr, detector.config.steps, detector.config.beta2) == (1e-3, 2, 0.5)
    assert all(type(value) in (int, float, str, bool, type(None)) for value in detector.config.to_dict().values())
    assert detr.load(tmp_path / "run", "cpu").evaluate(tmp_path / "data")["images"] == 2
    detector.save(tmp_path / "saved.pt")
    assert detr.load(tmp_path / "saved.pt").config == detector.config


def test_another_detectors_weights_and_minutes(run, data, tmp_path, capsys):
    out, *_ = run
    fields = {name: value for name, value in SMALL.items() if name != "steps"}
    # stopped after its first step: enough minutes for a machine that is busy need not pass
    fields |= {"weights": out, "recipe": "finetune", "minutes": 0.5, "stop": lambda: True}
    detector = detr.train(data, out=tmp_path / "run", **GIVEN, **fields)
    assert detector.stopped
    printed = capsys.readouterr().out
    assert f"{out}: a run, of which best.pt is taken" in printed and "0.5 minutes: trying some steps" in printed
    assert detector.config.recipe == "finetune" and detector.config.steps >= 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == detector.config.steps


def test_the_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text().partition("## In your own program")[2]
    command = re.search(r"`(detr synth [^`]*)`", text)[1].split()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    monkeypatch.chdir(tmp_path)
    assert main(command[1:]) == 0
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/shapes/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 200
    *_, first = (line for line in printed.splitlines() if "in an image of" in line)
    objects = int(first.split()[0])
    assert first == f"{objects} object{'' if objects == 1 else 's'} in an image of 64 x 64 pixels"
    rows = printed.partition(first)[2].strip().splitlines()
    assert len(rows) == objects and all(row.split()[0] in ("disc", "square", "triangle", "star") for row in rows)
    assert Image.open(tmp_path / "found.png").size == (64, 64)


def test_an_error_leaves_the_process_as_it_was(data, tmp_path):
    before = state_of_process()

    def broken():
        raise RuntimeError("of the program")

    with pytest.raises(RuntimeError, match="of the program"):
        detr.train(data, out=tmp_path / "run", stop=broken, **GIVEN, **SMALL)
    assert state_of_process() == before
    assert issubclass(DataError, DetrError) and issubclass(ArgumentError, ValueError)
