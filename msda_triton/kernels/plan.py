"""How a kernel divides its work: the table of configurations, and what one becomes for a kind of call."""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from msda_triton.call import Call

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, when kernels are decorated
MAX_ROWS = 128  # of a program
_FEW_ROWS = 1 << 15  # of [B, Q, M]: with fewer, programs of 32 rows leave a large GPU half empty


@dataclass(frozen=True)
class Config:
    """How to divide the work of any call, in powers of two and zeros: a `Plan` fits them to the call."""

    tile: int  # float32 numbers of a program's [rows, BLOCK_D] tile
    lane: int  # channels of a row that one lane has, at most 4 vectors of 16 bytes
    unroll: int  # points of a level worked on at once
    width: int  # columns of a program's rectangle where queries are pixels; 0 takes runs of queries there too
    warps: int
    split: int = 1  # forward only: rows that share a query, each with its part of a level's points
    registers: int | None = None  # per thread, at most, on NVIDIA; None leaves it to the compiler
    vec: int = 8  # neighbouring channels that a lane has, at most
    rotate: bool = False  # rows take their chunks in as many orders as a row has places in a cache line
    turn: bool = False  # forward only: rows take a level's points in as many orders as there are rounds of the loop


@dataclass(frozen=True)
class Plan:
    """What runs: a configuration for a kind of call. Fields in capitals are the kernels' constants of that name."""

    BLOCK_Q: int  # queries of a program
    BLOCK_W: int = 0  # columns of a program's rectangle of queries; 0: a run of queries
    VEC: int = 1  # neighbouring channels that a lane has: 16 bytes of value, or 1 where they do not fit
    CHUNKS: int = 1  # equal pieces of a row, of each of which a lane has VEC channels
    UNROLL: int = 1  # rounds of the loop over points that are worked on at once
    SHARE: int = 1  # rows that share a query
    PAIRS: int = 0  # 1: x and y of a location are one load; 2: so are the weights of two points, a round of the loop
    ROTATE: int = 1  # different orders in which rows take their chunks
    TURN: int = 1  # different orders in which rows take a level's points
    warps: int = 4
    registers: int | None = None

    @functools.cached_property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.isupper()}

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """What a launch takes besides a kernel's arguments."""
        options = {"num_warps": self.warps, "num_stages": 1}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def grid(self, call: Call) -> tuple[int, int, int]:
        """Programs: one per tile of queries, head and image."""
        B, Q, M = call.weights.shape[:3]
        if self.BLOCK_W == 0:
            tiles = triton.cdiv(Q, self.BLOCK_Q)
        else:
            H, W = self.BLOCK_Q // self.BLOCK_W, self.BLOCK_W
            sizes = zip(call.level_sizes[::2], call.level_sizes[1::2], strict=True)
            tiles = sum(triton.cdiv(h, H) * triton.cdiv(w, W) for h, w in sizes)
        return tiles, M, B


class Kind(NamedTuple):
    """What a plan depends on of a call."""

    direction: str  # "forward" or "backward"
    D: int
    vector: int  # channels in 16 bytes of value; 1 where they do not fit, or are added one by one
    P: int  # points of every level; 0 if they differ
    fused: bool
    double: bool  # computed in float64
    few: bool  # rows of [B, Q, M]
    pixels: bool  # queries are the pixels of the levels, whose sizes the host knows
    pairs: int  # what PAIRS may be

    @property
    def name(self) -> str:
        """The kind's row of `TABLE`."""
        if self.few and self.direction == "forward":
            return "few"
        if self.fused or not self.P or self.double:
            return "large"
        return "half" if self.vector == 8 and self.direction == "forward" else "many"


def kind_of(call: Call, direction: str, deterministic: bool = False, double: bool | None = None) -> Kind:
    """The kind of a call.

    Args:
        direction: "forward" or "backward". deterministic: grad_value is summed as integers.
        double: computed in float64; None: if an operand is.
    """
    B, Q, M = call.weights.shape[:3]
    D, P, K = call.value.shape[3], call.num_points, sum(call.num_points)
    fused = call.reference_points is not None
    sizes = call.level_sizes
    # what the kernel reads of the levels is made of the same numbers, or no number of the host's counts
    pixels = call.spatial_shapes is None and min(sizes) >= 0
    pixels = pixels and sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)) == Q
    return Kind(
        direction=direction,
        D=D,
        vector=1 if deterministic else vector_of(call.value.dtype, D),
        P=P[0] if uniform(P) else 0,
        fused=fused,
        double=is_double(call) if double is None else double,
        few=B * Q * M < _FEW_ROWS,
        # a program counts from its first query in 32 bits
        pixels=pixels and max(sizes) * MAX_ROWS * M * max(D, 4 * K) < 2**31,
        pairs=0 if direction == "backward" or fused or not uniform(P) else _pairs(call.locations, call.weights),
    )


def uniform(num_points: Sequence[int]) -> bool:
    """Whether all levels have as many points."""
    return num_points.count(num_points[0]) == len(num_points)


def is_double(call: Call) -> bool:
    """Whether a call is computed in float64."""
    double, points = torch.float64, call.reference_points
    if call.value.dtype == double or call.locations.dtype == double or call.weights.dtype == double:
        return True
    return points is not None and points.dtype == double


def vector_of(dtype: torch.dtype, D: int) -> int:
    """Neighbouring channels in 16 bytes, if rows of D channels divide into such vectors; else 1."""
    if dtype == torch.float32:
        return 4 if D >= 4 and D & (D - 1) == 0 else 1
    return 8 if dtype != torch.float64 and D % 8 == 0 else 1


def _pairs(locations: Tensor, weights: Tensor) -> int:
    """The largest PAIRS that memory allows: a pair is one integer of at most 64 bits, at a multiple of its size."""
    # what is not contiguous the launcher copies, to memory that is aligned
    for x in (locations, weights):
        if x.is_contiguous() and x.data_ptr() % 8:
            return 0
    if locations.dtype == torch.float64:
        return 0
    return 1 if weights.dtype == torch.float64 else 2


@functools.lru_cache(maxsize=4096)
def plan_of(config: Config, kind: Kind) -> Plan:
    """What a configuration becomes for a kind of call."""
    block_d = triton.next_power_of_2(kind.D)
    lane, vector = min(config.lane, kind.D), min(config.vec, kind.vector)
    chunks = lane // vector if 1 < vector < lane and block_d == kind.D else 1
    # where channels are loaded one by one a program has fewer rows, but two numbers for each thread
    rows = (config.tile if vector > 1 else max(config.tile // 8, 64 * config.warps)) // block_d
    share = config.split if kind.direction == "forward" and kind.P and kind.P % config.split == 0 else 1
    block_q = min(max(rows, share), MAX_ROWS) // share
    # with 16 channels a lane the fused forward spills with two points at once
    unroll = 1 if kind.fused and kind.direction == "forward" and lane > 8 else config.unroll
    pairs = kind.pairs
    if pairs == 2:
        # a round of the loop takes two neighbouring points: a row needs all of a level's points, an even number
        if share == 1 and kind.P % 2 == 0 and unroll % 2 == 0:
            unroll //= 2
        else:
            pairs = 1
    # rounds of the loop over the points of a level
    rounds = kind.P // (2 if pairs == 2 else 1) if kind.direction == "forward" and share == 1 else 1
    return Plan(
        BLOCK_Q=block_q,
        BLOCK_W=min(config.width, block_q) if kind.pixels else 0,
        VEC=vector,
        CHUNKS=chunks,
        UNROLL=unroll,
        SHARE=share,
        PAIRS=pairs,
        # a row has kind.D / kind.vector * 16 bytes, and a place in a line 32; rows that share a query are added up
        ROTATE=min(chunks, max(kind.D // (2 * kind.vector), 1)) if config.rotate and share == 1 else 1,
        TURN=rounds & -rounds if config.turn and rounds else 1,
        warps=config.warps,
        registers=config.registers,
    )


# Lanes of 4 channels make a row of 32 float32 one cache line of one load or red, lanes of 8 half the arithmetic for its
# address. The compiler caps the registers of a thread so that more programs fit, and may then keep a few numbers in
# memory (it spills): another cap, or less work at once, avoids that. 255 is all that a thread can have. What each was
# worth on an H100 is in benchmarks/NOTES.md.
CONFIGS = {
    "forward": {
        "many": Config(tile=512, lane=4, unroll=1, width=0, warps=4, vec=4, turn=True, registers=64),
        "runs": Config(tile=1024, lane=8, unroll=4, width=0, warps=4, rotate=True, turn=True, registers=80),
        "one warp": Config(tile=256, lane=8, unroll=1, width=0, warps=1, rotate=True, turn=True),
        "rectangles": Config(tile=1024, lane=8, unroll=4, width=8, warps=4, rotate=True, turn=True, registers=80),
        "lanes of 16": Config(tile=1024, lane=16, unroll=4, width=8, warps=2, rotate=True),
        "lanes of 16, 128 registers": Config(
            tile=1024, lane=16, unroll=4, width=8, warps=2, rotate=True, registers=128
        ),
        "not rotated": Config(tile=1024, lane=16, unroll=4, width=8, warps=2),
        "few": Config(tile=256, lane=8, unroll=1, width=2, split=4, warps=1),
        "large": Config(tile=1024, lane=16, unroll=2, width=8, warps=2),
    },
    "backward": {
        "many": Config(tile=512, lane=4, unroll=1, width=4, warps=4, vec=4),
        "128 registers": Config(tile=512, lane=4, unroll=1, width=4, warps=4, vec=4, registers=128),
        "lanes of 8": Config(tile=256, lane=8, unroll=1, width=4, warps=1, vec=4),
        "lanes of 16": Config(tile=1024, lane=16, unroll=1, width=8, warps=2, vec=4),
        "all registers": Config(tile=1024, lane=16, unroll=1, width=8, warps=2, vec=4, registers=255),
        "eight channels": Config(tile=1024, lane=16, unroll=1, width=8, warps=2),
        "large": Config(tile=1024, lane=8, unroll=1, width=8, warps=4),
    },
}
# an interpreted program costs the same whatever its size
_INTERPRETED = {
    "forward": Config(tile=4096, lane=16, unroll=4, width=8, warps=1, rotate=True, turn=True),
    "backward": Config(tile=4096, lane=16, unroll=1, width=8, warps=1),
}

# Which configuration runs where nothing is timed: by direction and kind of the call, then by architecture ("sm_90"),
# vendor ("sm", "gfx") or, under "", for all others. "sm" is what was the fastest on an H100. Other cards were not
# measured: theirs were chosen by estimates. Nothing spills (`python -m benchmarks.compile_table`). sm_75 to sm_89 add
# floats one by one.
TABLE = {
    ("forward", "many"): {
        "": "lanes of 16",
        "sm": "many",
        "sm_75": "rectangles",
        "sm_80": "rectangles",
        "sm_86": "rectangles",
        "sm_89": "rectangles",
        "gfx": "not rotated",
        "gfx1100": "large",
    },
    ("forward", "half"): {"": "lanes of 16", "sm": "runs", "gfx": "not rotated", "gfx1100": "large"},
    ("forward", "few"): {"": "few"},
    ("forward", "large"): {"": "large", "sm": "one warp"},
    ("backward", "many"): {
        "": "lanes of 16",
        "sm": "many",
        "sm_75": "all registers",
        "sm_80": "lanes of 16",
        "sm_86": "lanes of 16",
        "sm_89": "lanes of 16",
        "gfx": "eight channels",
    },
    ("backward", "large"): {
        "": "large",
        "sm": "128 registers",
        "sm_75": "all registers",
        "sm_80": "all registers",
        "sm_86": "all registers",
        "sm_89": "all registers",
    },
}
# what `set_autotune(True)` times besides
TIMED = {
    "forward": (
        "many", "runs", "one warp", "rectangles", "lanes of 16", "lanes of 16, 128 registers", "few",
    ),
    "backward": ("many", "lanes of 8", "lanes of 16", "eight channels", "large"),
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def choose(kind: Kind, architecture: str) -> str:
    """The name of the configuration that TABLE has for a kind of call on an architecture."""
    return shipped(kind.direction, kind.name, architecture)


def shipped(direction: str, name: str, architecture: str) -> str:
    """`choose` by the direction and name of a kind."""
    row = TABLE[direction, name]
    vendor = re.match("[a-z]*", architecture)[0]
    return row.get(architecture) or row.get(vendor) or row[""]


@functools.lru_cache(maxsize=4096)
def named_plan(name: str, kind: Kind, architecture: str) -> Plan:
    """What a configuration of CONFIGS becomes for a kind of call on an architecture."""
    config = CONFIGS[kind.direction][name]
    if not architecture.startswith("sm_"):
        config = replace(config, registers=None)  # other compilers do not know the option
    return plan_of(config, kind)


def default_plan(kind: Kind, architecture: str) -> Plan:
    """What runs untimed: TABLE's plan, or where kernels are interpreted one of its own."""
    if INTERPRETED:
        return plan_of(_INTERPRETED[kind.direction], kind)
    return named_plan(choose(kind, architecture), kind, architecture)


def timed_plans(kind: Kind, architecture: str) -> list[Plan]:
    """The plans that `set_autotune(True)` chooses from, each once: TABLE's and those of TIMED."""
    names = [choose(kind, architecture), *TIMED[kind.direction]]
    return list(dict.fromkeys(named_plan(name, kind, architecture) for name in names))


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of a GPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
