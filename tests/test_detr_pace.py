"""`detr train --minutes`: the number of steps that is chosen, and that choosing it leaves no trace in the run."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from detr.cli import main
from detr.data import validation_loader
from detr.errors import TrainingError
from detr.pace import evaluations_within, most_steps, set_pace
from detr.presets import preset
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
SMALL = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "image_size": 64, "max_size": 64, "batch_size": 2}
CONFIG = preset("tiny", **SMALL, backbone="small", dropout=0.1, warmup_steps=2, eval_steps=40, ema=0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_dataset(root, 7, 3, 64, 0)
    return root


@pytest.fixture(scope="module")
def splits(data):
    return [load_split(data, name) for name in ("train", "val")]


@pytest.mark.parametrize(
    "fields",
    [{"eval_steps": 7}, {"eval_steps": None, "eval_every": 1}, {"eval_steps": None, "eval_every": 3, "batch_size": 30},
     {"eval_steps": None, "eval_every": 1, "batch_size": 30}, {"eval_steps": None, "eval_every": 2, "batch_size": 22}],
)  # fmt: skip
def test_evaluations_are_those_that_a_run_has(fields):
    config = replace(CONFIG, **fields)
    for steps in range(1, 60):
        due = 0
        for done in range(1, steps + 1):
            run = SimpleNamespace(config=config, steps_done=done, finished=done == steps, dataset=range(11))
            due += Run.evaluation_is_due.fget(run)
        assert evaluations_within(SimpleNamespace(config=config, dataset=range(11)), steps) == due


@pytest.mark.parametrize("seconds", [-5.0, 0.5, 3.2, 100.0, 12345.6])
def test_the_most_steps_that_fit(seconds):
    run = SimpleNamespace(config=replace(CONFIG, eval_steps=9), dataset=range(11))
    steps = most_steps(run, seconds, of_step=0.25, of_evaluation=2.0)

    def cost(n):
        return 0.25 * n + 2.0 * evaluations_within(run, n)

    assert (steps == 0 or cost(steps) <= seconds) and cost(steps + 1) > seconds


def test_a_run_of_the_chosen_steps_is_the_same_bit_for_bit(splits):
    run = Run(CONFIG, splits[0], CPU)
    fresh = Run(CONFIG, splits[0], CPU)
    said = set_pace(run, validation_loader(splits[1], CONFIG, CPU), 0.2, time.perf_counter())
    steps = run.total_steps
    assert steps == run.config.steps != CONFIG.steps and f"--steps {steps}" in said
    before, after = (each.state() for each in (fresh, run))
    for key in ("model", "ema"):
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0)
    assert after["optimizer"]["state"] == {} and after["steps_done"] == 0 and after["sums"] == {}

    repeated = Run(replace(CONFIG, steps=steps), splits[0], CPU)
    for each in (run, repeated):
        for _, batches in zip(range(3), each.batches(), strict=False):
            each.step(batches)
    torch.testing.assert_close(run.state()["ema"], repeated.state()["ema"], rtol=0, atol=0)
    moments = [each.state()["optimizer"]["state"] for each in (run, repeated)]
    assert moments[0]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


class Clock:
    """In place of `time`: it goes on by what the trial does. The first steps and the first batch take longer."""

    def __init__(self, monkeypatch, of_step=1.0, of_first_steps=1.0, of_batch=1.0, of_first_batch=1.0):
        self.now, self.started_at = 0.0, None
        step, taken = Run.step, []

        def timed_step(run, *args):
            self.started_at = run.steps_done if self.started_at is None else self.started_at
            self.now += of_first_steps if len(taken) < 3 else of_step
            taken.append(1)
            return step(run, *args)

        def timed_detect(model, batches, device):
            for i, _ in enumerate(batches):
                self.now += of_first_batch if i == 0 else of_batch
            return None, None

        monkeypatch.setattr(Run, "step", timed_step)
        monkeypatch.setattr("detr.pace.detect", timed_detect)
        monkeypatch.setattr("detr.pace.coco_metrics", lambda *_: None)
        monkeypatch.setattr("detr.pace.time", self)

    def perf_counter(self):
        return self.now


def test_what_is_measured(splits, monkeypatch):
    run, val = Run(CONFIG, splits[0], CPU), validation_loader(splits[1], CONFIG, CPU)
    assert len(val) == 2
    clock = Clock(monkeypatch, of_first_steps=3.0, of_batch=2.0, of_first_batch=4.0)
    said = set_pace(run, val, 5, began=-30.0)
    # past the eight passes over 7 images in steps of 2; the first three steps are left out
    assert clock.started_at == 28 and "a step takes 1 s and an evaluation 6 s" in said
    # 300 s less 16 %, 30 s before it began, three steps and four more, and evaluations of 4 and of 6 s
    steps = run.total_steps
    assert f": {steps} steps (" in said and steps == most_steps(run, 252 - 30 - 13 - 10, 1, 6)


@pytest.mark.parametrize(("of_step", "of_batch", "minutes"), [(1.15, 1, 0.01), (2, 1, 0.1), (1, 60, 0.01), (1, 5, 0.3)])
def test_the_least_minutes_are_enough(splits, monkeypatch, of_step, of_batch, minutes):
    run, val = Run(CONFIG, splits[0], CPU), validation_loader(splits[1], CONFIG, CPU)
    clock = Clock(monkeypatch, of_step, of_step, of_batch, of_batch)
    with pytest.raises(TrainingError, match="expected at least") as error:
        set_pace(run, val, minutes, began=clock.now)
    least = float(str(error.value).partition("expected at least ")[2].partition(",")[0])
    assert minutes < least < 4 * (6 * of_step + 3 * of_batch) / 60
    assert "steps" in set_pace(run, val, least, began=clock.now) and run.total_steps >= 1


def test_the_command_ends_in_time_and_keeps_the_steps(data, tmp_path, capsys, monkeypatch):
    # a clock that this test moves: a step takes a second, a batch of the evaluation five
    now = [0.0]
    monkeypatch.setattr("detr.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("detr.cli.time", SimpleNamespace(perf_counter=lambda: now[0]))
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda *args, **given: (now.__setitem__(0, now[0] + 1), step(*args, **given))[1])
    monkeypatch.setattr("detr.pace.coco_metrics", lambda *_: now.__setitem__(0, now[0] + 5))
    sizes = [text for name, value in SMALL.items() for text in ("--set", f"{name}={value}")]
    command = ["train", "--data", str(data), "--device", "cpu", *sizes, "--set", "eval_steps=40"]
    assert main([*command, "--minutes", "2", "--out", str(tmp_path / "run")]) == 0
    # 120 s less 16 % of reserve, 5 steps (more than 4 %) and one of 2 batches: 90.8 s, for 70 steps and 2 evaluations
    printed = capsys.readouterr().out
    assert "2 minutes: a step takes 1 s and an evaluation 10 s: 70 steps (--steps 70 repeats this run)" in printed
    assert "70 steps of 2 images" in printed
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert kept["steps"] == 70 and json.loads((tmp_path / "run/eval.json").read_text())["step"] == 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1", "--steps", "5"], "minutes: expected without steps, which also says how long the run is"),
        (["--minutes", "1", "--epochs", "5"], "minutes: expected without epochs"),
        (["--minutes", "1", "--set", "steps=5"], "minutes: expected without steps"),
        (["--minutes", "0"], "argument --minutes: expected a number from 0.01 to 1000000, got '0'"),
        (["--minutes", "nan"], "argument --minutes: expected a number from 0.01"),
        (["--minutes", "1", "--resume", "x"], "resume: the run goes on as it was: minutes cannot be changed"),
    ],
)
def test_bad_minutes(data, tmp_path, capsys, arguments, message):
    if "--resume" in arguments:
        run = Run(CONFIG, load_split(data, "train"), CPU)
        from detr import checkpoint

        (tmp_path / "x").mkdir()
        checkpoint.save(tmp_path / "x" / "checkpoint.pt", run.state())
        arguments = [*arguments[:-1], str(tmp_path / "x")]
    else:
        arguments = [*arguments, "--data", str(data), "--out", str(tmp_path / "run")]
    try:
        code = main(["train", "--device", "cpu", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code != 0 and message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_too_few_minutes_say_how_many_are_needed(splits):
    run = Run(CONFIG, splits[0], CPU)
    with pytest.raises(TrainingError, match=r"^minutes: a step takes .* s and an evaluation .* s: expected at least"):
        set_pace(run, validation_loader(splits[1], CONFIG, CPU), 1e-4, time.perf_counter())
