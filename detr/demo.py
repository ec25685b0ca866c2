"""`make demo`: from nothing to a trained detector and its pictures, in one command."""

import argparse
import itertools
import json
import resource
import sys
import time
from pathlib import Path

from detr import cli

MIN_AP = 0.62  # less than this says that something is broken


def main(arguments: list[str] | None = None) -> int:
    """Write the synthetic set, train, evaluate, draw. Returns 0, or 1 if a part failed or the AP is below MIN_AP."""
    parser = argparse.ArgumentParser(prog="python -m detr.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of 8 images")
    options = parser.parse_args(arguments)

    # a run stays where it is: the next one has another folder
    number = next(n for n in itertools.chain([""], itertools.count(2)) if not (options.out / f"run{n}").exists())
    data, run, pictures = (options.out / name for name in ("data", f"run{number}", f"predict{number}"))
    if cli.main(["synth", str(data), "--train", str(options.train), "--val", str(options.val)]):
        return 1
    start = time.perf_counter()
    size = ["--steps", str(options.steps), "--image-size", "128", "--set", "eval_steps=1000"]
    if cli.main(["train", "--data", str(data), "--preset", "tiny", "--out", str(run), *size]):
        return 1
    seconds = time.perf_counter() - start
    examples = [str(path) for path in sorted((data / "val").glob("*.jpg"))[:8]]
    if cli.main(["predict", *examples, "--checkpoint", str(run / "checkpoint.pt"), "--out", str(pictures)]):
        return 1

    ap = json.loads((run / "eval.json").read_text())["AP"]
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{seconds:.0f} s of training with evaluations, at most {gigabytes:.1f} GB of memory, "
        f"AP {ap:.3f} on {options.val} images\n"
        f"learning curves: {run / 'curves.png'}\n"
        f"ground truth beside detections: {run / 'predictions.png'}\n"
        f"single images with detections: {pictures}"
    )
    if ap < MIN_AP:
        print(f"expected an AP of at least {MIN_AP}: something is wrong", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
