"""What this machine can do: its devices, a C++ compiler, and the backends of the attention."""

from typing import Any

import torch

from detr.config import Config, short
from detr.errors import ArgumentError
from msda_triton import ms_deform_attn


def device_of(device: Any = None) -> torch.device:
    """The device that a name ("cpu", "cuda:1") or a torch.device means; None: a CUDA GPU if there is one, else the CPU.

    Raises:
        ArgumentError: torch has no such device here.
    """
    here = ["cpu"]
    for kind in ("cuda", "xpu", "mps"):
        count = torch.get_device_module(kind).device_count()
        here += [kind, *(f"{kind}:{i}" for i in range(count))] if count else []
    name = ("cuda" if "cuda" in here else "cpu") if device is None else str(device)
    if name not in here:
        raise ArgumentError(f"device: expected one of {', '.join(here)}, got {short(name)}")
    return torch.device(name)


def find_compiler(what: str) -> None:
    """Make sure that there is what TorchInductor compiles with for a CPU.

    Args:
        what: an option that needs it, for the message.

    Raises:
        ArgumentError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ArgumentError(f"{what} needs a C++ compiler (g++, or what CXX names), and found none") from None


def check_backend(config: Config, device: torch.device) -> None:
    """Make sure that the attention's backend and torch.compile can work on a device.

    Raises:
        ArgumentError: the backend is not for this device, or there is no C++ compiler.
    """
    if config.backend == "inductor" and device.type != "cpu":
        raise ArgumentError(f"backend: inductor is for CPUs, and this run is on {device}")
    if device.type == "cpu" and (config.compile or config.backend == "inductor"):
        find_compiler("compile" if config.compile else "backend: 'inductor'")
    if config.backend == "triton":
        value, nothing = (torch.zeros(shape, device=device) for shape in ((1, 1, 1, 1), (1, 0, 1, 1, 1, 2)))
        try:  # a call without queries; its errors are of another package
            ms_deform_attn(value, [(1, 1)], nothing, nothing[..., 0], backend="triton")
        except ValueError as error:
            raise ArgumentError(str(error)) from None
