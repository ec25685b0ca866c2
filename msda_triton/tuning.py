"""Kernel configurations, and how one is chosen: from a table, or by timing all of them."""

import functools
import os
import re

import torch
import triton
import triton.language as tl


def _config(numbers: str, warps: int, registers: int | None = None) -> triton.Config:
    """A configuration by its numbers.

    TILE: float32 elements of one program's [rows, BLOCK_D] tile. LANE_D: channels of a row that one lane has. UNROLL:
    points of a level worked on at once. TILE_W: width of a program's rectangle where queries are pixels; 0 takes runs
    of queries there too. SPLIT (forward only): rows that share a query, each with its part of a level's points.
    """
    kwargs = {name: int(number) for name, number in (pair.split("=") for pair in numbers.split())}
    return triton.Config(kwargs, num_warps=warps, num_stages=1, maxnreg=registers)


FORWARD_CONFIGS = [
    _config("TILE=1024 LANE_D=16 UNROLL=4 TILE_W=8 SPLIT=1", warps=2),
    _config("TILE=1024 LANE_D=16 UNROLL=4 TILE_W=0 SPLIT=1", warps=2),
    _config("TILE=2048 LANE_D=16 UNROLL=4 TILE_W=8 SPLIT=1", warps=4),
    _config("TILE=1024 LANE_D=8 UNROLL=2 TILE_W=8 SPLIT=1", warps=4),
    _config("TILE=256 LANE_D=8 UNROLL=4 TILE_W=4 SPLIT=1", warps=1),
    _config("TILE=512 LANE_D=16 UNROLL=1 TILE_W=2 SPLIT=4", warps=1),
    _config("TILE=256 LANE_D=8 UNROLL=1 TILE_W=2 SPLIT=4", warps=1),
]
_FEW_QUERIES = FORWARD_CONFIGS[5]
BACKWARD_CONFIGS = [
    _config("TILE=1024 LANE_D=16 UNROLL=1 TILE_W=8", warps=2),
    _config("TILE=1024 LANE_D=16 UNROLL=1 TILE_W=0", warps=2),
    _config("TILE=1024 LANE_D=8 UNROLL=2 TILE_W=8", warps=4, registers=255),
    _config("TILE=256 LANE_D=8 UNROLL=1 TILE_W=4", warps=1, registers=255),
]
CONFIGS = {"forward": FORWARD_CONFIGS, "backward": BACKWARD_CONFIGS}
# an interpreted program costs the same whatever its size
INTERPRETED_CONFIGS = {
    "forward": _config("TILE=4096 LANE_D=16 UNROLL=4 TILE_W=8 SPLIT=1", warps=1),
    "backward": _config("TILE=4096 LANE_D=16 UNROLL=1 TILE_W=8", warps=1),
}

# For the large kernels: fused, with points per level that differ, or in float64; 96 registers where value has more than
# 32 channels per head. ptxas spills a few of their registers to fit more programs, unless less is done at once or a
# thread may use all that it can have; on small or older architectures also those of others.
_FORWARD_LARGE = _config("TILE=1024 LANE_D=16 UNROLL=2 TILE_W=8 SPLIT=1", warps=2)
_FORWARD_ALL_REGISTERS = _config("TILE=1024 LANE_D=16 UNROLL=2 TILE_W=8 SPLIT=1", warps=2, registers=255)
_FORWARD_96 = _config("TILE=1024 LANE_D=16 UNROLL=4 TILE_W=8 SPLIT=1", warps=2, registers=96)
_BACKWARD_LARGE = _config("TILE=1024 LANE_D=8 UNROLL=1 TILE_W=8", warps=4)
_ALL_REGISTERS = _config("TILE=1024 LANE_D=16 UNROLL=1 TILE_W=8", warps=2, registers=255)

# Which configuration runs where nothing is timed: by direction and class of the call, then by architecture ("sm_90"),
# vendor ("sm", "gfx") or, under "", for all others. Not measured on a GPU yet: the fewest instructions per row without
# a spill (`python -m benchmarks.compile_table`), and four times the programs where there are few rows.
# `python -m benchmarks.tune` times them on a GPU and prints lines for this table.
TABLE = {
    ("forward", "many"): {
        "": FORWARD_CONFIGS[0],
        **dict.fromkeys(("sm_75", "sm_86"), _FORWARD_96),
        "gfx1100": _FORWARD_LARGE,
    },
    ("forward", "wide"): {"": FORWARD_CONFIGS[0], **dict.fromkeys(("sm_86", "sm_89", "sm_90"), _FORWARD_96)},
    ("forward", "few"): {"": _FEW_QUERIES},
    ("forward", "large"): {
        "": _FORWARD_LARGE,
        **dict.fromkeys(("sm_86", "sm_89", "sm_120"), _FORWARD_ALL_REGISTERS),
    },
    ("backward", "many"): {"": BACKWARD_CONFIGS[0], "sm_75": _ALL_REGISTERS},
    ("backward", "few"): {"": BACKWARD_CONFIGS[0], "sm_75": _ALL_REGISTERS},
    ("backward", "large"): {"": _BACKWARD_LARGE, "sm": _ALL_REGISTERS},
}
# rows (b, q, m): with fewer, programs of 32 rows leave a large GPU half empty
_FEW_ROWS = 1 << 15

timing = False  # op.set_autotune
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launch(direction: str, kernel, grid, rows: int, arguments: dict) -> None:
    """Run a kernel with the configuration of TABLE, or with the fastest of all if `timing` is on.

    Args:
        direction: "forward" or "backward". rows: of [B, Q, M].
    """
    # another configuration adds channels in another order: the last bit of a gradient would depend on the timing
    if timing and not _INTERPRETED and not torch.are_deterministic_algorithms_enabled():
        _timed(direction, kernel)[grid](**arguments)
    else:
        kernel[grid](**arguments, **configuration(direction, rows, arguments).all_kwargs())


def configuration(direction: str, rows: int, arguments: dict) -> triton.Config:
    """What runs untimed."""
    if _INTERPRETED:
        return INTERPRETED_CONFIGS[direction]
    return choose(direction, call_class(direction, rows, arguments), architecture(arguments["value_ptr"].device))


def call_class(direction: str, rows: int, arguments: dict) -> str:
    """The class of a call in TABLE, by its rows of [B, Q, M] and the arguments of its kernel."""
    few = rows < _FEW_ROWS
    if arguments["REF_DIM"] or arguments["P"] == 0 or arguments["ACC"] == tl.float64:
        return "few" if few and direction == "forward" else "large"
    if few:
        return "few"
    return "wide" if direction == "forward" and arguments["D"] > 32 else "many"


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of a GPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def choose(direction: str, call_class: str, architecture: str) -> triton.Config:
    """The configuration that TABLE has for a class of calls on an architecture."""
    row = TABLE[direction, call_class]
    vendor = re.match("[a-z]*", architecture)[0]
    return row.get(architecture) or row.get(vendor) or row[""]


def _clear_grad_value(kwargs, reset_only=False):
    # every timed repetition adds into the same buffer
    if kwargs.get("grad_value_ptr") is not None:
        kwargs["grad_value_ptr"].zero_()


@functools.cache
def _timed(direction: str, kernel):
    """The kernel under `triton.autotune`, keyed on what the best configuration depends on but not on the image size."""
    key = ["M", "D", "L", "K", "REF_DIM", "PIXELS", "q_bucket"]
    return triton.autotune(configs=CONFIGS[direction], key=key, pre_hook=_clear_grad_value)(kernel)
