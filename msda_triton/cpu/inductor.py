"""`backend="inductor"`: the fallback with its element-wise parts compiled by TorchInductor, for CPUs.

Two graphs, one before the sums over the bags and one after the products, each compiled at its first call for all sizes.
The sums stay with PyTorch: embedding_bag beats the loops that Inductor writes for a gather (benchmarks/NOTES.md).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from msda_triton.call import Call
from msda_triton.cpu import bags, fallback


def inductor_forward(call: Call) -> Tensor:
    """`fallback_forward`, for tensors on a CPU.

    Raises:
        ValueError: value is not on a CPU. RuntimeError: there is no C++ compiler.
    """
    _check_device(call)
    return fallback.run_forward(_compiled(), call)


def inductor_backward(grad_out: Tensor, call: Call, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """`fallback_backward`, for tensors on a CPU; raises as `inductor_forward`."""
    _check_device(call)
    return fallback.run_backward(_compiled(), grad_out, call, needs)


def _check_device(call: Call) -> None:
    if call.value.device.type != "cpu":
        raise ValueError(f"value: backend='inductor' is for tensors on a CPU, got one on {call.value.device}")


@functools.cache
def _compiled() -> fallback.Stages:
    # imported here because Inductor takes seconds to import
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "backend='inductor' needs a C++ compiler (g++, or what CXX names) and found none; backend='torch' does not"
        ) from error
    return fallback.Stages(
        torch.compile(bags.corner_bags, dynamic=True), torch.compile(bags.sample_gradients, dynamic=True)
    )
