"""Predict on a CPU what limits each kernel plan on an H100, under two things about it that nobody has published.

    python -m benchmarks.predict                          # the plans of the committed compile table, `local` locations
    python -m benchmarks.predict --counts table.csv --distribution uniform --csv predictions.csv

EVERY TIME HERE IS AN ESTIMATE: nothing is measured. Cache lines, sectors and adds are counted at the sample positions
of the workload `encoder`; instructions are those of the compile table (rows plain, 32 channels, sm_90). There is a line
for each plan, in us. A column is the time that the kernel would take if this alone were its limit:
    peak      issue slots, if every multiprocessor issued four instructions a clock
    issue     the same at the 75 % of that peak which gathers reach
    tag       L1 looks up lines, four a cycle; loads only, as in the next two
    packs     L1 delivers sectors, if any four go out in a cycle
    place     L1 delivers sectors, if those at the same place of different 128-byte lines take turns
    fill      L2 to L1: every row of value that a program reads, once for this program; programs share none
    hbm       device memory: every byte of operands and results once
    sectors   backward: L2 adds to grad_value, if half a sector costs as much as a whole one
    bytes     backward: L2 adds to grad_value, if half a sector costs half
Whether L1 is `packs` or `place`, and L2 `sectors` or `bytes`, is not known. "if packs+bytes" is the prediction if it is
these two: the largest of issue, tag, packs, fill, hbm and bytes. Its regret, in brackets, is the prediction over the
least of any plan for this kernel and dtype. Who does not know takes the plan whose largest regret is the least.

Left out: latency; launches; what one limit costs another; stores and adds on their way through L1; the zeros that
grad_value starts from, and its cast. What rows of a warp add to one place at once is supposed to reach L2 as one.
"""

import argparse
import csv
import functools
import itertools
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.compile_table import CSV, Case, launched, plan_text
from benchmarks.workloads import DISTRIBUTIONS, WORKLOADS, Workload, make_inputs
from msda_triton.kernels.plan import CONFIGS, Plan

# H100 SXM
SMS, MHZ = 132, 1755  # multiprocessors, at boost
ISSUE, ISSUE_REACHED = 4, 0.75  # instructions a clock and multiprocessor; the part that gathers reach (estimated)
# lines that L1 looks up a cycle (forums.developer.nvidia.com, t/312884 and t/273699); sectors that it delivers at most
TAGS, SECTORS = 4, 4
L2_BYTES = 5.5e6  # read a us (measured by chipsandcheese on the PCIe card: 5.5 to 7)
L2_ADDS = 70e3  # sectors added to a us (estimated from scatter_add on a GB200, PyTorch's PR 182675: 60 to 80)
HBM_BYTES = 3.35e6  # a us (data sheet, as in bench_op.py)
SECTOR, LINE = 32, 4  # bytes of a sector, sectors of a line

ENCODER = WORKLOADS["encoder"]
HEADS = (0, 3)  # whose positions are read, in the first image: they stand for all
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SAMPLE_LOADS = (3, 2, 1.5)  # of a point's location and weight, by PAIRS
KEYS = ("kernel", "dtype", "config")  # what names a plan
COMMON = ("issue", "tag", "fill", "hbm")  # resources that count whatever is so
# by kernel, what may be so: the resources that count besides
HYPOTHESES = {
    "forward": ("packs", "place"),
    "backward": ("packs+sectors", "packs+bytes", "place+sectors", "place+bytes"),
}


@functools.cache
def corner_tokens(workload: Workload, distribution: str) -> np.ndarray:
    """Tokens of the four corners of every sample, -1 outside of its level: [HEADS, 4, Q, L, P]."""
    inputs = make_inputs(replace(workload, B=1), distribution, torch.float32, "cpu")
    sizes = inputs.shapes.flip(1)[:, None]  # [L, 1, 2] (W, H)
    corner = (inputs.locations[0, :, list(HEADS)] * sizes - 0.5).floor().long()  # [Q, HEADS, L, P, 2]
    tokens = []
    for shift in itertools.product((0, 1), (0, 1)):
        pixel = corner + torch.tensor(shift)
        inside = ((pixel >= 0) & (pixel < sizes)).all(-1)
        tokens.append(torch.where(inside, inputs.starts[:, None] + pixel[..., 1] * sizes[..., 0] + pixel[..., 0], -1))
    return torch.stack(tokens).permute(2, 0, 1, 3, 4).numpy()


@functools.cache
def queries_of_programs(workload: Workload, BLOCK_Q: int, BLOCK_W: int) -> tuple[np.ndarray, np.ndarray]:
    """Query of each row, [programs, BLOCK_Q], and a mask of rows past the edge of a level: its last queries again."""
    # a run of queries is a rectangle one row high, of a level that has all queries in one row
    levels, width = (workload.levels, BLOCK_W) if BLOCK_W else ([(1, workload.Q)], BLOCK_Q)
    height, start, queries, past = BLOCK_Q // width, 0, [], []
    for H, W in levels:
        y = np.arange(0, H, height)[:, None, None, None] + np.arange(height)[:, None]
        x = np.arange(0, W, width)[:, None, None] + np.arange(width)
        queries.append((start + np.minimum(y, H - 1) * W + np.minimum(x, W - 1)).reshape(-1, BLOCK_Q))
        past.append(((y >= H) | (x >= W)).reshape(-1, BLOCK_Q))
        start += H * W
    return np.concatenate(queries), np.concatenate(past)


def tokens_of_rows(workload: Workload, distribution: str, plan: Plan) -> np.ndarray:
    """Tokens that every row of every program reads, in the order of its loads: [HEADS, 4, programs, rows, points]."""
    queries, _ = queries_of_programs(workload, plan.BLOCK_Q, plan.BLOCK_W)
    tokens = corner_tokens(workload, distribution)
    # of a query's rows, row r takes points r, r + SHARE, ... of each level
    tokens = tokens.reshape(*tokens.shape[:4], -1, plan.SHARE)[:, :, queries]
    return np.moveaxis(tokens, -1, 4).reshape(len(HEADS), 4, len(queries), plan.BLOCK_Q * plan.SHARE, -1)


def lanes_of(plan: Plan, D: int) -> int:
    """Lanes of a row of D channels."""
    lanes = D // (plan.VEC * plan.CHUNKS)
    if plan.VEC not in (4, 8) or lanes < 1 or plan.BLOCK_Q * plan.SHARE * lanes % (32 * plan.warps):
        raise ValueError(f"plan: expected VEC 4 or 8 and rows of {D} channels for all lanes of its warps, got {plan}")
    return lanes


def by_instruction(x: np.ndarray, lanes: int) -> np.ndarray:
    """[..., rows of a program, points] as [instructions, rows of a warp]."""
    return x.reshape(-1, 32 // lanes, x.shape[-1]).swapaxes(1, 2).reshape(-1, 32 // lanes)


def chunk_of_rows(plan: Plan, step: int) -> np.ndarray:
    """Chunk that each row of a program takes at a step, [rows, 1]: see `channels.py`."""
    first = np.arange(plan.BLOCK_Q * plan.SHARE)[:, None] % plan.ROTATE * (plan.CHUNKS // plan.ROTATE)
    return first ^ step


def distinct(x: np.ndarray) -> np.ndarray:
    """x in order along its last axis, with -1 for what is there again."""
    x = np.sort(x, -1)
    x[..., 1:][x[..., 1:] == x[..., :-1]] = -1
    return x


def l1_cycles(sectors: np.ndarray) -> np.ndarray:
    """Sums over instructions of (lines, cycles of the tag stage, of the data stage if packs, if place).

    sectors [instructions, n] are those that each loads, counted from address 0; negative ones are none.
    """
    sectors = distinct(sectors)
    lines = (distinct(sectors // LINE) >= 0).sum(-1)
    packed = np.ceil((sectors >= 0).sum(-1) / SECTORS)
    turns = np.max([((sectors >= 0) & (sectors % LINE == place)).sum(-1) for place in range(LINE)], 0)
    return np.array([lines.sum(), np.ceil(lines / TAGS).sum(), packed.sum(), turns.sum()])


@functools.cache
def value_loads(workload: Workload, distribution: str, plan: Plan, itemsize: int) -> np.ndarray:
    """`l1_cycles` of the loads of value, [B, S, M, D] in memory, and how many loads, for a (query, head)."""
    tokens, lanes = tokens_of_rows(workload, distribution, plan), lanes_of(plan, workload.D)
    row = (tokens * workload.M + np.array(HEADS)[:, None, None, None, None]) * workload.D * itemsize
    chunk = workload.D * itemsize // plan.CHUNKS
    sums = np.zeros(5)
    for step in range(plan.CHUNKS):
        first = np.where(tokens < 0, -1, (row + chunk_of_rows(plan, step) * chunk) // SECTOR)
        first = by_instruction(first, lanes)[..., None]
        sectors = np.where(first < 0, -1, first + np.arange(max(chunk // SECTOR, 1)))
        sums += [*l1_cycles(sectors.reshape(len(sectors), -1)), len(sectors)]
    return sums / (workload.Q * len(HEADS))


@functools.cache
def sample_loads(workload: Workload, plan: Plan) -> np.ndarray:
    """`l1_cycles` of the loads of locations and weights, for a (query, head)."""
    queries, _ = queries_of_programs(workload, plan.BLOCK_Q, plan.BLOCK_W)
    # each query has lines of its own, and begins at the same place of them; the rows that share it read one sector
    sectors = LINE * np.repeat(queries, plan.SHARE, 1)[..., None]
    loads = len(workload.levels) * workload.P // plan.SHARE * SAMPLE_LOADS[plan.PAIRS]
    return l1_cycles(by_instruction(sectors, lanes_of(plan, workload.D))) * loads / workload.Q


@functools.cache
def rows_of_value(workload: Workload, distribution: str, plan: Plan) -> float:
    """Different rows of value that a program reads, for each (query, head) that it has."""
    tokens = tokens_of_rows(workload, distribution, plan).swapaxes(1, 2)
    return (distinct(tokens.reshape(*tokens.shape[:2], -1)) >= 0).sum() / (workload.Q * len(HEADS))


@functools.cache
def sector_adds(workload: Workload, distribution: str, plan: Plan) -> tuple[float, float]:
    """Sectors of grad_value that adds touch, for a (query, head), and how many whole sectors their bytes are.

    A lane adds 16 bytes at once: with VEC 8 one half of a sector and then the other, with VEC 4 beside another lane.
    """
    tokens, lanes = tokens_of_rows(workload, distribution, plan), lanes_of(plan, workload.D)
    _, past = queries_of_programs(workload, plan.BLOCK_Q, plan.BLOCK_W)
    none = (tokens < 0) | np.repeat(past, plan.SHARE, 1)[..., None]
    chunks = 0
    for step in range(plan.CHUNKS):
        place = np.where(none, -1, tokens * plan.CHUNKS + chunk_of_rows(plan, step))
        chunks += (distinct(by_instruction(place, lanes)) >= 0).sum() / (workload.Q * len(HEADS))
    touched = 2 * lanes if plan.VEC == 8 else -(-lanes // 2)
    return chunks * touched, chunks * lanes * plan.VEC * 4 / SECTOR


def memory_bytes(w: Workload, kernel: str, itemsize: int) -> int:
    """Of value, locations, weights and result or its gradient; of a backward also of the gradients that it writes."""
    samples = w.Q * w.M * len(w.levels) * w.P * (2 * 4 + itemsize)
    read = (w.S + w.Q) * w.M * w.D * itemsize + samples
    return w.B * (read if kernel == "forward" else read + w.S * w.M * w.D * 4 + samples)


def resources(workload: Workload, distribution: str, case: Case, plan: Plan, instructions: float) -> dict[str, float]:
    """us by resource, of a case that runs with a plan and issues so many instructions a row."""
    rows, itemsize = workload.B * workload.Q * workload.M, ITEMSIZE[case.dtype]
    queries, _ = queries_of_programs(workload, plan.BLOCK_Q, plan.BLOCK_W)  # with those past the edge, issued as well
    peak = instructions * queries.size * workload.B * workload.M / (ISSUE * SMS * MHZ)
    counts = (
        workload,
        distribution,
        replace(plan, UNROLL=1, PAIRS=0, TURN=1, registers=None),
    )  # what counts depend on
    cycles = value_loads(*counts, itemsize)[:4] + sample_loads(workload, plan)
    us = {"peak": peak, "issue": peak / ISSUE_REACHED}
    us |= zip(("tag", "packs", "place"), cycles[1:] * rows / (SMS * MHZ), strict=True)
    us["fill"] = rows_of_value(*counts) * workload.D * itemsize * rows / L2_BYTES
    us["hbm"] = memory_bytes(workload, case.kernel, itemsize) / HBM_BYTES
    if case.kernel == "backward":
        us["sectors"], us["bytes"] = (n * rows / L2_ADDS for n in sector_adds(*counts))
    return us


def predictions(kernel: str, us: dict[str, float]) -> dict[str, float]:
    """us by hypothesis: the largest of the resources that count."""
    return {name: max(us[key] for key in (*COMMON, *name.split("+"))) for name in HYPOTHESES[kernel]}


def add_regrets(rows: list[dict]) -> None:
    """Give each row its regrets and the largest of them."""
    for row in rows:
        rivals = [other for other in rows if (other["kernel"], other["dtype"]) == (row["kernel"], row["dtype"])]
        regrets = {x: row[f"if {x}"] / min(other[f"if {x}"] for other in rivals) for x in HYPOTHESES[row["kernel"]]}
        row |= {f"regret {x}": regret for x, regret in regrets.items()} | {"max regret": max(regrets.values())}


def read_counts(path: Path) -> list[tuple[Case, float]]:
    """Plain kernels of the encoder's channels for sm_90 in a compile table, in order, with their instructions a row."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {field.name for field in fields(Case)} | {"plan", "instructions_per_row", "value_load_bits"}
    if missing := columns - set(*rows[:1]):
        raise ValueError(f"expected a table of benchmarks.compile_table, {path} lacks {', '.join(sorted(missing))}")
    found = []
    for (kernel, dtype), row in itertools.product(itertools.product(HYPOTHESES, ITEMSIZE), rows):
        case = Case(kernel, "plain", dtype, ENCODER.D, row["config"], "sm_90")
        if row.items() >= {name: str(x) for name, x in asdict(case).items()}.items():
            if row["config"] not in CONFIGS[kernel] or row["plan"] != plan_text(case):
                raise ValueError(f"{path} is of other kernels, write it anew: now {case} is not {row['plan']!r}")
            bits = 8 * ITEMSIZE[dtype] * launched(case).plan.VEC
            if row["value_load_bits"] != str(bits) or not row["instructions_per_row"]:
                raise ValueError(f"expected loads of {bits} bits and a number of instructions a row, got {row}")
            found.append((case, float(row["instructions_per_row"])))
    if not found:
        raise ValueError(f"expected plain kernels with {ENCODER.D} channels for sm_90, {path} has none")
    return found


def predict(counts: list[tuple[Case, float]], distribution: str) -> list[dict]:
    """A row for each plan, in order."""
    rows = []
    for case, instructions in counts:
        us = resources(ENCODER, distribution, case, launched(case).plan, instructions)
        us |= {f"if {name}": x for name, x in predictions(case.kernel, us).items()}
        rows.append({name: getattr(case, name) for name in KEYS} | {"instructions": instructions} | us)
    add_regrets(rows)
    return rows


def print_table(rows: list[dict]) -> None:
    """Rows of one kernel; a prediction with its regret."""
    names = [name for name in rows[0] if not name.startswith("regret ")]
    table = [names]
    for row in rows:
        regrets = {f"if {x}": f" ({row[f'regret {x}']:.2f})" for x in HYPOTHESES[row["kernel"]]}
        us = [f"{row[name]:.0f}{regrets.get(name, '')}" for name in names[len(KEYS) : -1]]
        table.append([row[name] for name in KEYS] + us + [f"{row['max regret']:.2f}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(f"{cell:{'<' if i < len(KEYS) else '>'}{widths[i]}}" for i, cell in enumerate(cells)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, default=CSV, help="a compile table (default: %(default)s)")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default="local", help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="where to write the predictions (default: nowhere)")
    args = parser.parse_args()
    try:
        counts = read_counts(args.counts)
    except (OSError, ValueError) as error:
        parser.error(f"--counts: {error}")
    what = f"ESTIMATES in us, nothing is measured: H100 SXM, encoder, {args.distribution} locations"
    print(what, end="\n\n")
    rows = predict(counts, args.distribution)
    for _, group in itertools.groupby(rows, lambda row: row["kernel"]):
        print_table(list(group))
    for (kernel, dtype), group in itertools.groupby(rows, lambda row: (row["kernel"], row["dtype"])):
        regrets = {row["config"]: round(row["max regret"], 2) for row in group}
        least = [repr(name) for name, regret in regrets.items() if regret == min(regrets.values())]
        print(f"{kernel} {dtype}: the largest regret is least, {min(regrets.values()):.2f}, with {', '.join(least)}")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            columns = dict.fromkeys(["what", *itertools.chain.from_iterable(rows)])
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({"what": what} | {k: x if isinstance(x, str) else round(x, 3) for k, x in row.items()})


if __name__ == "__main__":
    main()
