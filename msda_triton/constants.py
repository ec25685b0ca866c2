"""Small integer tensors that are made once for each device, and whether this is a moment to keep one."""

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Of devices but the CPU, never evicted: a captured CUDA graph reads these tensors again and does not keep them alive.
_kept: dict[tuple, Tensor] = {}


_FLAG_IS_HIDDEN = torch.__version__.startswith("2.7.")


def exporting() -> bool:
    """Whether torch.export looks.

    `torch.compiler.is_exporting()` says so of torch.compile too, up to torch 2.11 at least; the flag behind it not.
    But torch 2.7 does not set it for strict exports, which are its default.
    """
    return torch.compiler.is_exporting() if _FLAG_IS_HIDDEN else torch.compiler._is_exporting_flag


def traced(*tensors: Tensor) -> bool:
    """Whether operations are recorded, faked or transformed instead of just run.

    True under torch.compile, torch.export and torch.jit.trace, under a dispatch mode (FakeTensorMode, make_fx), under a
    transform of torch.func, and for tensors of a class with a dispatch of its own. Then no tensor's content may be
    looked at, and what is made may be no real tensor.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # the latter is torch.jit.trace
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return True
    for x in tensors:  # noqa: SIM110 - a call's validation counts in microseconds
        if type(x) is not Tensor and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


def untouched(make: Callable) -> Callable:
    """Decorator: what it makes is kept, and so is made outside of inference mode and of torch function modes.

    A tensor made in inference mode could not be saved for backward by a later call. Factories must name their device.
    """

    @functools.wraps(make)
    def wrapped(*arguments):
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            return make(*arguments)

    return wrapped


_new = untouched(lambda values, dtype, device: torch.tensor(values, dtype=dtype, device=device))
# a CPU's are made in microseconds, and each image size has one
_new_on_cpu = functools.lru_cache(maxsize=1024)(_new)


def constant(values: tuple, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of Python integers on like's device, copied there once, so that later calls neither copy nor wait.

    While a CUDA graph is captured nothing can be copied: what is not there yet becomes a part of the graph, one small
    kernel for each number. A call before the capture avoids these.

    Args:
        values: integers or tuples of them, of type int: 2.0 and True would find the tensor of 2 and of 1.
    """
    if torch.compiler.is_compiling() and not exporting():
        # no constant of the host's: each call would copy it, and CUDA graphs would be given up
        numbers = [torch.full((1,), n, dtype=dtype, device=like.device) for n in _numbers(values)]
        return torch.cat(numbers).view(_shape(values))
    if traced(like):
        # a fake tensor's constants are fake, also where its mode is not on
        with getattr(like, "fake_mode", None) or contextlib.nullcontext():
            return torch.tensor(values, dtype=dtype, device=like.device)
    return real_constant(values, like, dtype)


def real_constant(values: tuple, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """`constant` where nothing can be traced: behind the operators."""
    key = values, dtype, like.device
    if like.is_cpu:
        return _new_on_cpu(*key)
    if key in _kept:
        return _kept[key]
    if capturing(like.device):
        return written_by_kernels(*key)
    _kept[key] = (_copied_aside if like.device.type in ("cuda", "xpu") else _new)(*key)
    return _kept[key]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def written_by_kernels(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of some integers, whose numbers travel as arguments of kernels. It belongs to the graph in capture."""
    x = torch.empty(_shape(values), dtype=dtype, device=device)
    for place, number in zip(x.view(-1).unbind(), _numbers(values), strict=True):
        place.fill_(number)
    return x


def _shape(values) -> tuple[int, ...]:
    return (len(values), *_shape(values[0])) if isinstance(values, tuple) and values else ()


def _numbers(values) -> list[int]:
    return [n for value in values for n in _numbers(value)] if isinstance(values, tuple) else [values]


def _copied_aside(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in memory of its own: made by another thread, on another stream.

    What the calling thread allocates may belong to the memory pool of a CUDA graph: `mode="reduce-overhead"` of
    torch.compile runs the first call in it, and refuses tensors that outlive the call.
    """

    def make() -> Tensor:
        backend = getattr(torch, device.type)
        backend.set_device(device)  # a new thread is on the first one, and would make a context there
        stream = backend.Stream(device)
        with backend.stream(stream):
            x = torch.tensor(values, dtype=dtype, device=device)
        stream.synchronize()
        return x

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
