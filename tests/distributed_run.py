"""What tests/test_detr_distributed.py runs in two processes: `torchrun distributed_run.py DATA OUT`."""

import itertools
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from detr import cli, distributed, load
from detr.data import validation_loader
from detr.evaluate import detect
from detr.learner import Step
from detr.pace import set_pace
from detr.presets import preset
from detr.run import Run
from detr.splits import load_split

CPU = torch.device("cpu")
# small rates, because Adam makes steps of full size from the rounding of gradients that are zero
CONFIG = preset(
    "tiny",
    two_stage=False,
    backbone="tiny",  # whose norms are of one image
    loss_ce=1.0,
    **{"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "image_size": 64, "max_size": 64, "batch_size": 4},
    **{"lr": 1e-4, "lr_backbone": 1e-4, "steps": 5, "warmup_steps": 0, "eval_steps": 5, "ema": 0.5},
)

# what each run that is held against one process changes
RUNS = {
    "focal": {},
    "accumulated": {"accumulate": 2},
    "softmax": {"class_loss": "softmax"},
    "last_layer_only": {"aux_loss": False},
    "two_stage": {"two_stage": True, "denoising": 6},
}
NORMED = {"backbone": "small", "two_stage": True}


def take(run: Run, steps: int, change=None) -> list[float]:
    """Losses of the next steps; `change` may alter the targets of a batch before."""
    losses = []
    for batches in itertools.islice(run.batches(), steps):
        if change:
            change([target for _, _, targets in batches for target in targets])
        losses.append(run.step(batches).loss)
    return losses


def without_objects(targets: list[dict]) -> None:
    for target in targets:
        target |= {name: target[name][:0] for name in ("labels", "boxes", "noised") if name in target}


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.join(CPU)
    rank = distributed.rank()
    train_split = load_split(data, "train")
    val_split = load_split(data, "val", train_split.categories)
    found = {}
    for name, changes in RUNS.items():
        run = Run(replace(CONFIG, **changes), train_split, CPU)
        found[name] = take(run, 5), run.sums["grad_norm"], run.state()["model"], run.state()["ema"]

    # running statistics: of this process's images alone, and as each step leaves them
    run = Run(replace(CONFIG, **NORMED), train_split, CPU)
    own, settled = [], []
    settle = run.learner._settle_statistics

    def settle_noted(*args) -> None:
        own.append([x.clone() for x in run.learner.statistics])
        settle(*args)
        settled.append([x.clone() for x in run.learner.statistics])

    run.learner._settle_statistics = settle_noted
    take(run, 2)
    found["statistics"] = own, settled, run.weights()["model"]

    for name in ("focal", "two_stage"):
        run = Run(replace(CONFIG, **RUNS[name]), train_split, CPU)
        one_half = take(run, 2, without_objects if rank == 1 else None)
        found[f"{name} without objects"] = one_half, take(run, 2, without_objects), dict(run.sums)

    val = validation_loader(val_split, CONFIG, CPU, share=(rank, distributed.world_size()))
    found["images"] = sorted(detect(run.learner.model, val, CPU)[0])

    # the main process measures, here by a clock of its own
    run = Run(CONFIG, train_split, CPU)
    set_pace(run, val, 0.2, time.perf_counter() - rank)
    found["pace"] = run.total_steps, run.config.steps, take(run, 1)

    # a fault of one process is known to both
    def unreadable(targets: list[dict]) -> None:
        targets[0]["unreadable"] = ["a.jpg: broken"]

    warnings.simplefilter("ignore")
    run = Run(CONFIG, train_split, CPU)
    take(run, 2, unreadable if rank == 1 else None)
    found["unreadable"] = run.unreadable

    step = Run.step

    def faulty(run: Run, batches: list, stop: bool = False) -> Step:
        if rank == 1 and run.steps_done == 1:
            batches[0][2][0]["boxes"] *= float("nan")
        if rank == 1 and run.steps_done == 2:
            stop = True
        return step(run, batches, stop)

    Run.step = faulty
    run = Run(CONFIG, train_split, CPU)
    assert run.train(val, out / "stopped", {"data": str(data)}) is None
    Run.step = step
    found["stopped_at"] = run.steps_done
    # of a program that evaluates by itself, each process all images
    found["evaluated"] = load(out / "stopped", CPU).evaluate(data)["images"]
    torch.save(found, out / f"rank{rank}.pt")

    # the whole command, resumed
    assert cli.main(["train", "--resume", str(out / "stopped"), "--device", "cpu"]) == 0


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
