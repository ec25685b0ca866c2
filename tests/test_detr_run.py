"""Training: resumed bit for bit, interruptible, and able to learn."""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from detr_runs import advance, synthetic_splits, trained
from torch._dynamo.utils import counters

from detr import checkpoint, load
from detr.data import TrainingStream, validation_loader
from detr.distributed import StopOnSignal
from detr.errors import CheckpointError
from detr.evaluate import evaluate
from detr.output import MANIFEST
from detr.presets import PRESETS, preset
from detr.run import Run, lr_factor
from detr.splits import load_split
from detr.synth import write_dataset

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
# dropout: the random state counts
SMALL = preset(
    "tiny",
    **{"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "dropout": 0.1},
    **{"image_size": 64, "max_size": 64, "batch_size": 2, "steps": 20, "warmup_steps": 5, "eval_steps": 10},
)

PLAIN = {"backbone": "tiny", "query_selection": "pure", "proposal_nms": 1.0, "loss_ce": 1.0}
LEARNS = {"backbone": "small", "query_selection": "mixed", "proposal_nms": 0.7}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return synthetic_splits(tmp_path_factory.mktemp("synthetic"))


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in ("model", "ema"):
        torch.testing.assert_close(a.get(key), b.get(key), rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for key in ("scaler", "steps_done", "best_ap", "stale", "skipped", "unreadable", "averaged"):
        assert a[key] == b[key]
    assert a.get("ema_steps") == b.get("ema_steps")
    sums = [{name: value for name, value in state["sums"].items() if name != "seconds_per_step"} for state in (a, b)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9, "accumulate": 2, "grad_checkpointing": True}, {"amp": "fp16"}, LEARNS | {"ema": 0.9}],
    ids=["plain", "ema-accumulate-checkpointing", "fp16", "learns"],
)
def test_five_steps_and_five_more_are_ten(splits, tmp_path, changes):
    config = replace(SMALL, steps=10, **changes)
    straight = Run(config, splits[0], CPU)
    losses = advance(straight, 10)
    first = Run(config, splits[0], CPU)
    begun = advance(first, 5)
    straight.unreadable = first.unreadable = ["a.jpg: broken"]
    checkpoint.save(tmp_path / "a.pt", first.state())
    torch.rand(100)
    second = Run(config, splits[0], CPU, workers=1)
    second.load_state(checkpoint.load(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert second.unreadable == ["a.jpg: broken"]
    assert begun + advance(second, 5) == losses
    assert_same_state(second.state(), straight.state())
    assert second.finished and list(second.batches()) == []
    # and the seed counts
    other = Run(replace(config, seed=7), splits[0], CPU)
    assert advance(other, 3) != losses[:3]


def test_a_state_of_another_run_is_refused(splits, tmp_path):
    run = Run(SMALL, splits[0], CPU)
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"a\.pt: optimizer: not in the file: only checkpoint\.pt can be resumed"):
        run.load_state(run.weights(), path)
    with pytest.raises(CheckpointError, match=r"train_images: of another dataset: expected 7, got 8"):
        run.load_state(run.state() | {"train_images": 8}, path)
    wider = Run(replace(SMALL, ffn_dim=64), splits[0], CPU)
    with pytest.raises(
        CheckpointError, match=r"of another model: .*linear1\.weight: expected \[64, 32\], got \[32, 32\]"
    ):
        wider.load_state(run.state(), path)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run):
    return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows(run)]


@pytest.fixture(scope="module")
def straight_run(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert trained(Run(SMALL, splits[0], CPU), validation_loader(splits[1], SMALL, CPU), out, {"data": "x"}) is not None
    return out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(splits, tmp_path, straight_run, monkeypatch, signum):
    step = Run.step

    def interrupted(run, batches, stop):
        if run.steps_done == 12:
            os.kill(os.getpid(), signum)
        return step(run, batches, stop)

    monkeypatch.setattr(Run, "step", interrupted)
    val = validation_loader(splits[1], SMALL, CPU)
    handler = signal.getsignal(signum)
    with contextlib.closing(StopOnSignal()) as stop:
        assert Run(SMALL, splits[0], CPU).train(val, tmp_path, {"data": "x"}, stop) is None
        assert stop.received
    assert signal.getsignal(signum) is handler
    monkeypatch.undo()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["steps_done"] == 14  # after the step that follows the signal
    assert not (tmp_path / "eval.json").exists() and (tmp_path / "curves.png").exists()
    # lines that a killed process wrote after its last checkpoint, the last one cut short
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "loss": 1}\n{"step": 16, "lo')

    resumed = Run(SMALL, splits[0], CPU)
    resumed.load_state(state, tmp_path / "checkpoint.pt")
    metrics = trained(resumed, val, tmp_path, {"data": "x"})
    assert without_times(tmp_path) == without_times(straight_run)
    assert metrics == json.loads((straight_run / "eval.json").read_text())
    assert_same_state(checkpoint.load(tmp_path / "checkpoint.pt"), checkpoint.load(straight_run / "checkpoint.pt"))
    best, expected = (checkpoint.load(run / "best.pt") for run in (tmp_path, straight_run))
    torch.testing.assert_close(best["model"], expected["model"], rtol=0, atol=0)


def test_a_run_that_was_killed_after_its_last_step(splits, tmp_path, straight_run):
    run = Run(SMALL, splits[0], CPU)
    run.load_state(checkpoint.load(straight_run / "checkpoint.pt"), straight_run / "checkpoint.pt")
    for name in ("metrics.jsonl", MANIFEST):
        shutil.copy(straight_run / name, tmp_path)
    metrics = trained(run, validation_loader(splits[1], SMALL, CPU), tmp_path, {"data": "x"})
    assert metrics == json.loads((straight_run / "eval.json").read_text())
    assert rows(tmp_path) == rows(straight_run)
    assert (tmp_path / "predictions.png").exists()


def test_metrics_are_means_over_the_steps(splits, straight_run):
    run = Run(SMALL, splits[0], CPU)
    losses = advance(run, 20)
    [row] = [row for row in rows(straight_run) if "loss" in row]
    assert row["step"] == 20 and row["epoch"] == round(40 / 7, 4)
    assert row["loss"] == pytest.approx(sum(losses) / 20, rel=1e-12)
    terms = [value for name, value in row.items() if name.startswith("loss_")]
    assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert [row["step"] for row in rows(straight_run) if "AP" in row] == [10, 20]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "changes", [{"two_stage": False}, {"lr": 1e-9, "lr_backbone": 1e-9}], ids=["learns", "two_stage"]
)
def test_autocast_keeps_the_loss_close(splits, changes, amp):
    # which proposals are the best of two stages may hang on a rounding, and what is learned then on them; with mixed
    # queries their order counts too
    config = replace(SMALL, **PLAIN, dropout=0.0, **changes)
    exact = advance(Run(config, splits[0], CPU), 3)
    run = Run(replace(config, amp=amp), splits[0], CPU)
    assert advance(run, 3) == pytest.approx(exact, rel=0.002)
    assert all(parameter.dtype == torch.float32 for parameter in run.learner.model.parameters())


def test_a_skipped_step_leaves_the_running_statistics(splits):
    run = Run(replace(SMALL, **LEARNS), splits[0], CPU)
    batches = next(run.batches())
    before = [tensor.clone() for tensor in run.learner.statistics]
    batches[0][0][0, 0, 0, 0] = math.nan
    assert math.isnan(run.step(batches).loss) and run.skipped == 1
    assert len(before) == 16 and all(map(torch.equal, run.learner.statistics, before))
    run.step(next(run.batches()))
    assert not any(map(torch.equal, run.learner.statistics, before))


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_accumulated_batches_are_one_batch(splits, class_loss):
    # at small rates, because Adam makes steps of full size from the rounding of gradients that are zero
    config = replace(
        SMALL, dropout=0.0, batch_size=4, lr=1e-4, lr_backbone=1e-4, class_loss=class_loss, two_stage=False
    )
    config = replace(config, backbone="tiny")  # whose norms are of one image
    at_once, parts = (Run(replace(config, accumulate=n), splits[0], CPU) for n in (1, 4))
    assert advance(parts, 5) == pytest.approx(advance(at_once, 5), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(splits):
    config = replace(SMALL, dropout=0.3)
    runs = []
    for recompute in (False, True):
        run = Run(replace(config, grad_checkpointing=recompute), splits[0], CPU)
        calls = []
        run.learner.model.transformer.encoder.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        runs.append((advance(run, 2), run.state()["model"], len(calls)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    assert (runs[0][2], runs[1][2]) == (2, 4)  # once more in each backward


def test_compiled_without_a_graph_break(splits, monkeypatch):
    # Dynamo's graph is what may break; to compile it with Inductor would take minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    changes = {"enc_layers": 1, "dec_layers": 1, "dropout": 0.0, "augment": "official", "max_size": 100, "steps": 3}
    small = {name: getattr(SMALL, name) for name in ("d_model", "n_heads", "ffn_dim", "n_queries", "image_size")}
    # with this seed the first images are not square: of those Dynamo would keep that height is width, and trace again
    changes |= {"seed": 1, "n_levels": 2, "batch_size": 2, "grad_checkpointing": True, "amp": "bf16"}
    config = preset("tiny", **small, **changes)
    plain, compiled = (Run(replace(config, compile=flag), splits[0], CPU) for flag in (False, True))
    assert len({batch[0].shape for [batch] in plain.batches()}) > 1
    torch._dynamo.reset()
    counters.clear()
    assert advance(compiled, 3) == pytest.approx(advance(plain, 3), rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_averaged_weights_are_evaluated_and_kept(splits, tmp_path):
    config = replace(SMALL, steps=4, eval_steps=2, ema=0.5, dropout=0.0)
    run = Run(config, splits[0], CPU)
    name, statistics = "transformer.level_embed", "backbone.stem.1.running_mean"
    averages = {}
    for n, batches in enumerate(run.batches()):
        run.step(batches)
        decay = min(0.5, (1 + n) / (10 + n))
        for key in (name, statistics):
            current = run.learner.model.state_dict()[key]
            averages[key] = current.clone() if n == 0 else decay * averages[key] + (1 - decay) * current
    averaged = averages[name]
    for key, expected in averages.items():
        torch.testing.assert_close(run.learner.average.module.state_dict()[key], expected)
    val = validation_loader(splits[1], config, CPU)
    metrics = trained(Run(config, splits[0], CPU), val, tmp_path, {})
    for file in ("best.pt", "checkpoint.pt"):
        content = checkpoint.load(tmp_path / file)
        assert content["averaged"]
        model = load(tmp_path / file, CPU).model
        if content["steps_done"] == 4:
            torch.testing.assert_close(model.state_dict()[name], averaged)
            assert evaluate(model, val, CPU)[0]["AP"] == metrics["AP"]
    assert not torch.equal(checkpoint.load(tmp_path / "checkpoint.pt")["model"][name], averaged)


def test_a_run_that_gets_no_better_ends_early(splits, tmp_path, monkeypatch):
    aps = iter([0.2, 0.3, 0.1, 0.3, 0.9])
    evaluate_run = Run.evaluate

    def scripted(run, val):
        found = evaluate_run(run, val)
        return replace(found, metrics=found.metrics | {"AP": next(aps)})

    monkeypatch.setattr(Run, "evaluate", scripted)
    config = replace(SMALL, steps=10, eval_steps=1, patience=2)
    val = validation_loader(splits[1], config, CPU)
    run = Run(config, splits[0], CPU)
    metrics = trained(run, val, tmp_path, {})
    assert (run.steps_done, metrics["best_AP"], metrics["AP"]) == (4, 0.3, 0.3)
    assert checkpoint.load(tmp_path / "best.pt")["steps_done"] == 2
    # it stays ended when it is resumed
    resumed = Run(config, splits[0], CPU)
    resumed.load_state(checkpoint.load(tmp_path / "checkpoint.pt"), tmp_path / "checkpoint.pt")
    assert trained(resumed, val, tmp_path, {})["AP"] == 0.9 and resumed.steps_done == 4


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("tiny")])
def test_every_preset_of_the_paper_trains(splits, name):
    config = preset(name, pretrained_backbone=False, image_size=64, max_size=107, batch_size=1, steps=1)
    run = Run(config, splits[0], CPU, workers=0)
    before = run.learner.model.class_embed[0].weight.clone()
    [loss] = advance(run, 1)
    assert math.isfinite(loss) and run.skipped == 0 and run.finished
    assert not torch.equal(run.learner.model.class_embed[0].weight, before)
    one = replace(splits[1], images=splits[1].images[:1])
    metrics, _ = evaluate(run.learner.model, validation_loader(one, config, CPU, workers=0), CPU)
    assert metrics["images"] == 1


def test_what_a_run_asks_of_the_stream(splits, monkeypatch):
    asked = []

    def stream(*arguments, **given):
        asked.append(given)
        return TrainingStream(*arguments, **given)

    monkeypatch.setattr("detr.run.TrainingStream", stream)
    for changes in ({}, {"augment": "tiny", "shape_groups": False, "denoising": 0}):
        next(Run(replace(SMALL, **changes), splits[0], CPU).batches())
    assert [given["group"] for given in asked] == [2, 1] and [given["denoising"] for given in asked] == [24, 0]
    assert [given["early"][1] for given in asked] == [8, 0]


def test_processes_drop_other_neurons(splits):
    losses = []
    for rank in (0, 1):
        run = Run(SMALL, splits[0], CPU)
        batches = next(run.batches())
        run.rank = rank
        losses.append(run.step(batches).loss)
    assert losses[0] != losses[1]


def test_a_killed_run_loses_ten_minutes_at_most(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("detr.run.CHECKPOINT_SECONDS", 0)
    asked = []

    def killed():
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        Run(SMALL, splits[0], CPU).train(validation_loader(splits[1], SMALL, CPU), tmp_path, {}, killed)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["steps_done"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_acts_as_ever(number):
    received, before = [], signal.getsignal(number)
    signal.signal(number, lambda *_: received.append(1))
    try:
        with contextlib.closing(StopOnSignal()) as stop:
            os.kill(os.getpid(), number)
            assert received == [1] and not stop.received  # nobody had asked
            assert not stop()
            os.kill(os.getpid(), number)
            assert received == [1] and stop.received and stop()
            os.kill(os.getpid(), number)
            assert received == [1, 1]
    finally:
        signal.signal(number, before)


def test_learning_rates():
    step = preset("tiny", warmup_steps=4, schedule="step")
    expected = [0.25, 0.5, 0.75, 1, *[1] * 12, *[0.1] * 4]
    assert [lr_factor(s, 20, step) for s in range(20)] == pytest.approx(expected)
    cosine = preset("tiny", warmup_steps=4, schedule="cosine")
    assert [lr_factor(s, 12, cosine) for s in (0, 3, 4, 6, 8, 10, 12)] == pytest.approx(
        [0.25, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]
    )


def test_the_groups_follow_the_schedule(splits):
    run = Run(SMALL, splits[0], CPU)
    advance(run, 2)
    rates = {group["name"]: group["lr"] for group in run.learner.optimizer.param_groups}
    assert rates["rest"] == pytest.approx(SMALL.lr * 3 / 5)
    assert rates["offsets"] == pytest.approx(SMALL.lr * 3 / 5 * SMALL.lr_offsets_mult)


def test_evaluations_by_steps_or_epochs(splits):
    for fields, expected in (
        ({"eval_steps": 8}, [8, 16, 20]),
        ({"eval_steps": None, "eval_every": 1}, [4, 7, 11, 14, 18, 20]),  # 3.5 steps an epoch
        ({"eval_steps": None, "eval_every": 3}, [11, 20]),
        ({"eval_steps": None, "eval_every": 2, "steps": None, "epochs": 4}, [7, 14]),
    ):
        run = Run(replace(SMALL, **fields), splits[0], CPU)
        due = []
        for step in range(1, run.total_steps + 1):
            run.steps_done = step
            due += [step] * run.evaluation_is_due
        assert due == expected


def test_eight_images_are_learned_by_heart(tmp_path):
    write_dataset(tmp_path, 8, 1, 64, 3)
    split = load_split(tmp_path, "train")
    # noised boxes are others in every step; a score whose target is an IoU below 1 keeps a loss, here at the weight 1
    fields = {"image_size": 64, "max_size": 64, "augment": "tiny", "denoising": 0, "loss_ce": 1.0}
    config = preset("tiny", **fields, lr=2e-3, steps=240, warmup_steps=30)
    run = Run(config, split, CPU)
    losses = advance(run, 240)
    metrics, _ = evaluate(run.learner.model, validation_loader(split, config, CPU), CPU)
    assert metrics["images"] == 8
    assert losses[-1] < 0.05 * losses[0]
    assert metrics["AP"] >= 0.95
