"""The predictions' counts beside a count lane by lane, and their arithmetic. No time is asserted: none is measured."""

import csv
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import predict
from benchmarks.compile_table import CSV, Case, plan_text
from benchmarks.workloads import Workload, make_inputs
from msda_triton.kernels.plan import Plan

SMALL = Workload("small", 2, ((7, 11), (3, 5)), 92, M=4)
# the chunks of a row in order, by CHUNKS and ROTATE, of each kind of row
ORDERS = {
    (1, 1): [[0]],
    (2, 1): [[0, 1]],
    (4, 1): [[0, 1, 2, 3]],
    (2, 2): [[0, 1], [1, 0]],
    (4, 2): [[0, 1, 2, 3], [2, 3, 0, 1]],
    (4, 4): [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]],
}
HEADS = len(predict.HEADS)  # whose positions are counted


BF16 = Plan(BLOCK_Q=32, BLOCK_W=8, VEC=8, CHUNKS=2, warps=2)
FP32 = Plan(BLOCK_Q=32, BLOCK_W=8, VEC=4, CHUNKS=4, warps=2)
LAYOUTS = {
    "bf16": (BF16, 2),
    "bf16 runs": (replace(BF16, BLOCK_W=0), 2),
    "bf16 four lanes": (Plan(BLOCK_Q=8, BLOCK_W=4, VEC=8, CHUNKS=1, warps=1), 2),
    "bf16 loads of 8 bytes": (replace(BF16, VEC=4, CHUNKS=4), 2),
    "bf16 two rows share": (Plan(BLOCK_Q=8, BLOCK_W=4, VEC=8, CHUNKS=1, SHARE=2, PAIRS=1, warps=2), 2),
    "bf16 rotated": (replace(BF16, PAIRS=2, ROTATE=2), 2),
    "fp32": (FP32, 4),
    "bf16 rotated loads of 8 bytes": (replace(BF16, VEC=4, CHUNKS=4, ROTATE=2), 2),
    "fp32 rotated": (replace(FP32, ROTATE=4), 4),
    "fp32 eight lanes": (Plan(BLOCK_Q=32, BLOCK_W=8, VEC=4, CHUNKS=1, warps=8), 4),
}


def programs(plan: Plan) -> list[list[tuple[int, bool]]]:
    """(query, whether it is past the edge) of each row of each program."""
    found, start = [], 0
    for H, W in SMALL.levels if plan.BLOCK_W else [(1, SMALL.Q)]:
        width = plan.BLOCK_W or plan.BLOCK_Q
        height = plan.BLOCK_Q // width
        for top in range(0, H, height):
            for left in range(0, W, width):
                pixels = [(top + i // width, left + i % width) for i in range(plan.BLOCK_Q)]
                found.append([(start + min(y, H - 1) * W + min(x, W - 1), y >= H or x >= W) for y, x in pixels])
        start += H * W
    return [[row for row in program for _ in range(plan.SHARE)] for program in found]


def lane_by_lane(plan: Plan, itemsize: int) -> Counter:
    """What all programs of the two heads do, by going through their instructions with sets of bytes and sectors."""
    locations = make_inputs(replace(SMALL, B=1), "local", torch.float32, "cpu").locations[0].numpy()
    lanes = SMALL.D // (plan.VEC * plan.CHUNKS)
    starts, count = (0, 77), Counter()

    def token(query, head, level, point, dy, dx):
        H, W = SMALL.levels[level]
        u, v = locations[query, head, level, point]
        x = int(np.floor(u * np.float32(W) - np.float32(0.5))) + dx
        y = int(np.floor(v * np.float32(H) - np.float32(0.5))) + dy
        return starts[level] + y * W + x if 0 <= x < W and 0 <= y < H else None

    def load(addresses, what):
        lines = {}
        for sector in {byte // 32 for byte in addresses}:
            lines.setdefault(sector // 4, set()).add(sector % 4)
        places = Counter(place for line in lines.values() for place in line)
        count[what, "lines"] += len(lines)
        count[what, "tag"] += -(-len(lines) // 4)
        count[what, "packs"] += -(-sum(places.values()) // 4)
        count[what, "place"] += max(places.values(), default=0)
        count[what, "loads"] += 1

    for head, program in ((head, program) for head in predict.HEADS for program in programs(plan)):
        read = set()
        for first in range(0, len(program), 32 // lanes):
            warp = list(enumerate(program))[first : first + 32 // lanes]
            for level in range(2):
                for base in range(0, SMALL.P, plan.SHARE):
                    for _ in range(3 - plan.PAIRS if plan.PAIRS < 2 else 1):
                        load([1024 * query + 8 * (base + r % plan.SHARE) for r, (query, _) in warp], "samples")
                    if plan.PAIRS == 2 and base % 2 == 0:  # the weights of this point and the next
                        load([1024 * query + 8 * base for _, (query, _) in warp], "samples")
                    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        tokens = {
                            r: t
                            for r, (query, _) in warp
                            if (t := token(query, head, level, base + r % plan.SHARE, dy, dx)) is not None
                        }
                        read |= set(tokens.values())
                        for step in range(plan.CHUNKS):
                            loads, adds = [], [set() for _ in range(plan.VEC // 4)]
                            for r, t in tokens.items():
                                chunk = ORDERS[plan.CHUNKS, plan.ROTATE][r % plan.ROTATE][step]
                                for lane in range(lanes):
                                    channel = (chunk * lanes + lane) * plan.VEC
                                    element = (t * SMALL.M + head) * SMALL.D + channel
                                    loads += [element * itemsize, (element + plan.VEC) * itemsize - 1]
                                    if not program[r][1]:
                                        for red, places in enumerate(adds):
                                            places |= {4 * (element + 4 * red + i) for i in range(4)}
                            load(loads, "value")
                            for places in adds:
                                count["sectors"] += len({byte // 32 for byte in places})
                                count["bytes"] += 4 * len(places)
        count["rows"] += len(read)
    return count


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_are_those_of_lane_by_lane(name):
    plan, itemsize = LAYOUTS[name]
    count, queries = lane_by_lane(plan, itemsize), SMALL.Q * HEADS
    stages = ("lines", "tag", "packs", "place")
    value = predict.value_loads(SMALL, "local", plan, itemsize) * queries
    assert value.round(6).tolist() == [count["value", x] for x in (*stages, "loads")]
    samples = predict.sample_loads(SMALL, plan) * queries
    assert samples.round(6).tolist() == [count["samples", x] for x in stages]
    assert round(predict.rows_of_value(SMALL, "local", plan) * queries, 6) == count["rows"]
    adds = np.multiply(predict.sector_adds(SMALL, "local", plan), queries)
    assert adds.round(6).tolist() == [count["sectors"], count["bytes"] / 32]


def test_sectors_at_one_place_take_turns_and_others_share_a_cycle():
    """Sixteen lines, one sector each."""
    same = 4 * np.arange(16)[None]
    assert predict.l1_cycles(same).tolist() == [16, 4, 4, 16]
    assert predict.l1_cycles(same + np.arange(16) % 4).tolist() == [16, 4, 4, 4]
    assert predict.l1_cycles(np.concatenate((same, same), 1)).tolist() == [16, 4, 4, 16]
    assert predict.l1_cycles(np.arange(16)[None]).tolist() == [4, 1, 4, 4]
    assert predict.l1_cycles(np.full((2, 16), -1)).tolist() == [0, 0, 0, 0]


def test_the_encoder_of_the_notes():
    """As other code has counted: lines a load, us of the stages for value alone, rows of value that a program reads."""
    w, rotated = predict.ENCODER, LAYOUTS["bf16 rotated"][0]
    lines, *cycles, loads = predict.value_loads(w, "local", rotated, 2)
    us = [round(c * w.B * w.Q * w.M / (132 * 1755)) for c in cycles]
    assert (round(lines / loads, 1), us) == (11.9, [43, 44, 86])
    assert round(predict.rows_of_value(w, "local", rotated), 1) == 14.3
    # the notes read a third head here
    _, *cycles, _ = predict.value_loads(w, "local", BF16, 2)
    assert [c * w.B * w.Q * w.M / (132 * 1755) for c in cycles] == pytest.approx([42, 42, 151], rel=0.015)


def test_a_rotated_row_begins_with_another_chunk_and_takes_all():
    rotated, _ = LAYOUTS["fp32 rotated"]
    steps = np.concatenate([predict.chunk_of_rows(rotated, step) for step in range(4)], 1)
    assert steps[:5].tolist() == [*ORDERS[4, 4], [0, 1, 2, 3]]
    assert predict.chunk_of_rows(FP32, 2).tolist() == [[2]] * 32


def test_half_sectors_cost_twice_only_where_they_count_as_whole_ones():
    halves, _ = LAYOUTS["bf16"]
    whole, _ = LAYOUTS["bf16 loads of 8 bytes"]
    sectors, as_bytes = predict.sector_adds(SMALL, "local", halves)
    assert sectors == pytest.approx(2 * as_bytes)
    assert predict.sector_adds(SMALL, "local", whole) == pytest.approx((as_bytes, as_bytes))


def test_resources_of_a_small_encoder():
    """By hand: rows of 2 images, 92 queries and 4 heads; programs of 4 x 8 on 7 x 11 and 3 x 5 pixels."""
    case = Case("backward", "plain", "bf16", 32, "many", "sm_90")
    us = predict.resources(SMALL, "local", case, BF16, 100.0)
    assert us["peak"] == pytest.approx(100 * 5 * 32 * 2 * 4 / (132 * 4 * 1755))
    assert us["issue"] == pytest.approx(us["peak"] / 0.75)
    value, samples = 2 * 92 * 4 * 32, 2 * 92 * 4 * 2 * 4
    assert us["hbm"] == pytest.approx((value * (2 + 2 + 4) + samples * 2 * (8 + 2)) / 3.35e6)
    rows, clocks = 2 * 92 * 4, 132 * 1755
    count = lane_by_lane(BF16, 2)
    place = (count["value", "place"] + count["samples", "place"]) / (92 * HEADS)
    assert us["place"] == pytest.approx(place * rows / clocks)
    assert us["fill"] == pytest.approx(count["rows"] / (92 * HEADS) * rows * 64 / 5.5e6)
    assert us["sectors"] == pytest.approx(count["sectors"] / (92 * HEADS) * rows / 70e3)
    forward = predict.resources(SMALL, "local", replace(case, kernel="forward"), BF16, 100.0)
    assert forward["hbm"] == pytest.approx((value * (2 + 2) + samples * (8 + 2)) / 3.35e6)
    assert set(us) - set(forward) == {"sectors", "bytes"}


def test_a_prediction_is_the_largest_resource_that_counts():
    us = {"peak": 99, "issue": 5, "tag": 1, "packs": 2, "place": 7, "fill": 3, "hbm": 4}
    assert predict.predictions("forward", us) == {"packs": 5, "place": 7}
    us |= {"sectors": 8, "bytes": 6}
    assert predict.predictions("backward", us) == {
        "packs+sectors": 8, "packs+bytes": 6, "place+sectors": 8, "place+bytes": 7,
    }  # fmt: skip
    assert predict.predictions("forward", us | {"tag": 11}) == {"packs": 11, "place": 11}


def test_regrets_are_against_the_best_of_the_same_kernel_and_dtype():
    def row(dtype, packs, place):
        return {"kernel": "forward", "dtype": dtype, "if packs": packs, "if place": place}

    rows = [row("bf16", 100, 300), row("bf16", 120, 200), row("fp32", 50, 50)]
    predict.add_regrets(rows)
    assert [(r["regret packs"], r["regret place"], r["max regret"]) for r in rows] == [
        (1, 1.5, 1.5),
        (1.2, 1, 1.2),
        (1, 1, 1),
    ]


def test_a_plan_that_leaves_lanes_idle_is_refused():
    with pytest.raises(ValueError, match="plan: expected"):
        predict.lanes_of(replace(BF16, warps=4), 32)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(predict, "ENCODER", SMALL)
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()


def test_the_committed_table_is_predicted_in_order(monkeypatch, capsys, tmp_path):
    path = tmp_path / "new" / "predictions.csv"
    run(monkeypatch, "--csv", path, "--distribution", "uniform")
    printed = capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == {printed.splitlines()[0]}
    assert printed.startswith("ESTIMATES in us, nothing is measured") and "uniform" in printed.splitlines()[0]
    kinds = [(row["kernel"], row["dtype"]) for row in rows]
    dtypes = ("bf16", "fp16", "fp32")
    assert list(dict.fromkeys(kinds)) == [(kernel, dtype) for kernel in ("forward", "backward") for dtype in dtypes]
    assert kinds == sorted(kinds, key=lambda kind: (kind[0] == "backward", dtypes.index(kind[1])))
    for row in rows:
        limits = ("issue", "tag", "place", "fill", "hbm", *(["sectors"] if row["kernel"] == "backward" else []))
        name = "if place+sectors" if row["kernel"] == "backward" else "if place"
        assert float(row[name]) == max(float(row[limit]) for limit in limits)


def test_the_plan_of_least_regret_is_named(monkeypatch, capsys, tmp_path):
    """So many instructions that nothing else counts: the configuration with the fewest wins, whatever is so."""
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ["kernel", "variant", "dtype", "channels", "config", "target"]
        writer.writerow([*columns, "plan", "instructions_per_row", "value_load_bits"])
        for config, instructions in (("many", 2.5e6), ("large", 2e6), ("many, 128 registers", 3e6)):
            case = Case("forward", "plain", "fp32", 32, config, "sm_90")
            writer.writerow([*(getattr(case, x) for x in columns), plan_text(case), instructions, 128])
    run(monkeypatch, "--counts", tmp_path / "table.csv")
    *table, _, named = capsys.readouterr().out.splitlines()
    assert named == "forward fp32: the largest regret is least, 1.00, with 'large'"
    assert [line.split()[-1] for line in table[-3:]] == ["1.25", "1.00", "1.50"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("plan", "BLOCK_Q=1", "write it anew"),
        ("config", "no such", "write it anew"),
        ("value_load_bits", "64", "expected loads of 128 bits"),
        ("instructions_per_row", "", "a number of instructions a row"),
        ("target", "sm_91", "expected plain kernels with 32 channels for sm_90"),
        ("instructions_per_row", None, "lacks instructions_per_row"),
    ],
)
def test_a_table_that_cannot_be_predicted_is_refused(column, value, message, monkeypatch, capsys, tmp_path):
    with CSV.open(newline="") as file:
        rows = [row | {column: value} for row in csv.DictReader(file)]
    columns = [name for name in rows[0] if (name, value) != (column, None)]
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--counts", path)
    error = capsys.readouterr().err
    assert "--counts: " in error and message in error
