"""How many optimiser steps fit into some minutes, with their evaluations: measured by a trial, which is undone."""

import bisect
import copy
import itertools
import math
import time
import warnings
from pathlib import Path

from torch.utils.data import DataLoader

from detr import distributed
from detr.config import COUNT
from detr.errors import TrainingError
from detr.evaluate import coco_metrics, detect
from detr.run import Run
from detr.transforms import early

_TRIAL = 0.04  # share of the time for the trial of steps, and again for that of an evaluation
# share for the pictures at the end, and for steps slower than those of the trial: by 13 % on a quiet machine, 22 % on a
# shared one
_RESERVE = 0.16
_WARM_UP = 3  # first steps, which allocate and compile: not timed
_STEPS = 50  # of a trial, at most


def set_pace(run: Run, val: DataLoader, minutes: float, began: float) -> str:
    """Give `run` the most steps with which it ends `minutes` after `began`; a sentence on what was measured.

    It tries some steps and is then as it was before: a run of as many steps from the start is the same, bit for bit.
    All processes step together, and take what the main one measures.

    Args:
        val: as in `detr.run.Run.train`. began: `time.perf_counter()` at the start of the command.

    Raises:
        TrainingError: not even one step with its evaluation fits.
    """
    seconds = 60 * minutes
    before = copy.deepcopy(run.state())
    # past the first passes over the images, whose augmentation takes less time
    run.set_steps(COUNT, done=-(-early(run.config)[1] * len(run.dataset) // run.config.batch_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said again in the run
        try:
            of_step = _time_steps(run, _TRIAL * seconds)
        except TrainingError as error:  # it names a step of the trial
            raise TrainingError(f"minutes: while steps were tried: {error}") from None
        of_evaluation = _time_evaluation(run, val, _TRIAL * seconds)
    run.load_state(before, Path("the start"))
    left = seconds * (1 - _RESERVE) - (time.perf_counter() - began)
    steps = most_steps(run, left, of_step, of_evaluation)
    steps, of_step, of_evaluation, left = distributed.from_main(lambda: (steps, of_step, of_evaluation, left))
    rates = f"a step takes {of_step:.3g} s and an evaluation {of_evaluation:.3g} s"
    if not steps:
        # with more minutes the trial is longer
        least = (seconds * (1 - _RESERVE) - left + of_step + of_evaluation) / (1 - _RESERVE - 2 * _TRIAL) / 60
        digit = 10.0 ** (math.floor(math.log10(least)) - 1)  # the second one
        raise TrainingError(
            f"minutes: {rates}: expected at least {math.ceil(least / digit) * digit:.2g}, got {minutes:g}"
        )
    run.set_steps(steps)
    return f"{minutes:g} minutes: {rates}: {steps} steps (--steps {steps} repeats this run)"


def most_steps(run: Run, seconds: float, of_step: float, of_evaluation: float) -> int:
    """The most steps that fit into `seconds` together with the evaluations that are due among them."""

    def together(steps: int) -> float:
        return steps * of_step + evaluations_within(run, steps) * of_evaluation

    return bisect.bisect_right(range(1, COUNT), seconds, key=together)


def evaluations_within(run: Run, steps: int) -> int:
    """The evaluations of a run of so many steps: those of `Run.evaluation_is_due`, and the last one."""
    config = run.config
    if config.eval_steps:
        return -(-steps // config.eval_steps)
    every = config.eval_every * len(run.dataset)
    if config.batch_size >= every:  # after each step
        return steps
    passed, before = (n * config.batch_size // every for n in (steps, steps - 1))
    return passed + (passed == before)


def _time_steps(run: Run, budget: float) -> float:
    """Seconds of a step, the first ones left out."""
    times = [time.perf_counter()]
    for batches in run.batches():
        run.step(batches)
        times.append(time.perf_counter())
        enough = len(times) > _STEPS or times[-1] - times[0] > budget
        if distributed.from_main(lambda enough=enough: enough):
            break
    warm = min(_WARM_UP, len(times) - 2)
    return (times[-1] - times[warm]) / (len(times) - 1 - warm)


def _time_evaluation(run: Run, val: DataLoader, budget: float) -> float:
    """Seconds of an evaluation: of a batch, then of as many as there is time for, and in proportion."""

    def seconds(batches: int) -> float:
        start = time.perf_counter()
        found, _ = detect(run.learner.evaluated_model, itertools.islice(val, batches), run.device)
        coco_metrics(val.dataset.split, found)
        return (time.perf_counter() - start) * len(val) / max(1, min(batches, len(val)))

    whole = seconds(1)
    more = distributed.from_main(lambda: int(len(val) * budget / max(whole, 1e-9)))
    return seconds(more) if more > 1 else whole
