"""Some of the random calls of `fuzz.py`, 300 in all; `make test-all` runs many more."""

import pytest

from tests import fuzz
from tests.fuzz_calls import Call

# in parts, which the processes of a test run share: backend, calls, seed
PARTS = [("torch", 200, 0), ("exported", 50, 1), *(("triton", 10, n) for n in range(2, 7))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinity in interpreted kernels
@pytest.mark.parametrize(("backend", "examples", "number"), PARTS)
def test_random_calls(backend, examples, number):
    def check(call: Call) -> None:
        assert fuzz.faults(call, backend) == []

    fuzz.draw(examples, number, backend == "triton", check)


SABOTAGE = {
    "one part in a thousand": lambda out: out * 1.001,
    "not a number becomes one": lambda out: out.nan_to_num(),
    "a number becomes none": lambda out: out / (out != 0),
    "another dtype": lambda out: out.double().float(),
}


@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE)
def test_what_is_wrong_is_found(sabotage, monkeypatch):
    right = fuzz.ms_deform_attn
    monkeypatch.setattr(fuzz, "ms_deform_attn", lambda *inputs, **options: sabotage(right(*inputs, **options)))
    found = []
    fuzz.draw(60, 0, False, lambda call: found.extend(fuzz.faults(call, "torch")))
    assert found
