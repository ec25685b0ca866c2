"""Absurd numbers in every field of the config and every argument of the commands: one clear line, or a valid run."""

import argparse
import dataclasses
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from user_files import SMALL

from detr import Detector, cli, flags
from detr.checkpoint import config_of
from detr.cli import main
from detr.config import BATCH, Config
from detr.data import validation_loader
from detr.errors import ArgumentError, CheckpointError
from detr.evaluate import detect
from detr.model import build_model
from detr.presets import preset, scaled_preset
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
BASE = preset(
    "tiny",
    **{"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 4, "dec_layers": 1, "n_levels": 2, "warmup_steps": 1},
    **{"image_size": 32, "max_size": 64, "batch_size": 2, "steps": 2, "eval_steps": 1},
)
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
VALUES = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -5,
    0,
    0.5,
    1,
    2**63,
    2**64,
    10**400,
    "x",
    "",
    "\ud800",
    None,
    True,
    [],
    {},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 2, 1, 32, 0)
    return root


@pytest.fixture(scope="module")
def splits(data):
    train = load_split(data, "train")
    return train, load_split(data, "val", train.categories)


def run_a_step(config, splits):
    """A step and an evaluation of a run, which is valid if both give numbers."""
    trainer = Run(config, splits[0], CPU, workers=0)
    loss = trainer.step(next(trainer.batches())).loss
    assert math.isfinite(loss) and trainer.skipped == 0 and trainer.steps_done == 1
    assert all(math.isfinite(group["lr"]) for group in trainer.learner.optimizer.param_groups)
    detections, _ = detect(trainer.learner.evaluated_model, validation_loader(splits[1], config, CPU, 0), CPU)
    assert all(found["boxes"].isfinite().all() for found in detections.values())


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


def one_line(error, name):
    """Whether a message is a line that names the field, what is expected and what came."""
    text = str(error)
    return text.startswith(f"config: {name}: ") and "got " in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_refused_in_one_line_or_gives_a_valid_run(name, splits, data, tmp_path, capsys):
    refused = 0
    for value in VALUES:
        try:
            config = replace(BASE, **{name: value})
        except ValueError as error:
            refused += 1
            assert one_line(error, name), error
            # the same words wherever the value comes from
            with pytest.raises(CheckpointError) as of_checkpoint:
                config_of({"config": BASE.to_dict() | {name: value}}, Path("a.pt"))
            assert str(of_checkpoint.value) == f"a.pt: {error}"
        else:
            if config != BASE:
                run_a_step(config, splits)
    assert refused >= 9
    # the command line, which has its own way to a config
    for value in (math.nan, -1, 2**64, "x"):
        arguments = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]
        try:
            replace(BASE, **{name: value})
        except ValueError:
            assert main([*arguments, "--set", f"{name}={json.dumps(value)}"]) == 1
            line = capsys.readouterr().err
            assert line.startswith("detr train: error: ") and f"{name}: expected " in line and line.count("\n") == 1
            assert not (tmp_path / "run").exists()


NUMBERS = {name: field for name, field in FIELDS.items() if "low" in field.metadata}
# what the largest value needs; at a rate of 10 the statistics of BatchNorm overflow: the line that asks for a lower lr
BESIDE = {"accumulate": {"batch_size": BATCH}, "n_heads": {"d_model": 512}, "lr_backbone": {"backbone": "tiny"}}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_each_range(name, splits):
    rule = NUMBERS[name].metadata
    low, high, is_int = rule["low"], rule["high"], NUMBERS[name].type is not float
    below, above = (low - 1, high + 1) if is_int else (math.nextafter(low, -1), math.nextafter(high, math.inf))
    for value in (below, above, *([high] if "below" in rule else [])):
        with pytest.raises(ValueError, match=f"config: {name}: expected an? .* from {low} to "):
            replace(BASE, **{name: value})
    largest = math.nextafter(high, 0) if "below" in rule else high
    config = replace(BASE, **BESIDE.get(name, {}), **{name: largest})
    if not is_int:
        run_a_step(config, splits)
    config = replace(BASE, **{name: low})
    if config != BASE:
        run_a_step(config, splits)


def test_no_field_is_without_a_rule():
    free = {name for name, field in FIELDS.items() if not field.metadata and field.type is not bool}
    assert free == {"name"}
    assert {field.type for field in FIELDS.values()} == {bool, int, float, str, int | None}


def actions():
    """(words of the command, action) of every argument of every command."""
    parser = cli._parser()
    [commands] = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command, sub in commands.choices.items():
        for action in sub._actions:
            yield pytest.param(action, id=f"{command} {action.dest}")


ACTIONS = list(actions())


TEXTS = {"split", "device", "wandb", "set"}  # checked where they are used


@pytest.mark.parametrize("action", ACTIONS)
def test_arguments(action, monkeypatch, tmp_path):
    """Each is a number within bounds, a choice, a switch, the name of a file, or one of a few texts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if action.choices or action.nargs == 0 or action.dest in TEXTS:
        return
    if action.type in (flags.path, flags.place):
        assert str(action.type("~/x")) == str(tmp_path / "x")
        assert str(action.type("~nobody-of-this-name/x")) == "~nobody-of-this-name/x"
        with pytest.raises(argparse.ArgumentTypeError, match="expected the name of a file or folder, got ''"):
            action.type("")
        return
    if action.type is flags.names:
        assert action.type(" a,b c ") == ["a", "b c"]
        for text in ("", "a,", "a, a", ",".join(map(str, range(3000))) + ","):
            with pytest.raises(argparse.ArgumentTypeError, match="expected names with commas between them") as error:
                action.type(text)
            assert len(str(error.value)) < 200
        return
    assert action.type.__qualname__.startswith("number.")
    in_config = action.dest in FIELDS  # which then has the last word, unless the flag has
    for text in ("nan", "inf", "-1", "1e400", str(2**64), "9" * 5000, "x", ""):
        try:
            value = action.type(text)
        except argparse.ArgumentTypeError as error:
            assert str(error).startswith("expected a") and len(str(error)) < 150
        else:
            assert in_config, (text, value)
            with pytest.raises(ValueError, match=f"config: {action.dest}: "):
                replace(BASE, **{action.dest: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x", "--checkpoint", "y", "--threshold", "nan"],
         "argument --threshold: expected a number from 0 to 1, got 'nan'"),
        (["eval", "--data", "x", "--checkpoint", "y", "--workers", "-1"],
         "argument --workers: expected an integer from 0 to 256, got '-1'"),
        (["train", "--steps", "1e3"], "argument --steps: expected an integer, got '1e3'"),
        (["train", "--colour\n", "red"], r"unrecognized arguments: --colour\n red"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("detr") and f"error: {message}" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "10000000"], "config: batch_size: expected an integer from 1 to 16384, got 10000000"),
        (["--batch-size", "201"], "batch_size: expected at most 200, 100 times the 2 training images, got 201"),
        (["--image-size", "100000"], "config: image_size: expected an integer from 32 to 10000, got 100000"),
        (["--set", 'image_size="x"'], "config: image_size: expected an integer from 32 to 10000, got 'x'"),
        (["--set", "image_size=NaN"], "config: image_size: expected an integer from 32 to 10000, got nan"),
        (["--lr", "-1"], "config: lr: expected a number from 0 to 1, got -1.0"),
        (["--set", "lr=[]"], "config: lr: expected a number from 0 to 1, got a list"),
        (["--set", "clip_norm=1e400"], "config: clip_norm: expected a number from 0 to 1000000000000, got inf"),
        (["--set", f"seed={'9' * 5000}"], "config: seed: expected an integer from 0 to 9223372036854775807, got '999"),
        (["--set", "lr=" + "[" * 100_000], "config: lr: expected a number from 0 to 1, got '[[["),
        (["--set", "recipe=fast"], "recipe: expected one of official, finetune, tiny, got 'fast'"),
        (["--set", "recipe=[]"], "recipe: expected one of official, finetune, tiny, got a list"),
        (["--set", "name=5"], "config: name: expected a text of 1 to 100 printable characters, got 5"),
        (["--set", "=5"], "config: unknown field ''"),
        *((["--device", name], "device: expected one of cpu") for name in
          ("xpu:9", "mps:9", "meta", "cuda:99", "cpu:7", "hpu", "abacus", "", "cuda:99999999999")),
    ],
)  # fmt: skip
def test_training_that_is_refused(more, message, data, tmp_path, capsys):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *more]) == 1
    line, *warnings = reversed(capsys.readouterr().err.splitlines())
    assert line.startswith(f"detr train: error: {message}") and len(line) < 800
    assert all(text.startswith("warning: ") for text in warnings)
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_more_than_its_name(capsys):
    def of(*arguments):
        options = cli._parser().parse_args(["train", *arguments])
        return scaled_preset("tiny", **{"recipe": options.recipe} | flags.fields_of(options))

    assert of("--set", "recipe=finetune") == of("--recipe", "finetune") == preset("tiny", "finetune")
    assert preset("tiny", recipe="finetune") == preset("tiny", "finetune")
    assert of("--set", "name=mine") == preset("tiny", name="mine")
    scaled = of("--lr", "0.001", "--image-size", "80")
    assert (scaled.lr_backbone, scaled.max_size) == (0.002, 160)
    assert of("--lr", "0.001", "--set", "lr_backbone=0").lr_backbone == 0


@pytest.mark.parametrize("name", ["triton", "inductor", "compile"])
def test_a_backend_that_cannot_run_here(name, splits, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = replace(BASE, compile=True) if name == "compile" else replace(BASE, backend=name)
    expected = "backend: 'triton' needs" if name == "triton" else f"{name}.* needs a C\\+\\+ compiler"
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with no_compiler, pytest.raises(ArgumentError, match=expected):
        Run(config, splits[0], CPU, workers=0)


def test_weights_that_are_not_numbers_are_not_exported(tmp_path):
    config = preset("deformable_detr_r50", backbone="resnet18", d_model=32, ffn_dim=32, n_queries=4, enc_layers=1,
                    dec_layers=1, n_heads=2, pretrained_backbone=False)  # fmt: skip
    model = build_model(config, 2)
    with torch.no_grad():
        model.transformer.level_embed[1, 2] = math.inf
    detector = Detector(model, config, {1: "a", 2: "b"}, Path("run/best.pt"), {})
    for to in ("official", "hf", "onnx"):
        with pytest.raises(CheckpointError, match=r"^run/best\.pt: transformer\.level_embed: expected finite numbers"):
            detector.export(tmp_path / "a.onnx", to)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run whose warm-up is longer, and whose batch larger, than it should be; and what it warned of."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("builtins.print", lambda *texts, **_: shown.append(" ".join(map(str, texts))))
        flags = ["--steps", "1", "--batch-size", "3", "--set", "accumulate=1", *SMALL[:-2]]
        assert main(["train", "--data", str(data), "--out", str(out), *flags]) == 0
    return out, shown


def test_a_warm_up_and_a_batch_that_are_too_large_are_warned_of(run):
    _, shown = run
    assert (
        "warning: warmup_steps: the warm-up of 100 steps is longer than the run of 1: the rates stay below their full "
        "value" in shown
    )
    assert "warning: batch_size: a step of 3 images has some of the 2 more than once" in shown


def test_a_run_where_a_checkpoint_is_expected(run, data, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    commands = {
        "eval": ["--data", str(data), "--checkpoint", str(folder)],
        "predict": [str(data / "val"), "--checkpoint", str(folder), "--out", str(tmp_path / "out")],
        "inspect": [str(folder)],
        "export": ["--checkpoint", str(folder), "--to", "hf", "--out", str(tmp_path / "hf")],
        "train": [
            "--data",
            str(data),
            "--weights",
            str(folder),
            "--out",
            str(tmp_path / "new"),
            "--steps",
            "1",
            *SMALL,
        ],
    }
    for command, arguments in commands.items():
        assert main([command, *arguments]) == (command == "export")  # there is no such layout for `tiny`
        assert f"{folder}: a run, of which best.pt is taken\n" in capsys.readouterr().out
    (folder / "best.pt").unlink()  # a run before its first evaluation
    assert main(["inspect", str(folder)]) == 0
    assert f"{folder}: a run, of which checkpoint.pt is taken\n" in capsys.readouterr().out
    assert main(["inspect", str(data)]) == 1
    assert f"{data}: a folder, expected a file, or a run with best.pt or checkpoint.pt in it" in capsys.readouterr().err


def test_a_file_where_a_run_is_resumed(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    assert main(["train", "--resume", str(folder / "checkpoint.pt")]) == 0
    assert "finished already, at step 1" in capsys.readouterr().out
    for name in ("best.pt", "config.json"):
        assert main(["train", "--resume", str(folder / name)]) == 1
        line = capsys.readouterr().err
        message = "expected the folder of a run or the checkpoint.pt in it, which alone can be resumed\n"
        assert line == f"detr train: error: {folder / name}: {message}"
