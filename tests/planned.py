"""The kernels by themselves, with a configuration, a stand-in for the launch and a batch size of one's own."""

import torch
from torch import Tensor

from msda_triton.call import Call
from msda_triton.kernels import launch
from msda_triton.kernels.plan import Config, kind_of, plan_of


def attend(call: Call, config: Config | dict[str, Config] | None = None, **options) -> Tensor:
    """A call's result, differentiable.

    Args:
        config: of both directions, or of each by its name; None for the table's. options: `run` and `images` of the
            launchers.
    """
    return _Attend.apply(config, options, *call)


def _plan(call: Call, direction: str, config):
    config = config[direction] if isinstance(config, dict) else config
    return None if config is None else plan_of(config, kind_of(call, direction))


NAMES = "value", "locations", "weights", "reference_points"


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, config, options, *operands):
        ctx.call, ctx.config, ctx.options = Call(*operands), config, options
        return launch.forward(ctx.call, _plan(ctx.call, "forward", config), **options)

    @staticmethod
    def backward(ctx, grad_out):
        needs = [ctx.needs_input_grad[2 + Call._fields.index(name)] for name in NAMES]
        needs[3] = ctx.call.reference_points is not None
        plan = _plan(ctx.call, "backward", ctx.config)
        value, locations, weights, points = launch.backward(grad_out, ctx.call, needs, plan, **ctx.options)
        return None, None, *Call(value, None, None, locations, weights, None, None, None, points)
