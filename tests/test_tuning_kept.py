"""`set_autotune`: what is kept for the next process, and for what it is good."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import tuned
from tuned import BOTH, assert_right, call_of, candidates, go, start

from msda_triton import user_cache
from msda_triton.checks import fused_call, plain_call
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


def plain(sizes=((3, 4), (2, 2)), points=(2, 2), dtypes=(torch.float32,) * 3, wider=0, M=2):
    S = sum(h * w for h, w in sizes)
    value = torch.zeros(1, S, M, 32 + wider, dtype=dtypes[0])[..., :32]
    locations = torch.zeros(1, 16, M, sum(points), 2, dtype=dtypes[1])
    return plain_call(value, sizes, locations, torch.zeros(1, 16, M, sum(points), dtype=dtypes[2]), num_points=points)


def fused(dim, levels, mask=False):
    weights, points = torch.zeros(1, 16, 2, 2, 2), torch.zeros(1, 16, levels, dim)
    mask = torch.zeros(1, 16, dtype=torch.bool) if mask else None
    value, offsets = torch.zeros(1, 16, 2, 32), torch.zeros(1, 16, 2, 2, 2, 2)
    return fused_call(value, [(3, 4), (2, 2)], points, offsets, weights, value_mask=mask)


HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TWO = {
    "levels": (plain(points=(1, 3)), plain(((3, 4), (1, 2), (1, 2)), (1, 2, 1))),
    "points of unequal levels": (plain(points=(1, 3)), plain(points=(2, 3))),
    "numbers of a reference point": (fused(2, 1), fused(4, 1)),
    "reference points of each level": (fused(2, 1), fused(2, 2)),
    "rows of value that are wider": (plain(), plain(wider=8)),
    "two half dtypes": (plain(dtypes=(HALF,) * 3), plain(dtypes=(BF16, HALF, HALF))),
    "dtype of locations": (plain(), plain(dtypes=(F32, HALF, F32))),
    "a mask": (fused(2, 1), fused(2, 1, True)),
    "heads in equal rows": (plain(), plain(M=4)),
}


@pytest.mark.parametrize("what", TWO)
def test_calls_of_two_classes(what, clock, monkeypatch):
    keys = []
    monkeypatch.setattr(tuning, "known", lambda key, plans: keys.append(key) or plans[0])
    for call in TWO[what]:
        launch.forward(call, run=clock.run)
    assert keys[0] != keys[1]


def test_gradients_that_are_asked_for(clock, monkeypatch):
    keys = []
    monkeypatch.setattr(tuning, "known", lambda key, plans: keys.append(json.dumps(key)) or plans[0])
    call, grad_out = call_of()
    for needs in ([True, True, True, False], [True, False, False, False], [False, True, True, False]):
        launch.backward(grad_out, call, needs, run=clock.run)
    assert len(set(keys)) == 3


def test_the_name_is_of_the_calls_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert tuning._device_name.__wrapped__(torch.device("cuda", 1)) == "GPU cuda:1"


def test_a_file_is_read_once(clock):
    go("forward", clock)
    another_process(clock)
    go("forward", clock)
    shutil.rmtree(user_cache.folder())
    go("forward", clock)
    assert clock.timed == []


def test_the_candidate_runs_and_not_its_like_in_the_file(clock):
    go("forward", clock)
    (file,) = user_cache.folder().iterdir()
    file.write_text(file.read_text().replace('"BLOCK_Q": 32', '"BLOCK_Q": 32.0'))
    another_process(clock)
    go("forward", clock)
    assert clock.timed == [] and type(clock.runs[-1][0].BLOCK_Q) is int and "32.0" in file.read_text()


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
    "nested too deep": lambda text: "[" * 100_000,
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
    assert clock.timed == candidates("forward") * 2 and file.read_text() == good


def test_a_plan_that_is_no_candidate_any_more_is_timed_again(clock):
    go("forward", clock)
    (file,) = user_cache.folder().iterdir()
    file.write_text(file.read_text().replace('"warps": ', '"warps": 3'))
    another_process(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go("forward", clock)
    assert clock.timed == candidates("forward") * 2


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
        assert process.communicate(timeout=200)[0] in (f"{2 * number} True\n", "0 True\n")
    monkeypatch.setattr(user_cache, "folder", lambda: tmp_path / "msda_triton")
    (file,) = user_cache.folder().iterdir()
    assert json.loads(file.read_text())["key"]["M"] == 2
    go("forward", clock)  # a third one
    assert clock.timed == [] and clock.runs[-1][0] == candidates("forward")[2]
