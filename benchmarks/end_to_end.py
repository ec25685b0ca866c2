"""Images per second of Hugging Face models, patched and not: Deformable DETR, RT-DETR, Mask2Former.

    python -m benchmarks.end_to_end --out end_to_end.csv --limit 480     # a GPU
    TRITON_INTERPRET=1 python -m benchmarks.end_to_end --out dry.csv --limit 60 --dry-run    # tiny models on a CPU

Inference with random weights, at the sizes of the published models; nothing is downloaded. Deformable DETR and RT-DETR
have a ResNet-50, Mask2Former a Swin-T. bfloat16 means that model and images are converted. "compiled" is
`torch.compile(dynamic=False)`, where graphs may break.

Check. The reference is the unpatched eager model, whose attention gets its operands in float32. TF32 is off. The error
is the largest of the relative RMS errors of the outputs. An output of queries has the median error of its queries. Each
is compared with the query that starts nearest to it, because a few of those selected by close scores may differ. The
reference of a compiled patched model is the compiled unpatched one: in bfloat16 eager code rounds elsewhere, and
RT-DETR then selects other queries. A patched model whose error exceeds its limit in `LIMITS` is "wrong" and gets no
time. The unpatched model's error is only reported: in bfloat16 it rounds coordinates once more.

Time. Blocks of calls between two synchronisations, TF32 as PyTorch has it by default, median over the blocks. Eager
models take turns. Compiled ones come one after the other, as each must be compiled under its patch. `ratio` is how many
times faster the patched one is. `compile_s` is the first call. `peak_MiB` includes the weights. No case starts after
--limit, but one that is compiled may run on for minutes. The exit code is 1 if a row is not ok.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import msda_triton
from benchmarks.run import environment

LIMITS = {  # of the error; the last reference has the coordinates of an unpatched bfloat16 model
    ("eager", "float32"): 1e-3, ("eager", "bfloat16"): 0.1, ("compiled", "float32"): 1e-3, ("compiled", "bfloat16"): 0.3
}  # fmt: skip
FIELDS = (
    "model", "image", "batch", "dtype", "converted", "mode", "patched", "images_per_s", "seconds", "peak_MiB", "ratio",
    "error", "compile_s", "status",
)  # fmt: skip


class Model(NamedTuple):
    size: tuple[int, int]  # of the images
    features: tuple[str, ...]  # outputs to compare, of all pixels
    queries: tuple[str, ...]  # and of queries [B, Q, ...]


MODELS = {
    "deformable_detr": Model((800, 1333), ("encoder_last_hidden_state",), ("logits", "pred_boxes")),
    "rt_detr": Model((640, 640), (), ("logits", "pred_boxes")),
    "mask2former": Model(
        (800, 1344), ("pixel_decoder_last_hidden_state",), ("class_queries_logits", "masks_queries_logits")
    ),
}


MODES = ("eager", "compiled")


class Case(NamedTuple):
    model: str
    batch: int
    dtype: str
    mode: str


class Effort(NamedTuple):
    tiny: bool
    rounds: int  # blocks for each model
    block_s: float
    compiler: str  # of torch.compile


FULL, DRY = Effort(False, 5, 0.2, "inductor"), Effort(True, 1, 0.0, "aot_eager")  # inductor takes a CPU minutes


def cases(effort: Effort, models: Sequence[str], modes: Sequence[str]) -> list[Case]:
    """The most informative first, and those that must be compiled last."""
    sizes = [(1, "float32"), (8, "bfloat16"), (1, "bfloat16"), (8, "float32")]
    if effort.tiny:
        sizes = [(2, "float32"), (2, "bfloat16")]
    eager = [Case(name, *size, "eager") for size in sizes for name in models]
    compiled = [Case(name, *size, "compiled") for size in sizes for name in models]
    return [case for case in eager + compiled[: 1 if effort.tiny else None] if case.mode in modes]


@functools.cache
def build(name: str, tiny: bool) -> nn.Module:
    """The model on the CPU. Queries, heads and samples differ as in a trained one, and no layer's output vanishes."""
    import transformers as hf

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if tiny:
        from tests import hf_models

        model = getattr(hf_models, name)()
    elif name == "deformable_detr":
        backbone = hf.ResNetConfig(out_features=stages[1:])
        model = hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(backbone_config=backbone, num_labels=91))
    elif name == "rt_detr":
        model = hf.RTDetrForObjectDetection(hf.RTDetrConfig(num_labels=80))
    else:
        backbone = hf.SwinConfig(out_features=stages)
        config = hf.Mask2FormerConfig(backbone_config=backbone, num_labels=80)
        model = hf.Mask2FormerForUniversalSegmentation(config)
    model.eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight += 0.05 * torch.randn_like(module.weight)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)  # RT-DETR starts from about 0
                module.momentum = None  # the statistics become those of the next batch
                module.train()
        model(pixel_values=torch.randn(1, 3, 256, 256))
    return model.eval()


def modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


def float32_attention(name: str) -> contextlib.AbstractContextManager:
    """Within it transformers' own attention computes in float32: a model has no argument for that."""
    module = importlib.import_module(modeling(name))
    owner, attribute = module, "multi_scale_deformable_attention"
    if not hasattr(owner, attribute):
        owner, attribute = module.MultiScaleDeformableAttention, "forward"
    original = getattr(owner, attribute)

    def attend(*operands):
        floats = [isinstance(x, Tensor) and x.is_floating_point() for x in operands]
        wide = [x.float() if is_float else x for x, is_float in zip(operands, floats, strict=True)]
        return original(*wide).to(operands[floats.index(True)].dtype)

    return mock.patch.object(owner, attribute, attend)


@contextlib.contextmanager
def patching(name: str, patched: bool) -> Iterator[None]:
    with msda_triton.patch(modeling(name)) if patched else contextlib.nullcontext() as patch:
        if patched and not all(row.replaced for row in patch.rows):
            raise RuntimeError(f"not patched: {patch}")
        yield


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # that of matrices is off by default
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compared(model: Model, output: dict) -> dict[str, Tensor]:
    """What `error` needs of a model's output, in float32 on the CPU."""
    names = [*model.features, *model.queries, *(["init_reference_points"] if "init_reference_points" in output else [])]
    return {name: output[name].float().cpu() for name in names}


def error(model: Model, got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative RMS error, beside the standard deviation; NaN if anything is."""
    errors = []
    for name in (*model.features, *model.queries):
        x, y = got[name].flatten(2), exact[name].flatten(2)
        if name in model.queries and "init_reference_points" in exact:
            starts = [values["init_reference_points"].sigmoid() for values in (exact, got)]
            nearest = torch.cdist(*starts).argmin(2)
            x = x.gather(1, nearest[:, :, None].expand_as(y))
        squares = (x - y).square().mean(2) / y.var()
        errors.append(squares.median().sqrt() if name in model.queries else squares.mean().sqrt())
    return torch.stack(errors).max().item()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], dict], device: str, calls: int) -> float:
    """Of one call, in a block of so many."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def failed(problem: Exception) -> str:
    return f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def first_calls(
    case: Case, patched: bool, call: Callable[[], dict], reference: dict[str, Tensor], device: str
) -> tuple[dict, dict[str, Tensor]]:
    """The row of a model before it is timed: whether it is right, and the memory of a later call; and its output."""
    row, model, got = {"patched": patched, "status": "ok"}, MODELS[case.model], reference
    try:
        with patching(case.model, patched), without_tf32():
            start = time.perf_counter()
            output = call()
            synchronize(device)
            if case.mode == "compiled":
                row["compile_s"] = round(time.perf_counter() - start, 1)
            got = compared(model, output)
            off, limit = error(model, got, reference), LIMITS[case.mode, case.dtype]
            row["error"] = f"{off:.1e}"
            if patched and not off <= limit:
                row["status"] = f"wrong: error {off:.1e}, limit {limit:g}"
            del output
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                row["peak_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    except Exception as problem:
        row["status"] = failed(problem)
    return row, got


def measure(case: Case, device: str, effort: Effort) -> Iterator[dict]:
    """The rows of the unpatched and of the patched model, each once it is known."""
    dtype = getattr(torch, case.dtype)
    model = copy.deepcopy(build(case.model, effort.tiny)).to(device, dtype)
    size = (64, 96) if effort.tiny else MODELS[case.model].size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *size, generator=generator).to(device, dtype)
    with float32_attention(case.model), without_tf32():
        reference = compared(MODELS[case.model], model(pixel_values=images))
    found = case._asdict() | {"image": f"{size[0]}x{size[1]}"}
    found["converted"] = "" if case.dtype == "float32" else "model and images"
    unpatched = []
    for together in [(False, True)] if case.mode == "eager" else [(False,), (True,)]:
        torch._dynamo.reset()
        run = model if case.mode == "eager" else torch.compile(model, dynamic=False, backend=effort.compiler)
        call = functools.partial(run, pixel_values=images)
        rows, outputs = zip(*(first_calls(case, patched, call, reference, device) for patched in together), strict=True)
        if all(x.isfinite().all() for x in outputs[0].values()):  # grid_sample in bfloat16 makes NaN on some CPUs
            reference = outputs[0]
        times, calls = {row["patched"]: [] for row in rows if row["status"] == "ok"}, {}
        for i in range(effort.rounds + 1):
            for patched in times:
                with patching(case.model, patched):
                    if i:
                        times[patched].append(seconds(call, device, calls[patched]))
                    else:  # warms up, and finds out how long a block is
                        seconds(call, device, 2)
                        calls[patched] = max(1, math.ceil(effort.block_s / seconds(call, device, 1)))
        unpatched = times.get(False) or unpatched
        for row in rows:
            mine = times.get(row["patched"])
            if mine:
                median = statistics.median(mine)
                row |= {"seconds": f"{median:.4g}", "images_per_s": f"{case.batch / median:.4g}"}
                if row["patched"] and unpatched:
                    ratios = [b / a for a, b in zip(mine, unpatched, strict=True)]
                    row["ratio"] = round(statistics.median(ratios), 3)
            yield found | row


def guarded(case: Case, device: str, effort: Effort) -> Iterator[dict]:
    """The rows of `measure`, and one more if it raises."""
    try:
        with torch.no_grad():
            yield from measure(case, device, effort)
    except Exception as problem:
        yield case._asdict() | {"status": failed(problem)}
    torch._dynamo.reset()  # it holds compiled models
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of the device nothing runs: each case's row says so
            torch.cuda.empty_cache()


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="a row is written once it is known")
    parser.add_argument("--limit", default="480", metavar="SECONDS", help="after which no case starts (%(default)s)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="(default: both)")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU; times mean nothing")
    args = parser.parse_args()
    try:
        limit = positive(args.limit)
    except ValueError:
        parser.error(f"--limit: expected a number of seconds above 0, got {args.limit!r}")
    if args.out.suffix != ".csv" or args.out.is_dir():
        parser.error(f"--out: expected a file that ends in .csv, got {str(args.out)!r}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("expected a GPU, or --dry-run; torch finds none")

    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    end = time.monotonic() + limit
    device, effort = ("cpu", DRY) if args.dry_run else ("cuda", FULL)
    if args.dry_run:
        torch.set_num_threads(1)
    place = environment(device) | {"transformers": metadata.version("transformers")}
    print(", ".join(f"{key} {value}" for key, value in place.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    good = True
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *place])
        writer.writeheader()
        file.flush()
        for case in cases(effort, args.model, args.mode):
            if time.monotonic() > end:
                print(f"--limit of {limit:g} s reached: {' '.join(map(str, case))} and what follows are left out")
                break
            for row in guarded(case, device, effort):
                writer.writerow(row | place)
                file.flush()
                good &= row["status"] == "ok"
                shown = {key: row[key] for key in FIELDS if key in row and key not in ("image", "converted")}
                print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
