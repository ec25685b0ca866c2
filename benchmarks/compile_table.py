"""Compile every kernel for every target, without a GPU, and count what the compiler made of it.

    python -m benchmarks.compile_table                     # all, for every target; fails if what TABLE runs spills
    python -m benchmarks.compile_table --quick --csv benchmarks/results/compile_table.csv    # what is committed
    python -m benchmarks.compile_table --quick --target sm_90

One CSV row per kernel, variant, dtype, channels, configuration and target:
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
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.workloads import WORKLOADS
from msda_triton import backward, bilinear, fixed_point, forward, tuning

CSV = Path(__file__).parent / "results" / "compile_table.csv"
CUDA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BUDGET_TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
OTHER_TARGETS = ["sm_75", "sm_86", "sm_89", "sm_120", "gfx90a", "gfx1100"]
# a load is one of `value` if its line is one of these, or was inlined at one (which Triton 3.6 does not tell)
VALUE_LOADS = {
    (Path(module.__file__).name, number)
    for module in (bilinear, forward, backward)
    for number, line in enumerate(inspect.getsource(module).splitlines(), 1)
    if ("load_pixel(" in line or "tl.load(ptrs" in line) and "grad_out_ptr" not in line
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# compiled in every configuration and for every target, and by --quick: (variant, dtype, channels per head)
MAIN = [("plain", "bf16", 32), ("plain", "fp16", 32), ("plain", "fp32", 32), ("box", "bf16", 32)]
# "point", "box": fused with reference points; "frozen": no grad_value; "list": points per level that differ
VARIANTS = {
    "forward": ["plain", "point", "box", "box_mask", "list"],
    "backward": ["plain", "point", "box", "box_mask", "frozen", "deterministic", "list"],
    "bound": ["plain", "point", "box", "box_mask", "list"],  # what a deterministic backward runs first
}
BOUND_CONFIG = f"BLOCK_Q={fixed_point.ROWS}"
ENCODER = WORKLOADS["encoder"]


@dataclass(frozen=True)
class Case:
    """One kernel to compile; the leading columns of a row."""

    kernel: str
    variant: str
    dtype: str
    channels: int
    config: str
    warps: int
    target: str


def cases(quick: bool = False, targets: list[str] | None = None) -> Iterator[Case]:
    """What the table holds: for each target every kind of kernel in its default configurations.

    On budget targets the main kinds are there in every configuration. `quick` leaves what runs
    at the encoder's sizes of the most used kernels on these targets.
    """
    for target in [] if quick else BUDGET_TARGETS + OTHER_TARGETS:
        if targets is None or target in targets:
            for kind in _kinds("bound"):
                yield Case("bound", *kind, BOUND_CONFIG, 4, target)
    for kernel, configs in tuning.CONFIGS.items():
        for target in BUDGET_TARGETS if quick else BUDGET_TARGETS + OTHER_TARGETS:
            if targets is not None and target not in targets:
                continue
            kinds = _kinds(kernel)
            if quick:
                kinds = MAIN if target == "sm_90" else MAIN[::2]  # plain bf16 and fp32
            for kind in kinds:
                tried = configs if target in BUDGET_TARGETS and kind in MAIN and not quick else []
                defaults = default_configs(kernel, *kind, target)
                for config in [*tried, *(config for config in defaults[: 1 if quick else 2] if config not in tried)]:
                    yield Case(kernel, *kind, config_name(config), config.num_warps, target)


def config_name(config: triton.Config) -> str:
    numbers = config.kwargs | ({"maxnreg": config.maxnreg} if config.maxnreg else {})
    return " ".join(f"{key}={number}" for key, number in numbers.items())


def default_configs(kernel: str, variant: str, dtype: str, channels: int, target: str) -> list[triton.Config]:
    """What runs without timing at the encoder's sizes and, if that is another one, where there are few rows."""
    arguments = launch_arguments(kernel, variant, dtype, channels)
    many = ENCODER.B * ENCODER.Q * ENCODER.M
    configs = [tuning.choose(kernel, tuning.call_class(kernel, rows, arguments), target) for rows in (many, 1)]
    return configs[:1] if configs[0] is configs[1] else configs


def _kinds(kernel: str) -> list[tuple[str, str, int]]:
    """(variant, dtype, channels per head) of all that is compiled."""
    dtypes = ("bf16", "fp16", "fp32")
    kinds = [(variant, dtype, 32) for variant in VARIANTS[kernel] for dtype in dtypes]
    return kinds + [("plain", "fp64", 32)] + [("plain", dtype, D) for D in (1, 30, 64) for dtype in dtypes]


@functools.cache
def launch_arguments(kernel: str, variant: str, dtype: str, channels: int) -> dict:
    """What the launcher hands to its kernel, by name, for tensors without storage."""
    B, S, Q, M, P, L = ENCODER.B, ENCODER.S, ENCODER.Q, ENCODER.M, ENCODER.P, len(ENCODER.levels)
    with torch.device("meta"):
        storage = DTYPES[dtype]
        fused = variant in ("point", "box", "box_mask")
        value = torch.empty(B, S, M, channels, dtype=storage)
        # locations are float32 unless value is float64; offsets come out of a projection in value's dtype
        wide = storage if fused else torch.promote_types(storage, torch.float32)
        inputs = (
            value,
            torch.empty(L, 2, dtype=torch.int64),
            None,
            torch.empty(B, Q, M, L * P, 2, dtype=wide),
            torch.empty(B, Q, M, L * P, dtype=storage),
            [P - 1, P, P, P + 1] if variant == "list" else [P] * L,
            torch.empty(B, Q, L, 2 if variant == "point" else 4) if fused else None,
            torch.empty(B, S, dtype=torch.bool) if variant == "box_mask" else None,
            [n for size in ENCODER.levels for n in size],
        )
        grad_out = torch.empty(B, Q, M * channels, dtype=storage)
    with (
        mock.patch.object(forward if kernel == "forward" else backward, "launch") as launch,
        mock.patch.object(fixed_point, "launch_bound") as launch_bound,
    ):
        if kernel == "forward":
            forward.launch_forward(*inputs)
        else:
            torch.use_deterministic_algorithms(variant == "deterministic" or kernel == "bound")
            backward.launch_backward(grad_out, *inputs, [variant != "frozen", True, True, fused])
            torch.use_deterministic_algorithms(False)
    return (launch_bound if kernel == "bound" else launch).call_args.args[-1]


def compile_case(case: Case) -> CompiledKernel:
    """Compile as a launch of `launch_arguments` would, see `triton.JITFunction.run`."""
    kernels = {"forward": forward._msda_fwd_kernel, "backward": backward._msda_bwd_kernel}
    kernel = (kernels | {"bound": fixed_point._msda_bound_kernel})[case.kernel]
    numbers = _numbers(case.config)
    options = {"num_warps": case.warps, "num_stages": 1}
    if "maxnreg" in numbers:
        options["maxnreg"] = numbers.pop("maxnreg")
    arguments = launch_arguments(case.kernel, case.variant, case.dtype, case.channels) | numbers
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
    return triton.compile(source, target=target, options=options)


def _numbers(config: str) -> dict[str, int]:
    return {key: int(number) for key, number in (pair.split("=") for pair in config.split())}


def measure(case: Case) -> dict:
    """Compile one case: its row of the table."""
    compiled = compile_case(case)
    count = nvidia_counts if case.target.startswith("sm_") else amd_counts
    return asdict(case) | {"triton": triton.__version__} | count(case, compiled)


def nvidia_counts(case: Case, compiled: CompiledKernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = parse_sass(_run("nvdisasm", "--print-code", "--print-line-info-inline", cubin.name))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    opcodes = [op for op, _, _ in code]
    loops = _loops(code) or {(0, len(code))}
    loads = [
        _load_bits(op) if op.startswith("LDG") and frames & VALUE_LOADS and any(a <= i < b for a, b in loops) else 0
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


def _per_row(case: Case, code: list, loads: list[int]) -> float | None:
    if case.kernel == "bound":
        return None  # it reads nothing of value, by which rounds are counted
    block_d = triton.next_power_of_2(case.channels)
    arguments = launch_arguments(case.kernel, case.variant, case.dtype, case.channels)
    tile = block_d * (1 if arguments["VEC"] else 8)
    numbers = _numbers(case.config)
    split = numbers.get("SPLIT", 1)
    share = split if arguments["P"] and arguments["P"] % split == 0 else 1
    rows = min(max(numbers["TILE"] // tile, share), 128)
    threads = 32 * case.warps
    levels = len(ENCODER.levels)
    # what one thread loads of one corner of one sample in all its rows
    bits = max(rows * block_d * DTYPES[case.dtype].itemsize * 8 // threads, max(loads))
    issued = issued_instructions(code, loads, bits * 4 * levels * ENCODER.P // share, levels)
    return None if issued is None else round(issued * case.warps * share / rows, 1)


def issued_instructions(code: list, loads: list[int], load_bits: int, levels: int) -> float | None:
    """Instructions that one warp issues, with all branches but those of loops falling through.

    The loop over points is the innermost one, and takes as many rounds as it needs for `load_bits` bits per thread;
    what surrounds it is the loop over `levels`. None if points are spread over several loops (a remainder after
    unrolling, whose rounds are known at run time only).
    """
    loops = _loops(code)
    inner = {(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)}
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
            of_value = bool(frames & VALUE_LOADS)
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
    names = [(config_name(config), config.num_warps) for config in default_configs(*kind)]
    return (row["config"], int(row["warps"])) in names


if __name__ == "__main__":
    raise SystemExit(main())
