"""Time and memory of the whole detector.

    python -m benchmarks.detector_step                   # a CPU: forward and backward, against transformers
    python -m benchmarks.detector_step --device cuda     # a GPU: images/s of a training step, against the fallback

On a CPU our model with the eager and with the compiled fallback and transformers' model, all with the same weights and
the same layers frozen, take turns in one process: one image, forward and backward of the last layer's logits and boxes,
dropout on. The ratios are medians over the rounds. Peak memory is that of a process of its own for each, above what it
held before its first step. On a GPU a step is forward, loss, backward, clipping and AdamW on random images and boxes.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from benchmarks.run import environment
from detr.config import Config
from detr.learner import param_groups
from detr.losses import Criterion
from detr.model import build_model
from detr.presets import PRESETS, preset
from detr.weights import export_weights
from msda_triton import MSDeformAttn

NAMES = [str(label) for label in range(91)]
BACKENDS = ("torch", "inductor")  # of our model on a CPU
AMP = {"float32": None, "bfloat16": torch.bfloat16}


class ResNetLikeTimm(nn.Module):
    """torchvision's ResNet in the place of timm's: the same tensors, `channels`, and the model below `_backbone`."""

    def __init__(self, config):
        super().__init__()
        backbone = config.backbone_config
        body = torchvision.models.get_model(
            backbone.backbone,
            replace_stride_with_dilation=[False, False, backbone.to_dict().get("output_stride") == 16],
        )
        stages = (body.layer2, body.layer3, body.layer4)[-len(backbone.out_indices[-3:]) :]
        self.channels = [list(stage.parameters())[-1].numel() for stage in stages]
        self._backbone = IntermediateLayerGetter(body, {f"layer{i}": str(i) for i in backbone.out_indices[-3:]})
        self._backbone.register_forward_hook(lambda module, args, output: list(output.values()))


def our_model(config: Config) -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    return build_model(config, len(NAMES)).train()


def their_model(config: Config) -> nn.Module:
    """transformers' model with the weights of `our_model`, and the same layers of it frozen."""
    from transformers import DeformableDetrForObjectDetection
    from transformers.models.deformable_detr import modeling_deformable_detr

    with tempfile.TemporaryDirectory() as folder:
        export_weights(our_model(config), folder, "hf", NAMES)
        original = modeling_deformable_detr.load_backbone
        modeling_deformable_detr.load_backbone = ResNetLikeTimm
        try:
            model = DeformableDetrForObjectDetection.from_pretrained(folder)
        finally:
            modeling_deformable_detr.load_backbone = original
    for name, parameter in model.named_parameters():
        if "backbone" in name and not any(f"layer{stage}." in name for stage in (2, 3, 4)):
            parameter.requires_grad_(False)
    return model.train()


def set_backend(model: nn.Module, backend: str) -> None:
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.backend = backend


def cpu_step(name: str, config: Config) -> Callable[[Tensor], None]:
    """Forward and backward of "transformers", or of our model with the backend of this name."""
    if name == "transformers":
        model = their_model(config)

        def predict(image: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(pixel_values=image, pixel_mask=torch.ones(1, *image.shape[2:], dtype=torch.int64))
            return outputs.logits, outputs.pred_boxes
    else:
        model = our_model(config)
        set_backend(model, name)

        def predict(image: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(image, torch.zeros(1, *image.shape[2:], dtype=torch.bool))
            return outputs["logits"], outputs["boxes"]

    def step(image: Tensor) -> None:
        model.zero_grad()
        logits, boxes = predict(image)
        (logits.mean() + boxes.mean()).backward()

    return step


def compare_times(config: Config, size: tuple[int, int], rounds: int) -> dict[str, tuple[float, float]]:
    """(seconds, ratio to transformers) of a step, medians; after one step of each that does not count."""
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    steps = {name: cpu_step(name, config) for name in ("transformers", *BACKENDS)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(image)
            if i:
                times[name].append(time.perf_counter() - start)
    theirs = times["transformers"]
    return {
        name: (statistics.median(mine), statistics.median(a / b for a, b in zip(mine, theirs, strict=True)))
        for name, mine in times.items()
    }


def peak_memory(name: str, config: Config, size: tuple[int, int]) -> float:
    """MiB that two steps add to this process at their peak."""
    step = cpu_step(name, config)
    before = _memory("VmRSS")
    for seed in range(2):
        step(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)))
    return _memory("VmHWM") - before


def _memory(name: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM); ru_maxrss would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


def training_step(config: Config, size: tuple[int, int], batch: int, backend: str, dtype: str, steps: int) -> dict:
    """images/s and peak MiB of training steps on a GPU; ours is backend "triton", the fallback "torch"."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = our_model(config).to(device)
    set_backend(model, backend)
    optimizer = torch.optim.AdamW(param_groups(model, config), lr=config.lr, fused=True)
    criterion = Criterion(config, len(NAMES))
    generator = torch.Generator(device).manual_seed(1)
    images = torch.randn(batch, 3, *size, device=device, generator=generator)
    mask = torch.zeros(batch, *size, dtype=torch.bool, device=device)
    targets = [
        {
            "labels": torch.randint(len(NAMES), (10,), device=device, generator=generator),
            "boxes": torch.rand(10, 4, device=device, generator=generator) * 0.3 + 0.2,
        }
        for _ in range(batch)
    ]
    times = []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", AMP[dtype], enabled=AMP[dtype] is not None):
            outputs = model(images, mask)
        optimizer.zero_grad()
        criterion(outputs, targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[3:])
    memory = torch.cuda.max_memory_allocated() / 2**20
    return {"images_per_s": round(batch / seconds, 3), "seconds": round(seconds, 4), "peak_MiB": round(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--preset", choices=PRESETS, default="deformable_detr_r50", metavar="NAME", help="(%(default)s)"
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (CPU 480 640, GPU 800 1333)")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step, GPU (%(default)s)")
    parser.add_argument("--rounds", type=int, help="steps that count (CPU 3, GPU 10)")
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV")
    parser.add_argument("--memory-of", choices=("transformers", *BACKENDS), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as torch finds no GPU; got cuda")
    config = preset(args.preset)
    size = tuple(args.size or ((480, 640) if args.device == "cpu" else (800, 1333)))
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, config, size)))
        return
    place = environment(args.device)
    print(", ".join(f"{key} {value}" for key, value in place.items()), flush=True)
    case = {"preset": config.name, "size": f"{size[0]}x{size[1]}"}
    rows = []
    if args.device == "cuda":
        for backend in ("triton", "torch"):
            for dtype in AMP:
                found = training_step(config, size, args.batch, backend, dtype, args.rounds or 10)
                rows.append(case | {"batch": args.batch, "dtype": dtype, "backend": backend} | found)
                print(rows[-1], flush=True)
                write(args.out, rows, place)  # an early end loses little
    else:
        times = compare_times(config, size, args.rounds or 3)
        own = [sys.executable, "-m", "benchmarks.detector_step", "--device", "cpu", "--preset", args.preset]
        memory = {}
        for name in times:
            command = [*own, "--size", *map(str, size), "--memory-of", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[name] = json.loads(done.stdout.splitlines()[-1])
        for name, (seconds, ratio) in times.items():
            share = memory[name] / memory["transformers"]
            rows.append(case | {"model": name, "seconds": round(seconds, 3), "ratio": round(ratio, 3)})
            rows[-1] |= {"peak_MiB": round(memory[name]), "peak_ratio": round(share, 3)}
            print(f"{name:14}{seconds:8.2f} s {ratio:6.2f}x  {memory[name]:8.0f} MiB {share:6.2f}x", flush=True)
        write(args.out, rows, place)


def write(path: Path | None, rows: list[dict], place: dict) -> None:
    """The rows as CSV, if there is a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *place], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | place for row in rows)


if __name__ == "__main__":
    main()
