"""What the compiler makes of the kernels, and that the committed table still says so. Needs no GPU."""

import ast
import csv
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from filelock import FileLock

from benchmarks import compile_table
from benchmarks.compile_table import (
    BUDGET_TARGETS,
    CSV,
    OTHER_TARGETS,
    VARIANTS,
    Case,
    cases,
    is_default,
    issued_instructions,
    parse_sass,
    spilled,
)
from msda_triton.kernels import plan
from msda_triton.kernels.channels import lanes_of_add

ROOT = Path(__file__).parents[1]
KEYS = [field.name for field in fields(Case)]
NVIDIA = [target for target in BUDGET_TARGETS if target.startswith("sm_")]

# SASS instructions per (query, head) row on sm_90, D = 32, L = P = 4, by configuration: the best ever counted, and 3 %
# for what came since and for another compiler. A configuration that becomes the table's needs its own.
BUDGETS = {
    ("forward", "bf16", "runs"): 258.6,
    ("forward", "fp16", "runs"): 258.8,
    ("forward", "fp32", "many"): 353.2,
    ("forward", "bf16", "lanes of 16"): 211.7,
    ("forward", "fp16", "lanes of 16"): 213.6,
    ("forward", "fp32", "lanes of 16"): 183.2,
    ("backward", "bf16", "many"): 880.8,
    ("backward", "fp16", "many"): 850.2,
    ("backward", "fp32", "many"): 782.8,
    ("backward", "bf16", "lanes of 16"): 439.6,
    ("backward", "fp16", "lanes of 16"): 437.5,
    ("backward", "fp32", "lanes of 16"): 381.6,
}


def python(*arguments: str) -> str:
    """Output of a Python that compiles its kernels, unlike this one."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def read(path: Path) -> dict[tuple, dict]:
    with path.open(newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def quick(tmp_path_factory, worker_id) -> dict[tuple, dict]:
    """The rows of --quick, compiled once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder if worker_id == "master" else folder.parent) / "compile_table.csv"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            python("-m", "benchmarks.compile_table", "--quick", "--csv", str(path))
    return read(path)


def test_quick_compiles_every_default(quick):
    assert set(quick) == {tuple(str(x) for x in asdict(case).values()) for case in cases(quick=True)}
    assert {(row["kernel"], row["target"]) for row in quick.values()} == {
        (kernel, target) for kernel in ("forward", "backward") for target in BUDGET_TARGETS
    }


@pytest.mark.parametrize("target", BUDGET_TARGETS)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_no_spill(kernel, target, quick):
    assert spilled(select(quick, kernel=kernel, target=target)) == []


@pytest.mark.parametrize("target", NVIDIA)
def test_value_loads_are_128_bits_wide(target, quick):
    """Those of the backward in half precision are 64: four channels, which four sums of float32 belong to."""
    for row in select(quick, target=target):
        half = row["kernel"] == "backward" and row["dtype"] != "fp32"
        assert row["value_load_bits"] == ("64" if half else "128")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_reds_add_four_floats(target, quick):
    reds = {(row["kernel"], row["red"]) for row in quick.values() if row["target"] == target}
    assert reds == {("forward", ""), ("backward", "v4.f32")}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_no_tile_travels_through_shared_memory(kernel, dtype, quick):
    for row in select(quick, kernel=kernel, variant="plain", dtype=dtype, target="sm_90"):
        assert (row["shared_bytes"], row["barriers"]) == ("0", "0")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_instructions_per_row(kernel, dtype, quick):
    rows = select(quick, kernel=kernel, variant="plain", dtype=dtype, target="sm_90")
    found = {row["config"]: float(row["instructions_per_row"]) for row in rows}
    budgets = {config: budget for (*kind, config), budget in BUDGETS.items() if kind == [kernel, dtype]}
    assert found.keys() == budgets.keys()
    for config, budget in budgets.items():
        assert 0 < found[config] <= 1.03 * budget


def test_a_red_covers_whole_sectors():
    """The lanes of a row add to neighbours: half a 32-byte sector may cost the L2 cache as much as a whole one.

    From Triton's layout of the tiles that are added, and the offsets of `lanes_of_add`, in order of the columns.
    """
    case = Case("backward", "plain", "bf16", 32, "many", "sm_90")
    module = python("-c", f"from benchmarks.compile_table import *; print(compile_case({case}).asm['ttgir'])")
    layouts = set(re.findall(r"tt\.atomic_rmw fadd.*?tensor<\d+x(\d+)x!tt\.ptr<f32>, (#\w+)>", module))
    assert layouts
    constants = compile_table.launched(case).plan
    for columns, name in layouts:
        layout = re.search(rf"^{name} = #ttg\.blocked<(.*)>", module, re.MULTILINE)[1]
        per_thread, threads = (
            int(re.search(rf"{what} = \[\d+, (\d+)\]", layout)[1]) for what in ("sizePerThread", "threadsPerWarp")
        )
        assert (per_thread, per_thread * threads) == (4, int(columns))  # a vector a lane, the row in one instruction
        offsets = offsets_of_a_red(constants, int(columns))
        for row in offsets:
            sectors = [{4 * offset // 32 for offset in range(start, start + 8)} for start in row[::8]]
            assert all(len(sector) == 1 for sector in sectors) and row == [x for s in row[::8] for x in range(s, s + 8)]


def offsets_of_a_red(constants: plan.Plan, columns: int) -> list[list[int]]:
    """Which floats of their rows of 32 the first red of a tile adds to, by row."""
    out = torch.zeros(constants.BLOCK_Q, columns, dtype=torch.int32)
    _store_offsets[(1,)](out, constants.BLOCK_Q, 32, constants.VEC, constants.CHUNKS, constants.ROTATE, columns)
    return out.tolist()


@triton.jit
def _store_offsets(
    ptr, ROWS: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, ROTATE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    lane, _in_row, _odd, _upper = lanes_of_add(ROWS, D, D, VEC, CHUNKS, ROTATE)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + place, place * 0 + lane)


def test_half_sectors_are_found():
    """The other layout, of 8 channels a lane, fails that test."""
    halves = plan.Plan(BLOCK_Q=32, VEC=8, CHUNKS=2)
    assert offsets_of_a_red(halves, 8)[0] == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("variant", ["plain", "box_mask"])
def test_the_bound_of_deterministic_sums_compiles(variant):
    """Of the other kernels' kind `quick` has one each; here the least and the most that this one does."""
    case = next(case for case in cases() if (case.kernel, case.variant, case.target) == ("bound", variant, "sm_90"))
    row = python(
        "-c", f"from benchmarks.compile_table import *; row = measure({case}); print(spilled([row]), row['red'])"
    )
    assert row.split() == ["[]"]


def select(rows: dict[tuple, dict], **wanted: str) -> list[dict]:
    return [row for row in rows.values() if row.items() >= wanted.items()]


def test_committed_table_is_current(quick):
    """Other numbers than the committed ones: `python -m benchmarks.compile_table --quick --csv` with its path."""
    committed = read(CSV)
    assert set(committed) == set(quick)
    stale = {key: row for key, row in quick.items() if committed[key]["triton"] == row["triton"]}
    assert {key: committed[key] for key in stale} == stale


def test_the_whole_table_has_every_configuration_and_every_variant_on_every_target():
    """`make test-all` compiles it, and fails if anything spills of what runs untimed."""
    found = [(case.kernel, case.variant, case.target) for case in cases()]
    kinds = {(kernel, variant) for kernel, variants in VARIANTS.items() for variant in variants}
    targets = BUDGET_TARGETS + OTHER_TARGETS
    assert len(targets) == 10
    assert set(found) == {(*kind, target) for kind in kinds for target in targets}
    names = {(case.kernel, case.config) for case in cases()}
    tabled = {(kernel, name) for (kernel, _), row in plan.TABLE.items() for name in row.values()}
    tried = {(kernel, name) for kernel, names in plan.TIMED.items() for name in names}
    assert names >= tabled | tried


def test_every_configuration_is_used():
    """By the table, or by `set_autotune`; and what these name exists."""
    tabled = {(kernel, name) for (kernel, _), row in plan.TABLE.items() for name in row.values()}
    tried = {(kernel, name) for kernel, names in plan.TIMED.items() for name in names}
    assert tabled | tried == {(kernel, name) for kernel, configs in plan.CONFIGS.items() for name in configs}


def test_a_spill_is_found(quick):
    rows = [{"stack_bytes": "0", "spills": "0"}, {"stack_bytes": 8, "spills": 0}, {"stack_bytes": 0, "spills": 2}]
    assert spilled(rows) == rows[1:]
    beside = [row for row in quick.values() if not is_default(row)]
    assert {(row["kernel"], row["config"]) for row in beside} == set(compile_table.BESIDE.items())
    assert {row["target"] for row in beside} == {"sm_90"} and len(beside) == 6


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_pixel_addresses_are_64_bits_wide(kernel):
    """More than 2^31 elements of value: no offset into it or its gradient is a product that was taken in 32 bits."""
    # without rotated chunks, whose offsets are products of a row's number and less than D
    config = {"forward": "not rotated", "backward": "many"}[kernel]
    case = Case(kernel, "plain", "bf16", 32, config, "sm_90")
    names = [name for name, x in compile_table.launched(case).arguments.items() if isinstance(x, torch.Tensor)]
    module = python("-c", f"from benchmarks.compile_table import *; print(compile_case({case}).asm['ttir'])")
    pointers = re.findall(r"(%\w+): !tt\.ptr", re.search(r"tt\.func .*", module)[0])
    definitions = {
        name: (operation, re.findall(r"%[\w#]+", operands.split(" : ")[0]), operands)
        for name, operation, operands in re.findall(r"^ *(%\w+) = \"?([\w.]+)\"? (.*)$", module, re.MULTILINE)
    }

    def root(name):
        """The value behind splats and changes of shape."""
        operation, operands, _ = definitions.get(name, ("argument", [], ""))
        return root(operands[0]) if operation in ("tt.splat", "tt.expand_dims", "tt.broadcast") else (name, operation)

    def based_on(name):
        name, operation = root(name)
        return based_on(definitions[name][1][0]) if operation == "tt.addptr" else name

    def narrow_products(name):
        """Products in 32 bits below a sum or product in 64."""
        name, operation = root(name)
        if operation == "arith.extsi":
            inner, inner_operation = root(definitions[name][1][0])
            return [definitions[inner][2]] if inner_operation == "arith.muli" else []
        return [p for operand in definitions.get(name, ("", [], ""))[1] for p in narrow_products(operand)]

    by_name = dict(zip(names, pointers, strict=True))
    wanted = {by_name[name] for name in ("value_ptr", "grad_value_ptr") if name in by_name}
    offsets = [
        (operands[1], text)
        for operation, operands, text in definitions.values()
        if operation == "tt.addptr" and based_on(operands[0]) in wanted
    ]
    wide = [offset for offset, text in offsets if "i64" in text.rsplit(",", 1)[1]]
    assert len(wide) >= 3 * len(wanted)
    # what is left in 32 bits is a channel, known when compiling
    narrow = {root(offset)[1] for offset, _ in offsets if offset not in wide}
    assert narrow <= {"tt.make_range", "arith.constant", "arith.addi"}
    assert [product for offset in wide for product in narrow_products(offset)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "msda_triton" / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_are_written_for_the_oldest_triton(path):
    """What Triton 3.3 to 3.5 do not compile: min and max of constants, three conditions in one, a type's width."""
    kernels = ast.parse(path.read_text()).body
    kernels = [node for node in kernels if isinstance(node, ast.FunctionDef)]
    kernels = [kernel for kernel in kernels if any("triton.jit" in ast.unparse(d) for d in kernel.decorator_list)]
    assert bool(kernels) == (path.stem not in ("__init__", "plan", "tuning", "launch"))
    nodes = [node for kernel in kernels for node in ast.walk(kernel)]
    assert not [n.lineno for n in nodes if isinstance(n, ast.Name) and n.id in ("min", "max")]
    assert not [n.lineno for n in nodes if isinstance(n, ast.BoolOp) and len(n.values) > 2]
    assert not [n.lineno for n in nodes if isinstance(n, ast.Attribute) and n.attr == "primitive_bitwidth"]


LISTING = """
.text.kernel:
	//## File "/x/forward.py", line 26
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R3, desc[UR8][R28.64] ;
.L_x_0:
	//## File "/x/channels.py", line 156 inlined at "/x/forward.py", line 82
	//## File "/x/forward.py", line 82
        /*0020*/               @P3 LDG.E.128 R12, desc[UR8][R42.64] ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
	//## File "/x/forward.py", line 83
        /*0040*/                   FFMA R32, R40.reuse, R9, R32 ;
.L_x_2:
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/              @!UP0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP;
"""


def test_sass_is_parsed_and_weighted_by_rounds():
    code = parse_sass(LISTING)
    assert [opcode for opcode, _, _ in code] == ["LDC", "LDG.E", "LDG.E.128", "BRA", "FFMA", "BRA", "BRA", "EXIT"]
    assert [target for _, _, target in code] == [None, None, None, 5, None, 2, 1, None]
    assert code[2][1] == {("channels.py", 156), ("forward.py", 82)}
    assert code[4][1] == {("forward.py", 83)}
    # 8 rounds of the points' loop of four instructions, 4 of the levels' with two more, and two instructions outside
    loads = [0, 0, 128, 0, 0, 0, 0, 0]
    assert issued_instructions(code, loads, load_bits=8 * 128, levels=4) == 8 * 4 + 4 * 2 + 2
    with pytest.raises(ValueError, match="whole rounds"):
        issued_instructions(code, loads, load_bits=8 * 128 + 64, levels=4)
