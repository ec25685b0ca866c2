"""When two plans' results are the same for `set_autotune`."""

import math

import pytest
import torch

from msda_triton.kernels import tuning

AGREE = [
    (torch.float32, [1.0, 2.0], [1.0, 2.0001], True),  # a sum of some hundred terms in another order
    (torch.float32, [1.0, 2.0], [1.0, 2.001], False),
    (torch.float32, [0.0, 2.0], [1e-4, 2.0], True),
    (torch.float32, [0.0, 2.0], [1e-3, 2.0], False),
    (torch.bfloat16, [1.0, 256.0], [1.0, 258.0], True),  # neighbours
    (torch.bfloat16, [1.0, 256.0], [1.0, 264.0], False),
    (torch.float16, [1.0, 1024.0], [1.0, 1025.0], True),
    (torch.float16, [1.0, 1024.0], [1.0, 1030.0], False),
    (torch.float64, [1.0, 2.0], [1.0, 2.0 + 1e-13], True),
    (torch.float64, [1.0, 2.0], [1.0, 2.0 + 1e-11], False),
    (torch.float32, [1.0, math.nan], [1.0, math.nan], True),
    (torch.float32, [1.0, math.nan], [math.nan, 1.0], False),
    (torch.float32, [1.0, math.inf], [1.0, math.inf], True),
    (torch.float32, [1.0, math.inf], [1.1, math.inf], False),
    (torch.float32, [0.0, 2.0], [0.01, 1e30], False),  # what is wrong is no scale
    (torch.float32, [0.0, 0.0], [0.0, 1e-30], False),
    (torch.float32, [], [], True),
]


@pytest.mark.parametrize(("dtype", "want", "got", "same"), AGREE)
def test_what_agrees(dtype, want, got, same):
    for name in (*tuning.WRITTEN, tuning.SUMS):
        assert tuning.agree(name, torch.tensor(got, dtype=dtype), torch.tensor(want, dtype=dtype)) == same


@pytest.mark.parametrize(
    ("name", "others"),
    [("grad_loc_ptr", 3), ("grad_ref_ptr", 3), ("grad_attn_ptr", 0), ("out_ptr", 0), (tuning.SUMS, 0)],
)
def test_gradients_of_locations_may_jump_in_a_few_places(name, others):
    want = torch.rand(30_000)
    for number in (others, others + 1):
        got = want.clone()
        got[:number] += 1
        assert tuning.agree(name, got, want) == (number == others)
    got = want.clone()
    got[0] = math.nan  # not written
    assert not tuning.agree(name, got, want)


def test_one_large_number_hides_nothing_of_other_queries():
    want = torch.rand(2, 3, 4, 5)
    want[0, 0, 0, 0] = 1e6
    for b, q, same in ((0, 0, True), (0, 1, False), (1, 0, False)):
        got = want.clone()
        got[b, q] += 0.1
        assert tuning.agree("out_ptr", got, want) == same
