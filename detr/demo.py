"""`make demo`: from nothing to a trained detector and its pictures, in one command."""

import itertools
import json
import resource
import sys
import time
from pathlib import Path

from detr import cli
from detr.flags import Parser, number, path
from detr.terminal import say

IMAGES, STEPS = 2000, 2200  # of the whole demo
MIN_AP = 0.62  # less than this, of the whole demo, says that something is broken


def main(arguments: list[str] | None = None) -> int:
    """Write the synthetic set, train, evaluate, draw.

    Returns:
        The exit code: 0, or 1 if a part failed or the AP of the whole demo is below MIN_AP.
    """
    parser = Parser(prog="python -m detr.demo", description=__doc__)
    count = number(int, 1, 1_000_000)
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--train", type=count, default=IMAGES, help="training images (%(default)s)")
    parser.add_argument("--val", type=count, default=200, help="validation images (%(default)s)")
    parser.add_argument("--steps", type=count, default=STEPS, help="optimiser steps of 8 images (%(default)s)")
    options = parser.parse_args(arguments)

    # a run stays where it is: the next one has another folder
    suffix = next(n for n in itertools.chain([""], itertools.count(2)) if not (options.out / f"run{n}").exists())
    data, run, pictures = (options.out / name for name in ("data", f"run{suffix}", f"predict{suffix}"))
    if cli.main(["synth", str(data), "--train", str(options.train), "--val", str(options.val)]):
        return 1
    start = time.perf_counter()
    size = ["--steps", str(options.steps), "--image-size", "128", "--set", "eval_steps=1000"]
    if cli.main(["train", "--data", str(data), "--preset", "tiny", "--out", str(run), *size]):
        return 1
    seconds = time.perf_counter() - start
    examples = [str(image) for image in sorted((data / "val").glob("*.jpg"))[:8]]
    if cli.main(["predict", *examples, "--checkpoint", str(run / "checkpoint.pt"), "--out", str(pictures)]):
        return 1

    ap = json.loads((run / "eval.json").read_text())["AP"]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(
        "",
        f"{seconds:.0f} s of training with evaluations, at most {gigabytes:.1f} GB of memory, "
        f"AP {ap:.3f} on {options.val} images",
        f"learning curves: {run / 'curves.png'}",
        f"ground truth beside detections: {run / 'predictions.png'}",
        f"single images with detections: {pictures}",
    )
    if options.train < IMAGES or options.steps < STEPS:
        say(
            f"{options.steps} steps on {options.train} images show that every part works here. How well the detector "
            f"learns they cannot show: that takes {STEPS} steps on {IMAGES} images, the defaults, and an AP of {MIN_AP}"
        )
    elif ap < MIN_AP:
        say(f"expected an AP of at least {MIN_AP}: something is wrong", error=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
