"""Loader processes and signals: they end with their parent, and by nobody else's signal."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker

import pytest
import torch
from test_detr_processes import CPU, ENVIRONMENT, OFFICIAL

from detr import data as data_module
from detr.data import DetectionDataset, validation_loader
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset
from detr.transforms import training_transform

torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, 6, 2, 64, 0)
    return root


def test_loader_processes_leave_the_first_signal_to_their_parent(data):
    """A scheduler sends SIGTERM to all processes of a run, whose last step needs batches."""
    run = Run(OFFICIAL, load_split(data, "train"), CPU, workers=2)
    expected = [batch[0].shape for [batch] in Run(OFFICIAL, load_split(data, "train"), CPU, workers=0).batches()]
    batches = run.batches()
    shapes = [next(batches)[0][0].shape for _ in range(2)]  # one of each process: both are ready for signals
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in ("TERM", "TERM", "INT"):  # from another process than the parent
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
    shapes += [batch[0].shape for [batch] in batches]
    assert shapes == expected
    assert all(worker.join(10) is None and not worker.is_alive() for worker in workers)
    # its own, by which PyTorch ends those that do not end by themselves
    again = Run(OFFICIAL, load_split(data, "train"), CPU, workers=1).batches()
    next(again)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture
def default_signals():
    """Ctrl-C is heard, as it is not in a job in the background of a shell, and no signal is blocked."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("number", "other"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_that_comes_while_loader_processes_start(data, monkeypatch, default_signals, number, other):
    def slow(worker):
        os.write(written, b".")
        time.sleep(0.5)
        prepare(worker)

    read, written = os.pipe()
    prepare = data_module._leave_signals_to_the_parent
    monkeypatch.setattr(data_module, "_leave_signals_to_the_parent", slow)
    dataset = DetectionDataset(load_split(data, "train"), training_transform(OFFICIAL))
    loader = data_module.make_loader(dataset, [[0], [1]], CPU, workers=2)
    start = multiprocessing.Process.start

    def started(process):
        start(process)
        kill = ["kill", f"-{number.value}", str(process.pid)]
        subprocess.run(kill, check=True)
        assert select.select([read], [], [], 30)[0], "it does not live until it prepares"
        os.read(read, 1)
        subprocess.run(kill, check=True)

    signal.pthread_sigmask(signal.SIG_SETMASK, {other})
    monkeypatch.setattr("multiprocessing.context.Process.start", started)
    batches = iter(loader)
    assert len(next(batches)[0]) == 1
    assert blocked() == {other}  # as before, and not until the last batch
    assert len(next(batches)[0]) == 1 and next(batches, None) is None
    os.close(read), os.close(written)


def test_loader_processes_that_cannot_be_started(data, monkeypatch, default_signals):
    def refused(_):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.Process.start", refused)
    loader = validation_loader(load_split(data, "val"), OFFICIAL, CPU, workers=1)
    with pytest.raises(BlockingIOError):
        next(iter(loader))
    assert blocked() == set()


def test_the_resource_tracker_does_not_let_signals_through(monkeypatch, default_signals):
    """With spawn the first lock starts it, which before Python 3.12 unblocks them."""
    tracker = resource_tracker.ResourceTracker()
    monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda *_: "spawn")
    with data_module._signals_held():
        tracker.ensure_running()  # as a lock does
        assert blocked() == {signal.SIGINT, signal.SIGTERM}
    os.close(tracker._fd)
    os.waitpid(tracker._pid, 0)


LEFT_BEHIND = """
import os, signal, sys, time
from detr import data
prepare = data._leave_signals_to_the_parent
def slow(worker):
    print(os.getpid(), flush=True)
    time.sleep(1)  # the parent ends meanwhile
    prepare(worker)
data._leave_signals_to_the_parent = slow
class Images(data.Dataset):
    cache = None
    def __getitem__(self, index):
        time.sleep(60)
if __name__ == "__main__":
    next(iter(data.make_loader(Images(), [[0]], data.torch.device("cpu"), workers=1)))
"""


def test_a_loader_process_is_not_left_behind(tmp_path):
    """Its parent is killed while it starts: PyTorch, which asks for the parent later, finds none that could end."""
    parent = subprocess.Popen([sys.executable, "-c", LEFT_BEHIND], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(300):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the loader process is still there after 30 s")
