"""Kernel configurations and how one is chosen."""

import os

import torch
import triton

# TILE: float32 elements of one program's [BLOCK_Q, BLOCK_D] tile; LANE_D: channels of a row that one lane has;
# UNROLL: points of a level worked on at once.
# The first entry is the default: what runs in deterministic mode and with tuning off.
FORWARD_CONFIGS = [
    triton.Config({"TILE": 1024, "LANE_D": 16, "UNROLL": 4}, num_warps=2, num_stages=1),
    triton.Config({"TILE": 2048, "LANE_D": 16, "UNROLL": 4}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 1024, "LANE_D": 8, "UNROLL": 4}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 1024, "LANE_D": 8, "UNROLL": 1}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 256, "LANE_D": 8, "UNROLL": 4}, num_warps=1, num_stages=1),
]
BACKWARD_CONFIGS = [
    triton.Config({"TILE": 1024, "LANE_D": 16, "UNROLL": 1}, num_warps=2, num_stages=1),
    triton.Config({"TILE": 1024, "LANE_D": 8, "UNROLL": 1}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 1024, "LANE_D": 8, "UNROLL": 2}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 256, "LANE_D": 8, "UNROLL": 1}, num_warps=1, num_stages=1),
]

# an interpreted program costs the same whatever its size
INTERPRETED_CONFIGS = [triton.Config({"TILE": 4096, "LANE_D": 16, "UNROLL": 1}, num_warps=1, num_stages=1)]

enabled = True  # op.set_autotune


def _candidates(configs, named_args, **kwargs):
    # another configuration adds channels in another order: the last bit of a gradient would depend on the timing
    return configs if enabled and not torch.are_deterministic_algorithms_enabled() else configs[:1]


def _clear_grad_value(kwargs, reset_only=False):
    # every timed repetition adds into the same buffer
    if kwargs.get("grad_value_ptr") is not None:
        kwargs["grad_value_ptr"].zero_()


def autotune(configs: list[triton.Config]):
    """Decorator: `triton.autotune` keyed on what the best configuration depends on, never on the image size itself."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        configs = INTERPRETED_CONFIGS
    return triton.autotune(
        configs=configs,
        key=["M", "D", "L", "K", "REF_DIM", "q_bucket"],
        prune_configs_by={"early_config_prune": _candidates},
        pre_hook=_clear_grad_value,
    )
