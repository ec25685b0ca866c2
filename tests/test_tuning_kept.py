"""`set_autotune`: what is kept for the next process, and for what it is good."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import tuned
from tuned import BOTH, assert_right, candidates, go, start

from msda_triton import user_cache
from msda_triton.kernels import launch, tuning

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clock(monkeypatch, tmp_path):
    return start(monkeypatch, tmp_path)


def another_process(clock):
    """What this one has in its memory is gone."""
    tuning._fastest.clear()
    clock.runs.clear()
    clock.timed.clear()


@BOTH
def test_another_process_finds_the_winner(direction, clock):
    winner = candidates(direction)[2]
    clock.ms = {winner: 1.0}
    go(direction, clock)
    (file,) = user_cache.folder().iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and user_cache.folder().stat().st_mode & 0o777 == 0o700
    another_process(clock)
    assert_right(direction, go(direction, clock))
    assert clock.timed == [] and [plan for plan, _ in clock.runs] == [winner]


KEY = {
    "the dtype": lambda m: {"dtype": torch.float16},
    "the heads": lambda m: {"M": 4},
    "the channels": lambda m: {"D": 16},
    "the points": lambda m: {"P": 4},
    "the GPU": lambda m: m.setattr(tuning, "_device_name", lambda device: "another GPU") or {},
    "PyTorch": lambda m: m.setattr(torch, "__version__", "2.99") or {},
    "Triton": lambda m: m.setattr(tuning.triton, "__version__", "3.99") or {},
    "this package": lambda m: m.setattr(tuning, "__version__", "9.9") or {},
    "the kernel's source": lambda m: m.setattr(launch._msda_fwd_kernel, "cache_key", "other", raising=False) or {},
    "queries that are no pixels": lambda m: {"Q": 9},
}


@pytest.mark.parametrize("what", KEY)
def test_what_a_winner_is_good_for(what, clock, monkeypatch):
    go("forward", clock)
    another_process(clock)
    go("forward", clock, **KEY[what](monkeypatch))
    assert len(clock.timed) >= 3 and len(list(user_cache.folder().iterdir())) == 2


def test_image_and_batch_size_are_not_in_the_key(clock, monkeypatch):
    go("forward", clock)
    monkeypatch.setattr(tuned, "LEVELS", [(5, 7), (2, 3)])
    clock.timed.clear()
    go("forward", clock, Q=41)
    go("forward", clock, Q=41, B=3)
    assert clock.timed == []


DAMAGED = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "no json": lambda text: "plan",
    "a list": lambda text: "[]",
    "no plan": lambda text: text.replace('"plan"', '"plans"'),
    "an unknown field": lambda text: text.replace('"BLOCK_Q"', '"BLOCK"'),
    "of another call": lambda text: text.replace('"M": 2', '"M": 3'),
    "no text": lambda text: "\udcff\udcfe",
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_one_line(how, clock):
    go("forward", clock)
    (file,) = user_cache.folder().iterdir()
    good = file.read_text()
    file.write_text(DAMAGED[how](good), errors="surrogateescape")
    another_process(clock)
    with pytest.warns(UserWarning) as caught:
        assert_right("forward", go("forward", clock))
    assert [str(w.message) for w in caught] == [f"set_autotune: {file} is damaged, and ignored"]
    assert clock.timed == candidates("forward") and file.read_text() == good


def test_a_plan_that_is_no_candidate_any_more_is_timed_again(clock):
    go("forward", clock)
    (file,) = user_cache.folder().iterdir()
    file.write_text(file.read_text().replace('"warps": ', '"warps": 3'))
    another_process(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go("forward", clock)
    assert clock.timed == candidates("forward")


PROCESS = """
import sys
import tuned as t
from msda_triton.kernels import launch, plan, tuning

plan.INTERPRETED, plan._FEW_ROWS = False, 0
clock = t.Clock()
tuning.timing = clock.time
winner = t.candidates("forward")[int(sys.argv[1])]
clock.ms = {winner: 1.0}
got = t.go("forward", clock)
t.assert_right("forward", got)
print(len(clock.timed), clock.runs[-1][0] == winner)
"""


def test_two_processes_at_once_share_a_cache(clock, monkeypatch, tmp_path):
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "tests", "XDG_CACHE_HOME": tmp_path}
    options = {"env": os.environ | environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, "2"], text=True, **options) for _ in range(2)]
    number = len(candidates("forward"))
    for process in both:
        # the one that comes second may find what the first one has left
        assert process.communicate(timeout=200)[0] in (f"{number} True\n", "0 True\n")
    monkeypatch.setattr(user_cache, "folder", lambda: tmp_path / "msda_triton")
    (file,) = user_cache.folder().iterdir()
    assert json.loads(file.read_text())["key"]["M"] == 2
    go("forward", clock)  # a third one
    assert clock.timed == [] and clock.runs[-1][0] == candidates("forward")[2]
