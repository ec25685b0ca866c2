"""Compile every kernel for every target, without a GPU, and count what the compiler made of it.

    python -m benchmarks.compile_table                     # all, for every target; fails if what TABLE runs spills
    python -m benchmarks.compile_table --quick --csv benchmarks/results/compile_table.csv    # what is committed
    python -m benchmarks.compile_table --quick --target sm_90

One CSV row per kernel, variant, dtype, channels, configuration and target (`kernels/plan.py` has the configurations):
    plan                  what the configuration became: the kernel's constants, warps, and registers allowed
    registers             per thread (on AMD: VGPRs)
    stack_bytes           per thread, in local memory (on AMD: scratch)
    spills                instructions that store to or load from the stack (on AMD: spilled registers)
    shared_bytes          per program
    instructions          SASS instructions of the kernel, without padding
    instructions_per_row  issued by a warp per (query, head) row; predicated-off ones count, they take an issue slot
    value_load_bits       per thread, of one load from `value`
    red                   type of the reds that add to `grad_value`
    barriers              in the code
AMD rows have no instruction counts. Needs Triton; a process with TRITON_INTERPRET=1 cannot compile.
"""

import argparse
import csv
import functools
import inspect
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.workloads import WORKLOADS
from msda_triton.call import Call
from msda_triton.kernels import channels, launch
from msda_triton.kernels import plan as plans

CSV = Path(__file__).parent / "results" / "compile_table.csv"
CUDA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BUDGET_TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
OTHER_TARGETS = ["sm_75", "sm_86", "sm_89", "sm_120", "gfx90a", "gfx1100"]


_source, _first = inspect.getsourcelines(channels.load_rows.fn)
GRAD_OUT_LOADS = {("channels.py", _first + i) for i in range(len(_source))}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# compiled in every configuration on budget targets, and by --quick: (variant, dtype, channels per head)
MAIN = [("plain", "bf16", 32), ("plain", "fp16", 32), ("plain", "fp32", 32), ("box", "bf16", 32)]
# compiled by --quick too, for sm_90: the fewest instructions, which few lanes a row have
BESIDE = {"forward": "lanes of 16", "backward": "lanes of 16"}
# "point", "box": fused with reference points; "frozen": no grad_value; "list": points per level that differ
VARIANTS = {
    "forward": ["plain", "point", "box", "box_mask", "list"],
    "backward": ["plain", "point", "box", "box_mask", "frozen", "deterministic", "list"],
    "bound": ["plain", "point", "box", "box_mask", "list"],  # what a deterministic backward runs first
}
ENCODER = WORKLOADS["encoder"]


@dataclass(frozen=True)
class Case:
    """One kernel to compile; the leading columns of a row."""

    kernel: str
    variant: str
    dtype: str
    channels: int
    config: str  # by its name in `plan.CONFIGS`; of "bound" the only one, which is called so too
    target: str


def cases(quick: bool = False, targets: list[str] | None = None) -> Iterator[Case]:
    """What the table holds: for each target every kind of kernel in its default configurations.

    On budget targets the main kinds are there in every configuration. `quick` leaves what runs at the encoder's sizes
    of the most used kernels on these targets, and `BESIDE`.
    """
    for target in [] if quick else BUDGET_TARGETS + OTHER_TARGETS:
        if targets is None or target in targets:
            for kind in _kinds("bound"):
                yield Case("bound", *kind, "bound", target)
    for kernel, configs in plans.CONFIGS.items():
        for target in BUDGET_TARGETS if quick else BUDGET_TARGETS + OTHER_TARGETS:
            if targets is not None and target not in targets:
                continue
            kinds = _kinds(kernel)
            if quick:
                kinds = MAIN if target == "sm_90" else MAIN[::2]  # plain bf16 and fp32
            for kind in kinds:
                # of two names for one kernel, the first
                names = default_configs(kernel, *kind, target)[: 1 if quick else 2]
                if quick and target == "sm_90" and kind[0] == "plain":
                    names.append(BESIDE[kernel])
                if target in BUDGET_TARGETS and kind in MAIN and not quick:
                    names += [name for name in configs if name not in names]
                for name in {launch_of(kernel, *kind, name, target).plan: name for name in reversed(names)}.values():
                    yield Case(kernel, *kind, name, target)


def default_configs(kernel: str, variant: str, dtype: str, channels: int, target: str) -> list[str]:
    """What runs without timing at the encoder's sizes and, if that is another one, where there are few rows."""
    kind = _kind(kernel, variant, _call(variant, dtype, channels))
    names = [plans.choose(kind._replace(few=few), target) for few in (False, True)]
    return list(dict.fromkeys(names))


def _kinds(kernel: str) -> list[tuple[str, str, int]]:
    """(variant, dtype, channels per head) of all that is compiled."""
    dtypes = ("bf16", "fp16", "fp32")
    kinds = [(variant, dtype, 32) for variant in VARIANTS[kernel] for dtype in dtypes]
    return kinds + [("plain", "fp64", 32)] + [("plain", dtype, D) for D in (1, 30, 64) for dtype in dtypes]


@functools.cache
def _call(variant: str, dtype: str, channels: int) -> Call:
    """A call without storage, at the encoder's sizes."""
    B, S, Q, M, P, L = ENCODER.B, ENCODER.S, ENCODER.Q, ENCODER.M, ENCODER.P, len(ENCODER.levels)
    storage = DTYPES[dtype]
    fused = variant in ("point", "box", "box_mask")
    # locations are float32 unless value is float64; offsets come out of a projection in value's dtype
    wide = storage if fused else torch.promote_types(storage, torch.float32)
    with torch.device("meta"):
        return Call(
            value=torch.empty(B, S, M, channels, dtype=storage),
            spatial_shapes=None,
            level_start_index=None,
            locations=torch.empty(B, Q, M, L * P, 2, dtype=wide),
            weights=torch.empty(B, Q, M, L * P, dtype=storage),
            num_points=[P - 1, P, P, P + 1] if variant == "list" else [P] * L,
            reference_points=torch.empty(B, Q, L, 2 if variant == "point" else 4) if fused else None,
            value_mask=torch.empty(B, S, dtype=torch.bool) if variant == "box_mask" else None,
            level_sizes=[n for size in ENCODER.levels for n in size],
        )


def _kind(kernel: str, variant: str, call: Call) -> plans.Kind:
    return plans.kind_of(call, "forward" if kernel == "forward" else "backward", variant == "deterministic")


class Launch(NamedTuple):
    """What would be launched."""

    kernel: triton.JITFunction
    arguments: dict  # in the kernel's order, by name
    plan: plans.Plan


@functools.cache
def launch_of(kernel: str, variant: str, dtype: str, channels: int, config: str, target: str) -> Launch:
    """The launch of a kernel with a configuration, by its name, on a target."""
    call, launches = _call(variant, dtype, channels), []

    def run(function, call, arguments, plan):
        given = arguments | plan.constants
        launches.append(Launch(function, {name: given[name] for name in function.arg_names}, plan))

    kind = _kind(kernel, variant, call)
    plan = None if kernel == "bound" else plans.named_plan(config, kind, target)
    if kernel == "forward":
        launch.forward(call, plan, run=run)
        return launches[0]
    needs = [variant != "frozen", True, True, call.reference_points is not None]
    deterministic = kernel == "bound" or variant == "deterministic"
    grad_out = torch.empty(*call.weights.shape[:2], ENCODER.M * channels, dtype=DTYPES[dtype], device="meta")
    launch.backward(grad_out, call, needs, plan, deterministic=deterministic, run=run)
    return launches[0 if kernel == "bound" else -1]


def launched(case: Case) -> Launch:
    return launch_of(*asdict(case).values())


def compile_case(case: Case) -> CompiledKernel:
    """Compile as a launch would, see `triton.JITFunction.run`."""
    kernel, arguments, plan = launched(case)
    nvidia = case.target.startswith("sm_")
    signature, constants, hints = {}, {}, {}
    for i, param in enumerate(kernel.params):
        x = arguments[param.name]
        divisible = True
        if isinstance(x, torch.Tensor):
            signature[param.name] = "*" + triton.runtime.jit.type_canonicalisation_dict[str(x.dtype).split(".")[-1]]
        elif param.is_constexpr or x is None or (x == 1 and not param.do_not_specialize):
            signature[param.name] = "constexpr"
            constants[param.name] = x
            continue
        else:
            signature[param.name] = "i32" if x < 2**31 else "i64"
            divisible = x % 16 == 0 and not param.do_not_specialize
        if divisible:
            hints[(i,)] = [["tt.divisibility", 16]]
            # so does Triton for a tensor below 2 GiB on AMD
            if isinstance(x, torch.Tensor) and not nvidia and x.untyped_storage().size() < 2**31:
                hints[(i,)].append(["tt.pointer_range", 32])
    if nvidia:
        target = GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", case.target, 64 if case.target.startswith("gfx9") else 32)
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options=plan.options)


def measure(case: Case) -> dict:
    """Compile one case: its row of the table."""
    compiled = compile_case(case)
    count = nvidia_counts if case.target.startswith("sm_") else amd_counts
    return asdict(case) | {"plan": plan_text(case), "triton": triton.__version__} | count(case, compiled)


def plan_text(case: Case) -> str:
    """The constants that the kernel has of its plan, and what else the compiler is told."""
    _, arguments, plan = launched(case)
    numbers = {name: number for name, number in plan.constants.items() if name in arguments}
    numbers |= {"warps": plan.warps, "registers": plan.registers}
    return " ".join(f"{name}={number}" for name, number in numbers.items() if number is not None)


def nvidia_counts(case: Case, compiled: CompiledKernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = parse_sass(_run("nvdisasm", "--print-code", "--print-line-info-inline", cubin.name))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    opcodes = [op for op, _, _ in code]
    # value is read in the loops over points; in those over levels some loads of a size keep no line but the kernel's
    loops = _inner(_loops(code)) or {(0, len(code))}
    loads = [
        _load_bits(op) if op.startswith("LDG") and _of_value(frames) and any(a <= i < b for a, b in loops) else 0
        for i, (op, frames, _) in enumerate(code)
    ]
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": sum(op.startswith(("STL", "LDL")) for op in opcodes),
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(code),
        "instructions_per_row": _per_row(case, code, loads),
        "value_load_bits": _join(bits for bits in loads if bits),
        "red": _join(_sass_red(op) for op in opcodes if op.startswith(("RED", "ATOM"))),
        "barriers": sum(op.startswith("BAR") for op in opcodes),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([CUDA_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def parse_sass(listing: str) -> list[tuple[str, set[tuple[str, int]], int | None]]:
    """Opcode, source lines (file, line) with those it was inlined at, and index branched to, of every instruction."""
    code, labels, frames, after_code = [], {}, set(), False
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif "//## File" in line:
            found = {(Path(file).name, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', line)}
            frames = found if after_code else frames | found
            after_code = False
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line):
            after_code = True
            opcode, operands = instruction.groups()
            branch = re.search(r"`\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
            if opcode == "NOP" or (branch and labels.get(branch[1]) == len(code)):
                continue  # the code ends with a branch to itself and padding
            code.append((opcode, frames, branch and branch[1]))
    return [(opcode, frames, labels[label] if label else None) for opcode, frames, label in code]


def _of_value(frames: set[tuple[str, int]]) -> bool:
    """Whether a load with these source lines, its own and those that it was inlined at, is one of value.

    What is loaded besides is of a sample, a number or grad_out. Some loads have no line but the kernel's: see `_loops`.
    """
    return not frames & GRAD_OUT_LOADS and not any(file in ("sample.py", "dtypes.py") for file, _ in frames)


def _load_bits(opcode: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(bits[1]) if bits else 32


def _sass_red(opcode: str) -> str:
    kind = re.match(r"REDG?\.E\.ADD\.(F?)(\d+)(?:x(\d))?", opcode)
    if kind is None:
        return opcode  # an atomic that returns, or a loop around one: worth seeing in full
    return (f"v{kind[3]}." if kind[3] else "") + (f"f{kind[2]}" if kind[1] else f"u{kind[2]}")


def _loops(code: list) -> set[tuple[int, int]]:
    """First instruction, and the one after the last, of every loop; where threads wait for each other is none."""
    loops = {(to, i + 1) for i, (_, _, to) in enumerate(code) if to is not None and to <= i}
    return {(a, b) for a, b in loops if b - a > 8 or not any(op.startswith("VOTE") for op, _, _ in code[a:b])}


def _inner(loops: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those that have no other one within."""
    return {(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)}


def _per_row(case: Case, code: list, loads: list[int]) -> float | None:
    if case.kernel == "bound":
        return None  # it reads nothing of value, by which rounds are counted
    plan = launched(case).plan
    rows = plan.BLOCK_Q * plan.SHARE
    block_d = triton.next_power_of_2(case.channels)
    threads = 32 * plan.warps
    levels = len(ENCODER.levels)
    # what one thread loads of one corner of one sample in all its rows
    bits = max(rows * block_d * DTYPES[case.dtype].itemsize * 8 // threads, max(loads))
    issued = issued_instructions(code, loads, bits * 4 * levels * ENCODER.P // plan.SHARE, levels)
    return None if issued is None else round(issued * plan.warps / plan.BLOCK_Q, 1)


def issued_instructions(code: list, loads: list[int], load_bits: int, levels: int) -> float | None:
    """Instructions that one warp issues, with all branches but those of loops falling through.

    The loop over points is the innermost one, and takes as many rounds as it needs for `load_bits` bits per thread;
    what surrounds it is the loop over `levels`. None if points are spread over several loops (a remainder after
    unrolling, whose rounds are known at run time only).
    """
    loops = _loops(code)
    inner = _inner(loops)
    if len(inner) > 1 and all(any(loads[a:b]) for a, b in inner):
        return None
    rounds = [1.0] * len(code)
    for a, b in sorted(loops, key=lambda loop: loop[0] - loop[1]):
        rounds[a:b] = [load_bits / max(sum(loads[a:b]), 1) if (a, b) in inner else levels] * (b - a)
    loaded = sum(bits * trips for bits, trips in zip(loads, rounds, strict=True))
    if loaded != load_bits or any(trips != 1 and trips % levels for trips in rounds):
        raise ValueError(f"expected {load_bits} bits loaded from value, in whole rounds of loops {loops}, got {loaded}")
    return sum(rounds)


def amd_counts(case: Case, compiled: CompiledKernel) -> dict:
    code = compiled.asm["amdgcn"]
    loads, of_value = [], False
    for line in code.splitlines():
        if re.match(r"\s*\.loc\s", line):
            frames = {(file, int(number)) for file, number in re.findall(r"([\w.]+):(\d+):\d+", line)}
            of_value = _of_value(frames) and "channels.py" in {file for file, _ in frames}
        elif of_value and (load := re.match(r"\s*(?:global|buffer|flat)_load_(\w+)", line)):
            loads.append(_amd_bits(load[1]))
    # one value per kernel in its metadata, and no function but the kernel
    number = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    reds = re.findall(r"^\s*(?:global|buffer|flat)_atomic_(\w+)", code, re.MULTILINE)
    return {
        "registers": number["vgpr_count"],
        "stack_bytes": number["private_segment_fixed_size"],
        "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "shared_bytes": compiled.metadata.shared,
        "instructions": None,
        "instructions_per_row": None,
        "value_load_bits": _join(loads),
        "red": _join(_amd_red(red) for red in reds),
        "barriers": len(re.findall(r"^\s*s_barrier", code, re.MULTILINE)),
    }


def _amd_bits(load: str) -> int:
    if words := re.match(r"dword(?:x(\d))?", load):
        return 32 * int(words[1] or 1)
    if bits := re.search(r"[bui](8|16|32|64|96|128)$", load):
        return int(bits[1])
    return 8 if "byte" in load else 16


def _amd_red(red: str) -> str:
    names = {"add_f32": "f32", "add_f64": "f64", "add_x2": "u64", "add_u64": "u64"}
    return names.get(red, red)


def _join(kinds) -> str:
    return " ".join(str(kind) for kind in sorted(set(kinds)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="where to write the table (default: nowhere)")
    parser.add_argument("--target", nargs="+", choices=BUDGET_TARGETS + OTHER_TARGETS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="default configurations of the most used kernels only")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels cannot be compiled: expected TRITON_INTERPRET=0 or unset, got 1")

    todo = list(cases(args.quick, args.target))
    rows = []
    # Triton's cache returns kernels with outdated line numbers when only a helper's place in its file has changed
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"], multiprocessing.Pool(args.jobs) as pool:
        for row in pool.imap(measure, todo):
            rows.append(row)
            print(f"[{len(rows)}/{len(todo)}]", *row.values(), flush=True)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    found = spilled(rows)
    shipped = [row for row in found if is_default(row)]
    for row in found:
        print("spills:" if row in shipped else "a candidate that spills:", *row.values())
    targets = len({row["target"] for row in rows})
    print(f"{len(rows)} kernels, {targets} targets; {len(shipped)} of what TABLE runs spill, {len(found)} of all")
    return min(len(shipped), 1)


def spilled(rows: list[dict]) -> list[dict]:
    """Those that keep something in local memory."""
    return [row for row in rows if int(row["stack_bytes"]) or int(row["spills"])]


def is_default(row: dict) -> bool:
    """Whether a row's configuration is what runs untimed; the others are what `set_autotune` tries."""
    if row["kernel"] == "bound":
        return True
    kind = row["kernel"], row["variant"], row["dtype"], int(row["channels"]), row["target"]
    return row["config"] in default_configs(*kind)


if __name__ == "__main__":
    raise SystemExit(main())
