"""Where a program for a GPU runs: on one, or by --dry-run interpreted on a CPU."""

import argparse
from pathlib import Path

import torch

from msda_triton.kernels.plan import INTERPRETED
from tests.interpreter import patch_the_language_once_a_launch


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; TRITON_INTERPRET=1 is needed")


def make_folder(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the folder of --out, or an error of the parser."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that can be made, got {path}: {error.strerror}")


def device_of(parser: argparse.ArgumentParser, dry_run: bool) -> str:
    """ "cpu" in a dry run, whose interpreter is made faster, else "cuda"; an error of the parser if that cannot run."""
    if dry_run and not INTERPRETED:
        parser.error("--dry-run: expected TRITON_INTERPRET=1 in the environment, which runs kernels on the CPU")
    if not dry_run and INTERPRETED:
        parser.error("TRITON_INTERPRET: expected 0 or unset without --dry-run, got 1")
    if not dry_run and not torch.cuda.is_available():
        parser.error("expected a GPU, or --dry-run; torch finds none")
    if dry_run:
        patch_the_language_once_a_launch()
    return "cpu" if dry_run else "cuda"
