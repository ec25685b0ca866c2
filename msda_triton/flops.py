"""What `torch.utils.flop_counter` is told of the operators.

It is told when it is imported, as its import brings Triton, and importing this package must not.
"""

import importlib.util
import math
import sys
import threading

import torch

_COUNTER = "torch.utils.flop_counter"


def _forward_flops(value, spatial_shapes, level_start_index, locations, weights, *rest, **_) -> int:
    """A product and a sum for each channel of a sample's four pixels; [B, Q, M, K] samples."""
    return 8 * value[3] * math.prod(weights)


def _backward_flops(grad_out, needs, *operands, **_) -> int:
    """As many for the gradient of value, and as many for all others together."""
    of_value, *of_samples = needs
    return (of_value + any(of_samples)) * _forward_flops(*operands)


def tell_the_counter() -> None:
    """At once if it is there, and else as soon as it is."""
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """Finds the counter by the other finders, and tells it what it has to know once it is loaded."""

    def __init__(self):
        self.of_thread = threading.local()

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER or getattr(self.of_thread, "asks", False):
            return None
        self.of_thread.asks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.of_thread.asks = False
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            _tell(module)

        spec.loader.exec_module = exec_module
        return spec


def _tell(counter) -> None:
    operators = torch.ops.msda_triton
    for prefix in ("", "fallback_"):
        counter.register_flop_formula(getattr(operators, prefix + "forward"))(_forward_flops)
        counter.register_flop_formula(getattr(operators, prefix + "backward"))(_backward_flops)
