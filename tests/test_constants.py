"""What is kept between calls: real tensors whatever mode was on, found by numbers and their types, never lost."""

import contextlib
import itertools
import threading

import pytest
import torch
from attention import make_inputs, oracle
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from msda_triton import MSDeformAttn, constants, ms_deform_attn, ms_deform_attn_fused
from msda_triton.constants import _kept, _new_on_cpu, constant

# of no other test, so that nothing of them is kept before
FRESH = itertools.count(11)


class Logged(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def in_fake_mode(call, tensors):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        call(*map(mode.from_tensor, tensors))


def outside_of_their_mode(call, tensors):
    mode = FakeTensorMode()
    call(*map(mode.from_tensor, tensors))


def inside(context):
    def run(call, tensors):
        with context():
            call(*tensors)

    return run


class EverythingOnMeta(TorchFunctionMode):
    """What helpers do that initialise on the meta device: the device is overridden even where it is given."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def with_factories_overridden(call, tensors):
    with EverythingOnMeta(), contextlib.suppress(RuntimeError):  # what is made within a call is on another device
        call(*tensors)


def meta_tensors(call, tensors):
    call(*(x.to("meta") for x in tensors))


MODES = {
    "FakeTensorMode": in_fake_mode,
    "fake tensors outside of their mode": outside_of_their_mode,
    "torch.device": inside(lambda: torch.device("meta")),
    "set_default_device": inside(lambda: default_device("meta")),
    "inference_mode": inside(torch.inference_mode),
    "a dispatch mode": inside(Logged),
    "functionalize": lambda call, tensors: torch.func.functionalize(call)(*tensors),
    "make_fx": lambda call, tensors: make_fx(call)(*tensors),
    "make_fx, symbolic": lambda call, tensors: make_fx(call, tracing_mode="symbolic")(*tensors),
    "vmap": lambda call, tensors: torch.func.vmap(lambda x: (call(*tensors), x)[1])(torch.zeros(2)),
    "a function mode": with_factories_overridden,
    "meta tensors": meta_tensors,
}


def calls(shapes, backend):
    """Every way to constants: plain, fused with points and boxes, listed points, discrete."""
    value, locations, weights = (x.detach() for x in make_inputs(shapes, B=1, Q=3, M=1, D=4, P=2))
    points, boxes = torch.rand(1, 3, 2, 2), torch.rand(1, 3, 1, 4)
    flat = locations.flatten(3, 4), weights.flatten(3, 4)
    options = {"backend": backend}
    listed = options | {"num_points": [1, 3]}
    return [
        (lambda v, x, a: ms_deform_attn(v, shapes, x, a, **options), (value, locations, weights)),
        (lambda v, x, a: ms_deform_attn(v, shapes, x, a, **listed), (value, *flat)),
        (lambda v, x, a: ms_deform_attn(v, shapes, x, a, method="discrete", **options), (value, locations, weights)),
        (lambda v, r, x, a: ms_deform_attn_fused(v, shapes, r, x, a, **options), (value, points, locations, weights)),
        (lambda v, r, x, a: ms_deform_attn_fused(v, shapes, r, x, a, **listed), (value, boxes, *flat)),
    ]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_leaves_nothing_behind(mode, backend):
    """First under the mode and then without it, and the other way round."""
    if (mode, backend) == ("meta tensors", "triton"):
        backend = "auto"  # kernels are for devices that run something
    shapes = [(next(FRESH), 2), (2, 1)]

    def made(shapes):
        found = calls(shapes, backend)
        if "outside" in mode:
            del found[2]  # "discrete" is plain PyTorch, whose arange is real there
        return found

    for call, tensors in made(shapes):
        MODES[mode](call, tensors)
    (plain, tensors), *others = calls(shapes, "torch" if backend == "auto" else backend)
    out = plain(*tensors)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out.double(), oracle(tensors[0], shapes, *tensors[1:]), rtol=1e-5, atol=1e-5)
    for call, inputs in others:
        assert call(*inputs).isfinite().all()
    for call, inputs in made([(next(FRESH), 2), (2, 1)]):
        if backend != "auto":
            call(*inputs)
        MODES[mode](call, inputs)


def test_what_is_kept_is_real():
    like = torch.empty(0)
    with torch.inference_mode(), default_device("meta"), EverythingOnMeta():
        x = constant(((next(FRESH), 7),), like)
    assert type(x) is torch.Tensor and not torch._is_functional_tensor(x) and not x.is_inference()
    assert (x.device.type, x.dtype) == ("cpu", torch.int64)


def test_nothing_is_evicted():
    """A CUDA graph that was captured after the first call reads its tensors as long as it likes."""
    like = torch.empty(0, device="meta")  # a device that is no CPU
    first = constant(((3, 7),), like)
    for n in range(2000):
        constant(((n, 1009),), like)
    assert constant(((3, 7),), like) is first


def test_constants_of_another_dtype_are_others():
    like = torch.empty(0, device="meta")
    numbers = (next(FRESH), 1021)
    found = {dtype: constant(numbers, like, dtype) for dtype in (torch.int32, torch.int64)}
    assert all(constant(numbers, like, dtype) is x and x.dtype == dtype for dtype, x in found.items())


def test_a_capture_is_looked_for_on_the_tensors_device(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [torch.device("cuda", 1)])
    assert constants.capturing(torch.device("cuda", 1)) is True
    assert constants.capturing(torch.device("cuda", 0)) is False
    assert constants.capturing(torch.device("xpu", 1)) is False


def test_a_cpus_constants_are_a_thousand_at_most():
    like, before = torch.empty(0), len(_kept)
    for n in range(2000):
        assert constant(((n, 1013),), like).tolist() == [[n, 1013]]
    assert len(_kept) == before and _new_on_cpu.cache_info().currsize <= 1024


def test_a_second_call_makes_no_constant(monkeypatch):
    """Nothing is copied to the device again, which a CUDA graph's capture would not allow."""
    made = calls([(next(FRESH), 2), (2, 1)], "torch")
    for call, inputs in made:
        call(*inputs)

    def refuse(*args, **kwargs):
        raise AssertionError("a constant was made again")

    monkeypatch.setattr(torch, "tensor", refuse)
    for call, inputs in made:
        call(*inputs)


def test_what_a_capture_meets_first_is_written_by_its_kernels(monkeypatch):
    """No copy from the host, and nothing is kept: the memory is the graph's, and has no numbers until it runs."""
    like, before = torch.empty(0, device="meta"), len(_kept)
    sizes = ((next(FRESH), 1013), (2, 1))
    monkeypatch.setattr(constants, "capturing", lambda device: True)
    assert constant(sizes, like).shape == (2, 2) and len(_kept) == before
    for values in (sizes, (5, 3, 2**40), ((7, 1),)):
        got = constants.written_by_kernels(values, torch.int64, torch.device("cpu"))
        assert torch.equal(got, torch.tensor(values))
    monkeypatch.setattr(constants, "capturing", lambda device: False)
    kept = constant(sizes, like)
    monkeypatch.setattr(constants, "capturing", lambda device: True)
    assert constant(sizes, like) is kept


class FakeCuda:
    """A device with streams, whose memory is the CPU's."""

    type = "cuda"
    used, synchronized, current = [], [], threading.local()

    @staticmethod
    def set_device(device):
        FakeCuda.current.device = device

    class Stream:
        def __init__(self, device):
            assert FakeCuda.current.device is device  # a stream of another device's context is made there
            FakeCuda.used.append(self)

        def synchronize(self):
            FakeCuda.synchronized.append(self)

    @staticmethod
    @contextlib.contextmanager
    def stream(stream):
        FakeCuda.current.stream = stream
        yield
        FakeCuda.current.stream = None


class OnFakeCuda:
    device, is_cpu = FakeCuda, False


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(constants, "capturing", lambda device: False)
    monkeypatch.setattr(constants, "traced", lambda x: False)
    real = torch.tensor
    made = []

    def tensor(values, dtype, device):
        if values == "no memory":
            raise RuntimeError("no memory")
        made.append((threading.get_ident(), FakeCuda.current.stream, torch.is_inference_mode_enabled()))
        return real(values, dtype=dtype)

    monkeypatch.setattr(torch, "tensor", tensor)
    return made


def test_a_constant_of_a_gpu_is_made_by_another_thread_on_another_stream(fake_cuda):
    """So it is in no memory pool of a CUDA graph, which the first call may run in: mode="reduce-overhead" looks."""
    sizes = ((next(FRESH), 1019),)
    with torch.inference_mode():
        x = constant(sizes, OnFakeCuda)
    ((thread, stream, inference),) = fake_cuda
    assert thread != threading.get_ident() and not inference and not x.is_inference()
    assert stream in FakeCuda.used and stream in FakeCuda.synchronized
    assert constant(sizes, OnFakeCuda) is x and len(fake_cuda) == 1
    del _kept[sizes, torch.int64, FakeCuda]


def test_what_goes_wrong_in_that_thread_is_raised_in_this_one(fake_cuda):
    with pytest.raises(RuntimeError, match="no memory"):
        constant("no memory", OnFakeCuda)
    assert ("no memory", torch.int64, FakeCuda) not in _kept


WRONG = {
    "sizes that are floats": {"spatial_shapes": [(3.0, 2.0), (2.0, 1.0)]},
    "sizes that are bools": {"spatial_shapes": [(3, 2), (2, True)]},
    "sizes by key": {"spatial_shapes": {(3, 2): 0, (2, 1): 0}},
    "points that are floats": {"num_points": [2.0, 1.0]},
    "points that are bools": {"num_points": [2, True]},
    "starts that are floats": {"level_start_index": [0.0, 6.0]},
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("wrong", WRONG)
def test_equal_numbers_of_another_type(wrong, order):
    """2.0 == 2 and True == 1: not accepted because the right call came first, and no harm to one that comes later."""
    right = {"spatial_shapes": [(3, 2), (2, 1)], "num_points": [2, 1], "level_start_index": [0, 6]}
    if "num_points" not in WRONG[wrong] and "level_start_index" not in WRONG[wrong]:
        del right["level_start_index"]
    value, locations, weights = torch.rand(1, 8, 1, 4), torch.rand(1, 2, 1, 3, 2), torch.rand(1, 2, 1, 3)

    def call(**changes):
        options = right | changes
        return ms_deform_attn(value, options.pop("spatial_shapes"), locations, weights, **options)

    if order == "after":
        call()
    with pytest.raises(TypeError, match=next(iter(WRONG[wrong]))):
        call(**WRONG[wrong])
    assert call().shape == (1, 2, 4)


def test_the_module_is_made_and_reset_under_any_default_device():
    with default_device("meta"):
        assert MSDeformAttn(16, 2, 2, 2).sampling_offsets.bias.device.type == "meta"
    module = MSDeformAttn(16, 2, 2, 2)
    before = module.sampling_offsets.bias.clone()
    torch.nn.init.ones_(module.sampling_offsets.bias)
    with default_device("meta"):
        module._reset_parameters()
    assert torch.equal(module.sampling_offsets.bias, before)
