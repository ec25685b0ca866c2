"""How work is divided: what a configuration becomes for a call, which one runs, and how they are timed."""

from dataclasses import replace

import pytest
import torch

from msda_triton.call import Call
from msda_triton.kernels import launch
from msda_triton.kernels.plan import (
    CONFIGS,
    TABLE,
    Kind,
    Plan,
    choose,
    kind_of,
    named_plan,
    plan_of,
    timed_plans,
)

LEVELS = [100, 167, 50, 84, 25, 42, 13, 21]
PLAIN = CONFIGS["forward"]["not rotated"]
ENCODER = Kind("forward", D=32, vector=8, P=4, fused=False, double=False, few=False, pixels=True, pairs=2)


def call_of(dtype=torch.bfloat16, Q=22223, D=32, P=(4, 4, 4, 4), M=8, B=2, sizes=LEVELS, **options) -> Call:
    """Without storage."""
    with torch.device("meta"):
        return Call(
            value=torch.empty(B, 22223, M, D, dtype=dtype),
            spatial_shapes=None,
            level_start_index=None,
            locations=torch.empty(B, Q, M, sum(P), 2),
            weights=torch.empty(B, Q, M, sum(P), dtype=dtype),
            num_points=list(P),
            level_sizes=sizes,
        )._replace(**options)


def test_the_kind_of_an_encoders_call():
    assert kind_of(call_of(), "forward") == ENCODER
    assert ENCODER.name == "half"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"Q": 300}, {"few": True, "pixels": False}),
        ({"Q": 300, "sizes": [10, 20, 10, 10, 0, 5, 0, 0]}, {"few": True}),  # a query for each pixel, though few
        ({"sizes": (), "spatial_shapes": torch.empty(4, 2)}, {"pixels": False}),
        ({"sizes": [-100, -167, *LEVELS[2:]]}, {"pixels": False}),  # of an operator called directly
        ({"spatial_shapes": torch.empty(4, 2)}, {"pixels": False}),  # so are both; the device's are read
        ({"M": 8192, "B": 1}, {"pixels": False}),  # a rectangle would span more than 32 bits can count
        ({"dtype": torch.float32}, {"vector": 4}),
        ({"dtype": torch.float64}, {"vector": 1, "double": True, "pairs": 1}),
        ({"dtype": torch.float32, "D": 30}, {"D": 30, "vector": 1}),
        ({"dtype": torch.float16, "D": 24}, {"D": 24, "vector": 8}),
        ({"P": (3, 4, 4, 5)}, {"P": 0, "pairs": 0}),
        ({"reference_points": torch.empty(2, 22223, 4, 2)}, {"fused": True, "pairs": 0}),
    ],
)
def test_kinds(call, expected):
    assert kind_of(call_of(**call), "forward") == ENCODER._replace(**expected)


def test_kinds_of_a_backward():
    backward = ENCODER._replace(direction="backward", pairs=0)
    assert kind_of(call_of(), "backward") == backward
    assert kind_of(call_of(), "backward", deterministic=True) == backward._replace(vector=1)
    assert kind_of(call_of(), "backward", double=True) == backward._replace(double=True)


@pytest.mark.parametrize(("W", "pixels"), [(32767, True), (32768, False)])
def test_rectangles_count_in_32_bits(W, pixels):
    """128 rows of a map of 2^15 columns, of 8 heads with 16 points each, are 2^31 numbers apart."""
    assert kind_of(call_of(Q=W, sizes=[1, W, 0, 0, 0, 0, 0, 0]), "forward").pixels == pixels


def test_pairs_need_memory_at_multiples_of_their_size():
    locations = torch.empty(2 * 300 * 8 * 16 * 2 + 1)
    for first, pairs in ((0, 2), (1, 0)):
        moved = locations[first : first + 2 * 300 * 8 * 16 * 2].view(2, 300, 8, 16, 2)
        assert kind_of(call_of(Q=300, locations=moved), "forward").pairs == pairs


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ({}, {}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        ({}, {"pixels": False}, Plan(BLOCK_Q=32, BLOCK_W=0, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        ({}, {"vector": 4}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=4, CHUNKS=4, UNROLL=2, PAIRS=2, warps=2)),
        # 24 channels are a row of 32 lanes' numbers, which is not cut
        ({}, {"D": 24}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=1, UNROLL=2, PAIRS=2, warps=2)),
        # one by one: an eighth of the rows
        ({}, {"D": 30, "vector": 1}, Plan(BLOCK_Q=4, BLOCK_W=4, UNROLL=2, PAIRS=2, warps=2)),
        ({}, {"D": 2048}, Plan(BLOCK_Q=1, BLOCK_W=1, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        ({}, {"D": 2, "vector": 1}, Plan(BLOCK_Q=64, BLOCK_W=8, UNROLL=2, PAIRS=2, warps=2)),
        ({"tile": 1 << 16}, {}, Plan(BLOCK_Q=128, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        ({"split": 4}, {}, Plan(BLOCK_Q=8, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=4, SHARE=4, PAIRS=1, warps=2)),
        ({"split": 4}, {"P": 6}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        ({"split": 4}, {"P": 0, "pairs": 0}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=4, warps=2)),
        (
            {"tile": 64, "split": 4},
            {},
            Plan(BLOCK_Q=1, BLOCK_W=1, VEC=8, CHUNKS=2, UNROLL=4, SHARE=4, PAIRS=1, warps=2),
        ),
        ({}, {"P": 3}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=4, PAIRS=1, warps=2)),
        ({"unroll": 1}, {}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, UNROLL=1, PAIRS=1, warps=2)),
        # the fused forward has one point at once where a lane has 16 channels, the backward no rows that share a query
        ({}, {"fused": True, "pairs": 0}, Plan(32, 8, VEC=8, CHUNKS=2, warps=2)),
        ({"lane": 8}, {"fused": True, "pairs": 0}, Plan(32, 8, VEC=8, UNROLL=4, warps=2)),
        ({"split": 4}, {"direction": "backward", "pairs": 0}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=4, warps=2)),
        # as many orders of chunks as a row has places in a cache line: 64 bytes of bfloat16, 128 of float32
        ({"rotate": True}, {}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, ROTATE=2, warps=2)),
        ({"rotate": True}, {"vector": 4}, Plan(32, 8, VEC=4, CHUNKS=4, UNROLL=2, PAIRS=2, ROTATE=4, warps=2)),
        ({"rotate": True, "vec": 4}, {}, Plan(32, 8, VEC=4, CHUNKS=4, UNROLL=2, PAIRS=2, ROTATE=2, warps=2)),
        ({"rotate": True}, {"vector": 1, "D": 8}, Plan(16, 8, UNROLL=2, PAIRS=2, warps=2)),
        ({"rotate": True}, {"D": 8}, Plan(128, 8, VEC=8, UNROLL=2, PAIRS=2, warps=2)),
        ({"rotate": True}, {"D": 16}, Plan(64, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, warps=2)),
        # rows that are added up need their channels at the same places
        ({"rotate": True, "split": 4}, {}, Plan(8, 8, VEC=8, CHUNKS=2, UNROLL=4, SHARE=4, PAIRS=1, warps=2)),
        ({"vec": 4}, {"vector": 1, "D": 30}, Plan(BLOCK_Q=4, BLOCK_W=4, UNROLL=2, PAIRS=2, warps=2)),
        ({"vec": 4, "lane": 4}, {}, Plan(BLOCK_Q=32, BLOCK_W=8, VEC=4, UNROLL=2, PAIRS=2, warps=2)),
        # two numbers a thread
        ({"tile": 256, "warps": 8}, {"D": 30, "vector": 1}, Plan(16, 8, UNROLL=2, PAIRS=2, warps=8)),
        # as many orders of points as the loop has rounds, and a power of two
        ({"turn": True}, {}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, TURN=2, warps=2)),
        ({"turn": True}, {"pairs": 1}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=4, PAIRS=1, TURN=4, warps=2)),
        ({"turn": True}, {"P": 6}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, TURN=1, warps=2)),
        ({"turn": True}, {"P": 12}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2, TURN=2, warps=2)),
        ({"turn": True}, {"P": 0, "pairs": 0}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=4, warps=2)),
        ({"turn": True, "split": 2}, {}, Plan(16, 8, VEC=8, CHUNKS=2, UNROLL=4, SHARE=2, PAIRS=1, warps=2)),
        ({"turn": True}, {"direction": "backward", "pairs": 0}, Plan(32, 8, VEC=8, CHUNKS=2, UNROLL=4, warps=2)),
        ({"tile": 2048, "warps": 4}, {}, Plan(64, 8, VEC=8, CHUNKS=2, UNROLL=2, PAIRS=2)),
        ({"lane": 8, "registers": 96}, {}, Plan(32, 8, VEC=8, UNROLL=2, PAIRS=2, warps=2, registers=96)),
    ],
)
def test_what_a_configuration_becomes(config, kind, expected):
    assert plan_of(replace(PLAIN, **config), ENCODER._replace(**kind)) == expected


def test_a_grid_covers_every_query_once():
    call = call_of()
    assert Plan(BLOCK_Q=32).grid(call) == (695, 8, 2)
    # 4 x 8: 25 * 21 + 13 * 11 + 7 * 6 + 4 * 3 rectangles
    assert Plan(BLOCK_Q=32, BLOCK_W=8).grid(call) == (722, 8, 2)


def test_options_of_a_launch():
    assert Plan(BLOCK_Q=1, warps=2).options == {"num_warps": 2, "num_stages": 1}  # AMD knows no maxnreg
    assert Plan(BLOCK_Q=1, registers=96).options == {"num_warps": 4, "num_stages": 1, "maxnreg": 96}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({}, "half"),
        ({"vector": 4}, "many"),
        ({"vector": 1, "D": 30}, "many"),
        ({"few": True}, "few"),
        ({"few": True, "fused": True}, "few"),
        ({"fused": True}, "large"),
        ({"P": 0}, "large"),
        ({"double": True}, "large"),
        ({"direction": "backward"}, "many"),
        ({"direction": "backward", "few": True, "D": 64}, "many"),
        ({"direction": "backward", "few": True, "fused": True}, "large"),
    ],
)
def test_rows_of_the_table(kind, name):
    kind = ENCODER._replace(**kind)
    assert kind.name == name
    assert choose(kind, "sm_103") in TABLE[kind.direction, name].values()


def test_an_architecture_its_vendor_or_any():
    large = ENCODER._replace(direction="backward", fused=True)
    assert choose(large, "sm_103") == TABLE["backward", "large"]["sm"] == "128 registers"
    assert choose(large, "sm_86") == TABLE["backward", "large"]["sm_86"] == "all registers"
    assert choose(large, "gfx942") == choose(large, "xpu") == TABLE["backward", "large"][""] == "large"
    assert choose(ENCODER, "gfx1100") == TABLE["forward", "half"]["gfx1100"] == "large"


@pytest.mark.parametrize("name", CONFIGS["forward"])
def test_configurations_are_powers_of_two(name):
    for config in (CONFIGS["forward"][name], *CONFIGS["backward"].values()):
        numbers = config.tile, config.lane, config.unroll, config.width, config.warps, config.split
        assert all(n & (n - 1) == 0 for n in numbers)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", [{}, {"few": True}, {"fused": True}, {"P": 0}, {"D": 64}])
@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_90", "gfx942", "gfx1100", "xpu"])
def test_what_is_timed_holds_the_tables_plan(architecture, kind, direction):
    """And limits registers on NVIDIA only: other compilers refuse a launch with the option."""
    kind = ENCODER._replace(direction=direction, pairs=0, **kind)
    plans = timed_plans(kind, architecture)
    assert named_plan(choose(kind, architecture), kind, architecture) == plans[0]
    assert len(plans) == len(set(plans)) >= 4
    if not architecture.startswith("sm_"):
        assert not any("maxnreg" in plan.options for plan in plans)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_bfloat16_is_read_in_pairs_where_memory_allows(first):
    """Memory of someone else's may begin between two words: the offset in the tensor's storage does not tell."""
    value = torch.frombuffer(bytearray(200), dtype=torch.bfloat16, offset=2 * first, count=48).view(1, 3, 2, 8)
    packed = launch._packed(value)
    assert value.storage_offset() == 0 and packed.data_ptr() == value.data_ptr()
    assert packed.dtype == (torch.bfloat16 if value.data_ptr() % 4 else torch.int32)
