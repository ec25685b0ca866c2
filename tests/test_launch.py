"""The launch that is found again: beside Triton's own way, without an interpreter, on a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> str:
    """What Python prints in a process whose kernels are not interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_what_is_found_is_what_triton_would_launch():
    """800 calls that differ in one thing, or in all: dtypes, strides, alignment of each pointer, which operands there
    are, device, plan, determinism, gradients asked for, timing."""
    *_, last = python("-m", "tests.fake_launches", "--calls", "800").splitlines()
    calls, kept, kernels, found, repeated = (int(word) for word in last.replace(",", "").split() if word.isdigit())
    assert (calls, kept > 500, kernels > 500, found > 100, repeated > 300) == (800, True, True, True, True), last


SCRIPT = """
import contextlib
import torch
from benchmarks import fake_gpu
fake = fake_gpu.install(compiling=False)
fake.record = True
from msda_triton import ms_deform_attn
from msda_triton.kernels import launch

def step(B, sizes, M, D, Q=3, dtype=torch.float16, P=2):
    S = sum(h * w for h, w in sizes)
    value = torch.zeros(B, S, M, D, dtype=dtype, requires_grad=True)
    locations, weights = torch.zeros(B, Q, M, len(sizes), P, 2), torch.zeros(B, Q, M, len(sizes), P, dtype=dtype)
    ms_deform_attn(value, sizes, locations, weights, backend="triton").sum().backward()

def forget():
    launch._launches.clear()
    fake.launches.clear()
    return len(fake.binaries)

# one head of 8 channels: the elements of an image are a multiple of 16, or are not, with its number of pixels
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    before = forget()
    for B in (1, 2, 3):
        for W in range(50, 56):
            step(B, [(2, W), (1, 1)], M=1, D=8, dtype=dtype)
    print("kernels, launches and kept ones:", len(fake.binaries) - before, len(fake.launches), len(launch._launches))

# no more than so many are kept
forget()
launch.MAX_LAUNCHES, most = 8, 0
for W in range(50, 70):
    step(1, [(2, W)], M=1, D=8)
    most = max(most, len(launch._launches))
print("kept at most:", most)
launch.MAX_LAUNCHES = 4096

# a compiled graph finds the same kernels by the same keys
forget()
step(2, [(3, 4), (2, 2)], M=2, D=32)
kept = len(launch._launches)
torch.compile(step, backend="aot_eager")(2, [(3, 4), (2, 2)], M=2, D=32)
first, second = (fake.launches[i:i + 2] for i in (0, 2))
print("in a graph:", kept, len(launch._launches), [entry.kernel for entry in fake.launches])
print("the same:", [(a.binary, a.grid) for a in first] == [(a.binary, a.grid) for a in second])

# on the tensors' device, and on its current stream
forget()
entered = []

@contextlib.contextmanager
def device(device):
    before, fake.device = fake.device, device.index
    entered.append(device.index)
    yield
    fake.device = before

class There:
    device = torch.device("cuda", 1)

launch.torch.cuda.device = device
here = launch._on_device
launch._on_device = lambda tensor: here(There)
for _ in range(2):
    step(1, [(2, 2)], M=1, D=8)
print("another device:", entered, {entry.stream for entry in fake.launches}, fake.device)
entered.clear()
fake.device = 1
step(1, [(2, 2)], M=1, D=8)
print("the current one:", entered, here(There) is here(torch.empty(0)))
"""


def test_launches_on_a_gpu_that_is_not_there():
    """No image size compiles another kernel, no more than so many launches are kept, a compiled graph finds them too,
    and each is on its tensors' device and that device's current stream."""
    names = ["_msda_fwd_kernel", "_msda_bwd_kernel"] * 2
    assert python("-c", SCRIPT).splitlines() == [
        *["kernels, launches and kept ones: 2 36 36"] * 3,
        "kept at most: 8",
        f"in a graph: 2 2 {names}",
        "the same: True",
        "another device: [1, 1, 1, 1] {1001} 0",
        "the current one: [] True",
    ]
