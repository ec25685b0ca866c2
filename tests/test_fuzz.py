"""Some of the random calls of `fuzz.py`, 300 in all; `make test-all` runs many more."""

import pytest
from fuzz import Call, calls, faults
from hypothesis import HealthCheck, Phase, given, seed, settings

# in parts, which the processes of a test run share: backend, calls, seed
PARTS = [("torch", 200, 0), ("exported", 50, 1), *(("triton", 10, n) for n in range(2, 7))]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinity in interpreted kernels
@pytest.mark.parametrize(("backend", "examples", "number"), PARTS)
def test_random_calls(backend, examples, number):
    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(call=calls(small=backend == "triton"))
    def check(call: Call) -> None:
        assert faults(call, backend) == []

    check()
