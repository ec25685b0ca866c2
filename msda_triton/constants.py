"""Small integer tensors that are made once for each device, and whether this is a moment to keep one."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Never evicted: a captured CUDA graph reads these tensors again and does not keep them alive.
_kept: dict[tuple, Tensor] = {}


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
_new_on_cpu = functools.lru_cache(maxsize=1024)(
    _new
)  # what is kept elsewhere is one for every size of a device's images


def constant(values: tuple, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of Python integers on like's device, copied there once, so that later calls neither copy nor wait.

    Args:
        values: integers or tuples of them, of type int: 2.0 and True would find the tensor of 2 and of 1.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=like.device)  # the graph's own
    if traced(like):
        # a fake tensor's constants are fake, also where its mode is not on
        with getattr(like, "fake_mode", None) or contextlib.nullcontext():
            return torch.tensor(values, dtype=dtype, device=like.device)
    key = values, dtype, like.device
    if like.device.type == "cpu":
        return _new_on_cpu(*key)
    if key not in _kept:
        _kept[key] = _new(*key)
    return _kept[key]
