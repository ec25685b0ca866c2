"""Processes that are started, killed, or fail: nothing is lost, and whoever survives says one line."""

import contextlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from user_files import SMALL

from detr import checkpoint, run_folder
from detr.cli import main
from detr.data import DetectionDataset, TrainingStream, validation_loader
from detr.errors import DataError, TrainingError
from detr.presets import preset
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset
from detr.transforms import training_transform

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
OFFICIAL = preset(
    "tiny",
    **{"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "augment": "official"},
    **{"image_size": 64, "max_size": 64, "batch_size": 2, "steps": 4, "warmup_steps": 0},
)
PATHS = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 6, 2, 64, 0)
    return root


def train(data, out, *flags):
    return ["train", "--data", str(data), "--out", str(out), *SMALL, "--device", "cpu", *flags]


def error_lines(captured):
    return [line for line in captured.err.splitlines() if line.startswith("detr ")]


class NoTensors(pickle.Pickler):
    def reducer_override(self, thing):
        assert not isinstance(thing, torch.Tensor | torch.UntypedStorage), "a tensor is sent to a process"
        return NotImplemented


def test_nothing_that_a_loader_process_is_sent_is_a_tensor(data):
    split = load_split(data, "train")
    kept = DetectionDataset(split, training_transform(replace(OFFICIAL, augment="tiny")), (64, 64))
    read = DetectionDataset(split, training_transform(OFFICIAL))
    assert kept.cache is not None
    for dataset in (TrainingStream(kept, 0, 2), TrainingStream(read, 0, 2), kept):
        torch.manual_seed(1)
        image, target = dataset[1]
        buffer = io.BytesIO()
        NoTensors(buffer).dump(dataset)
        torch.manual_seed(1)
        same_image, same_target = pickle.loads(buffer.getvalue())[1]
        torch.testing.assert_close([image, target], [same_image, same_target], rtol=0, atol=0)


STARTED = """
import multiprocessing, subprocess, sys, threading, time
def interrupt():  # as soon as there is a loader process, and long before it is ready
    while not multiprocessing.active_children():
        time.sleep(0.01)
    for process in multiprocessing.active_children():
        for number in ("-TERM", "-INT"):
            subprocess.run(["kill", number, str(process.pid)], check=True)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    threading.Thread(target=interrupt, daemon=True).start()
    from detr.cli import main
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_loader_processes_that_are_started(data, tmp_path, method):
    """The default of Python 3.14, macOS and Windows; with more images than a process can be sent open files for."""
    write_dataset(tmp_path / "data", 80, 2, 64, 0)
    (tmp_path / "started.py").write_text(STARTED)
    flags = ["--set", "augment=official", "--steps", "2", "--workers", "1"]
    command = [
        sys.executable,
        str(tmp_path / "started.py"),
        method,
        *train(tmp_path / "data", tmp_path / "run", *flags),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert main(train(tmp_path / "data", tmp_path / "forked", *flags)) == 0
    same = [json.loads(line) for line in (tmp_path / "forked" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == same[0]["loss"]


def test_no_open_file_for_a_target(data):
    """A batch of many images keeps a few files open between processes, not three for each image."""
    loader = validation_loader(load_split(data, "train"), OFFICIAL, CPU, workers=1, batch_size=6)
    batches = iter(loader)
    before = len(os.listdir("/proc/self/fd"))
    _, _, targets = next(batches)
    assert len(targets) == 6 and all(isinstance(target["boxes"], torch.Tensor) for target in targets)
    # pipes of the process, and the two tensors of the batch and of the one after it; three of a target would be 18 more
    assert len(os.listdir("/proc/self/fd")) - before < 12


def test_two_runs_in_one_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.05)
    out = tmp_path / "run"
    with run_folder.hold(out, resume=False):
        assert main(train(data, out, "--steps", "1")) == 1
        [line] = error_lines(capsys.readouterr())
        assert line == f"detr train: error: {out}: another process is writing to this run"
        assert not (out / "config.json").exists()
    # a start that wrote nothing yet is no run
    assert main(train(data, out, "--steps", "1")) == 0
    with run_folder.hold(out, resume=True):
        assert main(["train", "--resume", str(out), "--device", "cpu"]) == 1
        assert "another process is writing to this run" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0


def test_an_unexpected_exception(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(train(data, out, "--steps", "1")) == 0

    def bug(*_, **__):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr("detr.detector.evaluate", bug)
    monkeypatch.setattr("detr.run.detect", bug)
    for arguments, folder in (
        (["eval", "--data", str(data), "--checkpoint", str(out / "best.pt")], tmp_path),
        (["train", "--resume", str(out), "--device", "cpu"], out),
        (train(data, tmp_path / "new", "--steps", "1"), tmp_path / "new"),
    ):
        capsys.readouterr()
        assert main(arguments) == 70
        [line] = error_lines(capsys.readouterr())
        start = f"detr {arguments[0]}: KeyError: 'first line\\nsecond line' (a fault of detr: please report it, with "
        assert line.startswith(f"{start}the traceback in {folder}/detr-traceback-")
        text = Path(line.split("the traceback in ")[1].removesuffix(")")).read_text()
        assert text.startswith("Traceback (most recent call last)") and "in bug" in text
    # a fault without a message; and a disk without room for the traceback
    monkeypatch.setattr("detr.detector.evaluate", lambda *_: 1 / 0)
    monkeypatch.setattr("tempfile.mkstemp", lambda *_, **__: Path("/proc/none/x").touch())
    assert main(["eval", "--data", str(data), "--checkpoint", str(out / "best.pt")]) == 70
    [line] = error_lines(capsys.readouterr())
    assert line.startswith(
        "detr eval: ZeroDivisionError: division by zero (a fault of detr: please report it, with what"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB."),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9"),
        (MemoryError, "Unable to allocate 7 EiB"),
    ],
)
def test_a_device_without_room(data, tmp_path, monkeypatch, capsys, kind, text):
    def full(*_, **__):
        raise kind(f"{text}\nmore")

    monkeypatch.setattr(Run, "step", full)
    assert main(train(data, tmp_path / "run", "--steps", "1")) == 1
    [line] = error_lines(capsys.readouterr())
    assert line == f"detr train: error: not enough memory: {text}; fewer or smaller images need less"


def test_a_thread_that_fails_and_a_full_disk(data, tmp_path, capsys):
    """TensorBoard writes in a thread of its own."""
    from user_files import full_disk

    write = Run.step

    def step(trainer, batches, stop=False):
        if trainer.steps_done == 2:
            held.enter_context(full_disk(room=100))
        return write(trainer, batches, stop)

    with contextlib.ExitStack() as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        assert main(train(data, tmp_path / "run", "--steps", "20", "--set", "eval_steps=20")) == 1
    captured = capsys.readouterr()
    [line] = error_lines(captured)
    assert line.startswith(f"detr train: error: {tmp_path / 'run'}/metrics.jsonl: not written: File too large")
    assert "Traceback" not in captured.err


def test_warnings_look_as_before_after_a_command(tmp_path):
    import warnings

    shown = warnings.showwarning
    assert main(["inspect", str(tmp_path / "none.pt")]) == 1
    assert warnings.showwarning is shown


def test_a_loader_process_that_is_killed(data, monkeypatch):
    monkeypatch.setattr(DetectionDataset, "_read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    trainer = Run(OFFICIAL, load_split(data, "train"), CPU, workers=1)
    with pytest.raises(TrainingError, match=r"^step 0: DataLoader worker .*; fewer --workers need less memory$"):
        next(trainer.batches())


def test_a_script_whose_loader_processes_import_it_again(data, monkeypatch):
    monkeypatch.setattr(DetectionDataset, "_read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr("multiprocessing.get_start_method", lambda *_: "spawn")
    batches = Run(OFFICIAL, load_split(data, "train"), CPU, workers=1).batches()
    with pytest.raises(TrainingError, match=r"and a script must call this below `if __name__ == \"__main__\":`$"):
        next(batches)


def test_a_loader_process_without_memory(data, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DetectionDataset, "_read", full)
    trainer = Run(OFFICIAL, load_split(data, "train"), CPU, workers=1)
    with pytest.raises(
        TrainingError, match=r"^step 0: RuntimeError: .*can't allocate memory; fewer --workers need less"
    ):
        next(trainer.batches())


def test_a_loader_process_that_finds_no_image(data, monkeypatch):
    def damaged(*_):
        raise DataError("a.json: image 3: a\r\nb.jpg: not a readable image: broken")

    monkeypatch.setattr(DetectionDataset, "_read", damaged)
    trainer = Run(OFFICIAL, load_split(data, "train"), CPU, workers=1)
    with pytest.raises(DataError) as error:
        next(trainer.batches())
    first = "a.json: image 3: a\r\nb.jpg: not a readable image: broken"
    assert str(error.value) == f"6 images one after the other cannot be read, the first: {first}"


FAULTY_RANK = """
import os, signal, sys
from detr import cli
from detr.run import Run
step = Run.step
def faulty(trainer, batches, stop=False):
    if trainer.rank == 1 and trainer.steps_done == 2:
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"failed": TrainingError, "bug": LookupError}[os.environ["HOW"]]("no more")
    return step(trainer, batches, stop)
Run.step = faulty
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["killed", *(pytest.param(how, marks=pytest.mark.long) for how in ("failed", "bug"))])
def test_a_rank_that_ends(data, tmp_path, how):
    (tmp_path / "faulty.py").write_text(FAULTY_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "faulty.py"), *train(data, tmp_path / "run", "--steps", "6", "--workers", "0")]
    environment = ENVIRONMENT | {"HOW": how}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    # torchrun has a traceback of its own, with no file of ours in it
    assert "detr/cli" not in done.stderr and "gloo" not in done.stderr
    assert done.stderr.count("detr train: error: process 0: ") == 1
    other = {"killed": "", "failed": "error: no more\n", "bug": "LookupError: no more (a fault"}[how]
    assert done.stderr.count("detr train: ") == 1 + bool(other)
    assert f"detr train: {other}" in done.stderr
    # the folder is free, and nothing there stands in the way
    assert main(train(data, tmp_path / "run", "--steps", "2")) == 0


@pytest.mark.long
def test_killed_at_twenty_moments(data, tmp_path):
    """kill -9 at random moments, while it starts and writes among them: the run ends as if undisturbed."""
    generator, kills, out = random.Random(0), 0, tmp_path / "killed"
    flags = ["--steps", "300", "--set", "eval_steps=7", "--ema", "0.9", "--workers", "1"]
    command = [sys.executable, "-m", "detr"]
    while kills < 20:
        resumed = (out / "checkpoint.pt").exists()
        arguments = ["train", "--resume", str(out), "--device", "cpu"] if resumed else train(data, out, *flags)
        process = subprocess.Popen(
            [*command, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        time.sleep(generator.uniform(3, 8))
        if process.poll() is None:
            process.kill()
            kills += 1
        else:
            assert process.returncode == 0, process.stderr.read()
            # finished before: once more from the start
            checkpoint.load(out / "checkpoint.pt")
            out = tmp_path / f"killed{kills}"
        process.communicate()
    if not (out / "checkpoint.pt").exists():
        assert main(train(data, out, *flags)) == 0
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 0
    assert main(train(data, tmp_path / "straight", *flags)) == 0
    states = [checkpoint.load(run / "checkpoint.pt") for run in (out, tmp_path / "straight")]
    for name in ("model", "ema"):
        torch.testing.assert_close(*(state[name] for state in states), rtol=0, atol=0)
    torch.testing.assert_close(*(state["optimizer"]["state"] for state in states), rtol=0, atol=0)
    rows = [(run / "metrics.jsonl").read_text().splitlines() for run in (out, tmp_path / "straight")]
    killed, straight = ([json.loads(line) | {"seconds_per_step": 0} for line in lines] for lines in rows)
    assert killed == straight
