"""`set_autotune`: which plan wins, what a wrong one does, where nothing is timed. `test_tuning_kept.py` has the rest.

Only `test_through_autograd` interprets kernels.
"""

import json
import math
import warnings

import pytest
import torch
import triton
from attention import oracle, oracle_gradients
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from tuned import ALL, BOTH, LEVELS, NAMES, assert_right, call_of, candidates, go, start, tensors, wanted

from msda_triton import ms_deform_attn, set_autotune, user_cache
from msda_triton.checks import fused_call
from msda_triton.kernels import launch, tuning
from msda_triton.kernels import plan as plans


@pytest.fixture
def clock(monkeypatch, tmp_path):
    return start(monkeypatch, tmp_path)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_right_plan_wins(direction, dtype, clock):
    first, *others = candidates(direction, dtype=dtype)
    clock.ms = {others[-1]: 2.0}
    assert_right(direction, go(direction, clock, dtype=dtype), dtype)
    assert clock.timed == [first, *others] * 2  # in turn
    assert clock.runs[-1][0] == others[-1]
    clock.runs.clear()
    assert_right(direction, go(direction, clock, dtype=dtype), dtype)
    assert [plan for plan, _ in clock.runs] == [others[-1]] and len(clock.timed) == 2 + 2 * len(others)


@BOTH
@pytest.mark.parametrize(("ms", "wins"), [(5.0, False), (4.95, False), (4.8, True)])
def test_a_gain_of_less_than_two_percent_leaves_the_tables_plan(direction, ms, wins, clock):
    clock.ms = {candidates(direction)[1]: ms}
    go(direction, clock)
    assert clock.runs[-1][0] == candidates(direction)[wins]


def test_the_lesser_of_two_times_counts(clock):
    """A plan that something disturbed once."""
    _, second, third, *_ = candidates("forward")
    times = {second: iter([50.0, 3.0]), third: iter([4.0, 4.0])}
    clock.ms = Disturbed(times)
    go("forward", clock)
    assert clock.runs[-1][0] == second


class Disturbed(dict):
    def get(self, plan, otherwise):
        return next(self[plan], otherwise) if plan in self else otherwise


def test_short_calls_are_timed_eight_at_once(clock, monkeypatch):
    """Whose time is hardly more than what a clock can tell."""
    monkeypatch.setattr(plans, "_FEW_ROWS", 1 << 15)
    clock.ms = {candidates("forward")[1]: 8.0}
    go("forward", clock)
    number = len(candidates("forward"))
    # each compared once, then two times of 3 repetitions of 8 launches, and the one that counts
    assert len(clock.runs) == number * (1 + 2 * 3 * 8) + 1 and len(clock.timed) == 2 * number
    (file,) = user_cache.folder().iterdir()
    found = json.loads(file.read_text())
    assert found["ms"] == found["table_ms"] == 5.0 / 8


def test_sums_are_zero_before_each_repetition_and_right_afterwards(clock):
    got = go("backward", clock)
    # of each plan a run to compare and twice three that are timed, and the one whose result counts
    assert [zero for _, zero in clock.runs] == [True] * (7 * len(candidates("backward")) + 1)
    assert_right("backward", got)


def _off(name, by):
    def spoil(arguments):
        arguments[name].view(-1)[7] += by * arguments[name].abs().max()

    return spoil


def _unwritten(name):
    def spoil(arguments):
        arguments[name].view(-1)[7] = math.nan

    return spoil


def _twice(arguments):
    arguments["grad_value_ptr"].mul_(2)


WRONG = {
    "one number of the result": ("forward", "out", _off("out_ptr", 0.01)),
    "a result that is not written": ("forward", "out", _unwritten("out_ptr")),
    "one number of value's gradient": ("backward", "grad_value", _off("grad_value_ptr", 1e-3)),
    "value's gradient twice": ("backward", "grad_value", _twice),
    "a location's gradient": ("backward", "grad_loc", _off("grad_loc_ptr", 1e-3)),
    "a weight's gradient that is not written": ("backward", "grad_attn", _unwritten("grad_attn_ptr")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_never_wins(case, clock):
    direction, name, spoil = WRONG[case]
    _, wrong, *others = candidates(direction)
    clock.spoil, clock.ms = (wrong, spoil), {wrong: 0.1, others[0]: 3.0}
    with pytest.warns(UserWarning, match=rf"set_autotune: Plan\(BLOCK_Q=.*\) gives another {name}: not taken"):
        got = go(direction, clock)
    assert wrong not in clock.timed and clock.runs[-1][0] == others[0]
    assert_right(direction, got)
    assert not user_cache.folder().exists()  # another process, with other numbers, decides anew


@BOTH
def test_a_plan_that_writes_nothing_never_wins(direction, clock):
    """Memory holds the last plan's results, or zeros to which nothing is added."""
    _, wrong, *_ = candidates(direction)
    clock.ms = {wrong: 0.1}
    clock.results = dict(zip(NAMES[direction], wanted(direction), strict=True))

    def run(kernel, call, arguments, plan):
        if plan == wrong:
            clock.runs.append((plan, None))
        else:
            clock.run(kernel, call, arguments, plan)

    call, grad_out = call_of()
    with pytest.warns(UserWarning, match="not taken"):
        if direction == "forward":
            launch.forward(call, run=run)
        else:
            launch.backward(grad_out, call, ALL, run=run)
    assert wrong not in clock.timed and clock.runs[-1][0] != wrong


TELLING = [
    ("grad_value_ptr", 0.0),
    ("grad_value_ptr", math.nan),
    ("grad_attn_ptr", math.nan),
    ("grad_loc_ptr", math.inf),
]


@pytest.mark.parametrize(("name", "number"), TELLING)
def test_numbers_that_tell_nothing_decide_nothing(name, number, clock):
    """As in a first call whose gradient is zero: a plan that adds nothing would agree. The next call decides."""
    first, second, *_ = candidates("backward")
    clock.ms = {second: 1.0}
    clock.results = dict(zip(NAMES["backward"], wanted("backward"), strict=True))
    clock.results[name] = torch.full((), number)
    call, grad_out = call_of()
    launch.backward(grad_out, call, ALL, run=clock.run)
    assert clock.timed == [] and [plan for plan, _ in clock.runs] == [first, first]
    assert not user_cache.folder().exists() and launch._launches == {}
    assert_right("backward", go("backward", clock))
    assert clock.runs[-1][0] == second


def test_a_gradient_that_is_zero_is_compared(clock):
    """As that of the weight of the only sample: what is not written is NaN."""
    _, second, *_ = candidates("backward")
    clock.ms, clock.results = {second: 1.0}, dict(zip(NAMES["backward"], wanted("backward"), strict=True))
    clock.results["grad_attn_ptr"] = torch.zeros(())
    call, grad_out = call_of()
    launch.backward(grad_out, call, ALL, run=clock.run)
    assert clock.runs[-1][0] == second


def test_a_candidate_that_fails_is_one_line(clock):
    """And not the user's step: LLVM's and the driver's errors are of no class of their own."""
    first, second, third, *_ = candidates("forward")
    clock.ms, clock.results = {third: 1.0}, dict(zip(NAMES["forward"], wanted("forward"), strict=True))

    def run(kernel, call, arguments, plan):
        if plan == failing:
            raise RuntimeError("PassManager::run failed")
        clock.run(kernel, call, arguments, plan)

    failing = second
    with pytest.warns(UserWarning, match=r"set_autotune: Plan\(.*\) does not run: PassManager::run failed"):
        launch.forward(call_of()[0], run=run)
    assert clock.runs[-1][0] == third
    failing = first
    tuning._fastest.clear()
    for file in user_cache.folder().iterdir():
        file.unlink()
    with pytest.raises(RuntimeError, match="PassManager::run failed"):
        launch.forward(call_of()[0], run=run)


def test_errors_do_not_add_up_from_plan_to_plan(clock):
    """All are compared with the table's, not with each other."""
    *_, last = candidates("forward")
    clock.results = {"out_ptr": torch.ones(())}
    clock.ms = {last: 0.1}

    def run(kernel, call, arguments, plan):
        clock.run(kernel, call, arguments, plan)
        arguments["out_ptr"].add_(1e-4 * candidates("forward").index(plan))

    with pytest.warns(UserWarning, match="not taken"):
        launch.forward(call_of()[0], run=run)
    assert clock.runs[-1][0] != last


def test_fused_calls_compare_the_gradient_of_reference_points(clock):
    value, _, weights, grad_out = tensors()
    offsets, points = torch.randn(*weights.shape, 2), torch.rand(1, 16, 1, 2)
    call = fused_call(value, LEVELS, points, offsets, weights)
    _, wrong, *_ = plans.timed_plans(plans.kind_of(call, "backward"), "cpu")
    clock.results = {name: torch.ones(()) for name in (*NAMES["backward"], "grad_ref_ptr")}
    clock.spoil, clock.ms = (wrong, _off("grad_ref_ptr", 1e-3)), {wrong: 0.1}
    with pytest.warns(UserWarning, match="gives another grad_ref: not taken"):
        launch.backward(grad_out, call, [True] * 4, run=clock.run)
    assert clock.runs[-1][0] != wrong


ERRORS = OutOfResources(2, 1, "shared memory"), PTXASError("ptxas"), CompilationError("kernel", None, "unsupported")


@BOTH
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_plan_that_cannot_run_never_wins(direction, error, clock):
    first, second, third, *_ = candidates(direction)
    clock.ms = {third: 4.0}
    clock.results = dict(zip(NAMES[direction], wanted(direction), strict=True))

    def run(kernel, call, arguments, plan):
        if plan in (first, second):
            raise error
        clock.run(kernel, call, arguments, plan)

    call, grad_out = call_of()
    if direction == "forward":
        launch.forward(call, run=run)
    else:
        launch.backward(grad_out, call, ALL, run=run)
    assert clock.runs[-1][0] == third and clock.timed[0] == third


def test_where_no_plan_can_run_the_error_is_the_callers(clock):
    def run(kernel, call, arguments, plan):
        raise tuning.CANNOT_RUN[0](2, 1, "shared memory")

    with pytest.raises(tuning.CANNOT_RUN[0], match="shared memory"):
        launch.forward(call_of()[0], run=run)
    assert not user_cache.folder().exists()


def test_out_of_memory_while_timing(clock, monkeypatch):
    def time(call):
        raise torch.OutOfMemoryError("no 256 MB to clear a cache with")

    monkeypatch.setattr(tuning, "timing", time)
    with pytest.warns(UserWarning, match="set_autotune: out of memory while plans were timed; the table's plan runs"):
        got = go("backward", clock)
    assert clock.runs[-1][0] == candidates("backward")[0] and not user_cache.folder().exists()
    assert_right("backward", got)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again
        assert_right("backward", go("backward", clock))


def test_through_autograd(clock, monkeypatch):
    """The public function, whose launches nobody sees."""
    sizes = {"M": 1, "P": 1, "Q": 5}
    value, locations, weights, grad_out = tensors(**sizes)
    monkeypatch.setattr(tuning, "timing", lambda call: [call() for _ in range(2)] and 1.0)
    monkeypatch.setattr(plans, "TIMED", {"forward": ("not rotated",), "backward": ("many",)})
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn(value, LEVELS, locations, weights, backend="triton")
    assert_right("forward", (out,), **sizes)
    assert_right("backward", torch.autograd.grad(out, inputs, grad_out), **sizes)
    assert len(tuning._fastest) == 2 == len(list(user_cache.folder().iterdir()))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, tmp_path, device):
    """Real times: in eager calls, around captures of CUDA graphs, and by way of a compiled graph."""
    monkeypatch.setattr(user_cache, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(launch, "_launches", {})
    timed = []

    def timing(call):
        timed.append(triton.testing.do_bench(call, warmup=1, rep=2, return_mode="median"))
        return timed[-1]

    def function(*inputs):
        return ms_deform_attn(inputs[0], LEVELS, *inputs[1:], backend="triton")

    *inputs, grad_out = (x.to(device).requires_grad_() for x in tensors())
    fixed = [x.detach() for x in inputs]
    exact = oracle_gradients(lambda v, x, a: oracle(v, LEVELS, x, a), inputs, grad_out.detach())

    def check(got):
        for x, y in zip(got, exact, strict=False):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * y.abs().max().item())

    function(*fixed)  # compiles the table's plan
    monkeypatch.setattr(tuning, "timing", timing)

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*fixed)
        graph.replay()
        check([out])

    captured()
    assert timed == [] and not user_cache.folder().exists()
    out = function(*inputs)
    check([out.detach(), *torch.autograd.grad(out, inputs, grad_out.detach())])
    number = len(timed)
    assert number >= 8 and all(ms > 0 for ms in timed) and len(list(user_cache.folder().iterdir())) == 2
    captured()
    assert len(timed) == number
    tuning._fastest.clear()
    launch._launches.clear()
    for file in user_cache.folder().iterdir():
        file.unlink()
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        check([compiled(*fixed)])
    assert len(timed) > number


# where nothing is timed


@BOTH
def test_nothing_is_timed_while_somebody_records(direction, clock, monkeypatch):
    first, second, *_ = candidates(direction)
    clock.ms = {second: 1.0}
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    go(direction, clock)
    assert clock.timed == [] and [plan for plan, _ in clock.runs] == [first]
    monkeypatch.setattr(tuning, "may_time", lambda device: True)
    go(direction, clock)
    assert clock.timed and clock.runs[-1][0] == second
    clock.runs.clear()
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    go(direction, clock)
    assert [plan for plan, _ in clock.runs] == [second]  # what is known runs there too


def test_what_ran_while_somebody_recorded_is_not_kept(clock, monkeypatch):
    clock.results = dict(zip(NAMES["forward"], wanted("forward"), strict=True))
    monkeypatch.setattr(launch, "_run_directly", lambda *a: clock.run(*a) or _Compiled())
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    launch.forward(call_of()[0])
    assert launch._launches == {} and clock.timed == []
    monkeypatch.setattr(tuning, "may_time", lambda device: True)
    launch.forward(call_of()[0])
    assert len(launch._launches) == 1 and clock.timed


class _Compiled:
    """A compiled kernel, whose launches do nothing."""

    def __getitem__(self, grid):
        return lambda *arguments: None


def test_a_compilation_is_seen(monkeypatch):
    assert tuning.may_time(torch.device("cpu"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not tuning.may_time(torch.device("cpu"))


@pytest.mark.parametrize("capturing", [True, False])
def test_a_capture_is_seen(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert tuning.may_time(torch.device("cuda", 0)) != capturing and tuning.may_time(torch.device("xpu", 0))


@BOTH
def test_deterministic_runs_take_the_tables_plan(direction, clock):
    clock.ms = {candidates(direction)[1]: 1.0}
    go(direction, clock)
    assert clock.runs[-1][0] == candidates(direction)[1]
    torch.use_deterministic_algorithms(True)
    try:
        clock.runs.clear()
        clock.run = lambda kernel, call, arguments, plan: clock.runs.append((plan, None))
        go(direction, clock)
    finally:
        torch.use_deterministic_algorithms(False)
    kind = plans.kind_of(call_of()[0], direction, deterministic=direction == "backward")
    assert clock.runs[-1][0] == plans.default_plan(kind, "cpu") and len(clock.timed) == 2 * len(candidates(direction))


def test_a_deterministic_backward_that_is_asked_for_by_itself(clock):
    call, grad_out = call_of()
    launch.backward(grad_out, call, ALL, deterministic=True, run=lambda *a: clock.runs.append((a[3], None)))
    assert clock.timed == [] and len(clock.runs) == 2  # the bound, and the sums


def test_on_and_off():
    try:
        set_autotune(True)
        assert tuning.timing is tuning.do_bench
        assert tuning.table_decides()  # where kernels are interpreted
    finally:
        set_autotune(False)
    assert tuning.timing is None and tuning.do_bench.keywords["return_mode"] == "median"


def test_timing_that_another_thread_switches_off(clock, monkeypatch):
    known = tuning.known
    monkeypatch.setattr(tuning, "do_bench", clock.time)
    monkeypatch.setattr(tuning, "known", lambda *a: setattr(tuning, "timing", None) or known(*a))
    assert_right("forward", go("forward", clock))
    assert clock.timed
