"""Two processes that torchrun starts, by gloo, do together what one does alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import distributed_run
import pytest
import torch
from distributed_run import CONFIG, NORMED, RUNS, take, without_objects

from detr import checkpoint, load
from detr.data import TrainingStream
from detr.errors import ArgumentError
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_dataset(root, 7, 5, 64, 0)
    return root


@pytest.fixture(scope="module")
def split(data):
    return load_split(data, "train")


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """The folder that two processes of distributed_run.py filled."""
    folder = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [distributed_run.__file__, str(data), str(folder)]
    here = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def ranks(out):
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_batches_are_dealt_out(split):
    class Numbers:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            return index, {}

    one = TrainingStream(Numbers(), 3)
    two = [TrainingStream(Numbers(), 3, batch=2, rank=rank, world=2) for rank in range(2)]
    alone = [one[n][0] for n in range(150)]
    together = [two[b % 2][b // 2 * 2 + i][0] for b in range(75) for i in range(2)]
    assert together == alone


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_with_twice_the_batch(split, ranks, name):
    run = Run(replace(CONFIG, **RUNS[name] | {"accumulate": 1}), split, CPU)
    losses = take(run, 5)
    for rank in ranks:
        theirs, norms, model, averaged = rank[name]
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert norms == pytest.approx(run.sums["grad_norm"], rel=1e-5)
        torch.testing.assert_close(model, dict(run.state()["model"]), rtol=0, atol=1e-5)
        torch.testing.assert_close(averaged, dict(run.state()["ema"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ranks[0][name][2], ranks[1][name][2], rtol=0, atol=0)


def test_running_statistics_are_means_over_the_processes(split, ranks):
    alone = Run(replace(CONFIG, **NORMED), split, CPU)
    (first, means, model), (second, also, _) = (rank["statistics"] for rank in ranks)
    before = alone.learner.statistics
    for step in range(2):
        assert len(first[step]) == 16
        for one, other, mean, same, old in zip(first[step], second[step], means[step], also[step], before, strict=True):
            torch.testing.assert_close(mean, (one + other) / 2)
            assert torch.equal(mean, same)
            assert not torch.equal(one, other) and not torch.equal(mean, old)
        before = means[step]
    # a checkpoint gets them averaged over the steps like the weights: of the second step with a decay of 2 / 11
    torch.testing.assert_close(model["backbone.stem.1.running_mean"], (2 * means[0][0] + 9 * means[1][0]) / 11)


@pytest.mark.parametrize("name", ["focal", "two_stage"])
def test_ranks_whose_batch_has_no_object(split, ranks, name):
    run = Run(replace(CONFIG, **RUNS[name]), split, CPU)
    one_half = take(run, 2, lambda targets: without_objects(targets[2:]))
    expected = one_half, take(run, 2, without_objects), dict(run.sums)
    assert ("loss_giou_dn" in expected[2]) == (name == "two_stage")
    for rank in ranks:
        for theirs, ours in zip(rank[f"{name} without objects"], expected, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5)


def test_all_processes_take_the_steps_that_the_main_one_chose(split, ranks):
    (steps, kept, losses), other = (rank["pace"] for rank in ranks)
    assert steps == kept != CONFIG.steps and (steps, kept, losses) == tuple(other)
    assert losses == pytest.approx(take(Run(CONFIG, split, CPU), 1), rel=1e-5)


def test_each_image_is_evaluated_by_one_process(ranks):
    assert sorted(ranks[0]["images"] + ranks[1]["images"]) == [1, 2, 3, 4, 5]


def test_a_fault_of_one_process_is_known_to_all(out, ranks):
    assert ranks[0]["unreadable"] == ranks[1]["unreadable"] == ["a.jpg: broken"]
    # a NaN in the second step of rank 1, and a signal to it in the third
    [line] = (out / "stopped" / "nonfinite.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["step"], noted["rank"], len(noted["image_ids"])) == (2, 1, 2)
    assert ranks[0]["stopped_at"] == ranks[1]["stopped_at"] == 3


def test_a_detector_evaluates_all_images_in_each_process(ranks, data):
    count = len(load_split(data, "val").images)
    assert [rank["evaluated"] for rank in ranks] == [count, count]


def test_resumed_and_evaluated_together(data, out, split):
    metrics = json.loads((out / "stopped" / "eval.json").read_text())
    assert checkpoint.load(out / "stopped" / "checkpoint.pt")["steps_done"] == metrics["step"] == 5
    alone = load(out / "stopped", CPU).evaluate(data)
    for name in ("AP", "AP50", "AR100", "per_class"):
        assert metrics[name] == alone[name]
    printed = (out / "printed").read_text()
    assert "2 processes x 1 accumulated batches x 2 images" in printed
    assert printed.count("parameters") == 1  # one process prints


def test_a_batch_that_cannot_be_divided(split, monkeypatch):
    monkeypatch.setattr("detr.distributed.world_size", lambda: 3)
    with pytest.raises(
        ArgumentError, match="batch_size: expected a multiple of 3 processes x 1 accumulated batches, got 4"
    ):
        Run(CONFIG, split, CPU)
    with pytest.raises(ArgumentError, match="batch_size: expected a multiple of 3 processes, got 4"):
        Run(replace(CONFIG, accumulate=0), split, CPU)
