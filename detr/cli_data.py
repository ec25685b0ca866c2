"""The subcommands `check-data` and `convert`: what is in a dataset, what is wrong with it, and the same elsewhere."""

import argparse
import os
from pathlib import Path

from detr.convert import convert
from detr.errors import ArgumentError, DataError
from detr.images import reading_of
from detr.output import claim_file, json_of, write_file
from detr.presets import scaled_preset
from detr.problems import by_kind, raise_or_warn
from detr.split import SPLITS, Split
from detr.splits import Dataset, dataset_of, hold_out_of, read_part, read_parts
from detr.summary import summary, summary_table
from detr.terminal import say


def run_check(options: argparse.Namespace) -> int:
    """Print what is in a dataset and every fault of it; the exit code."""
    if options.json:
        claim_file(options.json, "detr check-data")
    overrides = {name: getattr(options, name) for name in ("image_size", "n_queries")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    config = scaled_preset(options.preset, None, **overrides)
    flags = vars(options)
    dataset = dataset_of(flags)
    say(f"{dataset.root}: {dataset.title}, {', '.join(dataset.splits)}")
    parts, said = read_parts(dataset, None, config, reading_of(flags), decode=True, hold_out=hold_out_of(flags))
    if said:
        say(said)
    report = {"format": dataset.format, "splits": dataset.splits}
    for name, part in parts.items():
        source = f"{part.split.source}, " if part.split else ""
        say(f"{name}: {source}for {config.name} at {config.image_size} pixels")
        if not part.fatal:
            report[name] = summary(part.split, config)
            say(*summary_table(report[name]).split("\n"))
        for line in by_kind(part.problems):
            say(f"  {line}")
        report[f"{name}_problems"] = [vars(problem) for problem in part.problems]
    fatal = sum(problem.fatal for part in parts.values() for problem in part.problems)
    if any(len(part.problems) > len(by_kind(part.problems)) for part in parts.values()) and not options.json:
        say("--json FILE has every one of them")
    if options.json:
        write_file(options.json, json_of(report, "detr check-data"), "detr check-data")
    say(f"fatal problems: {fatal}")
    return 1 if fatal else 0


def run_conversion(options: argparse.Namespace) -> int:
    """Write a dataset in another format; the exit code."""
    flags = vars(options)
    dataset, splits, reading = dataset_of(flags), {}, reading_of(flags)
    unknown = [name for name in options.splits or () if name not in dataset.splits]
    if unknown:
        raise ArgumentError(f"--splits: expected some of {', '.join(dataset.splits)}, got {unknown[0]}")
    for name in sorted(options.splits or dataset.splits, key=lambda name: (*SPLITS, name).index(name)):
        categories = next(iter(splits.values())).categories if splits else None
        part = read_part(dataset, name, categories, reading)
        raise_or_warn(part.problems)
        splits[name] = part.split
    for folder in _read_from(dataset, splits):
        if Path(os.path.realpath(options.out)).is_relative_to(folder):
            raise DataError(f"{options.out}: expected a folder outside of {folder}, which the dataset is read from")
    for line in convert(splits, options.out, options.to, options.images):
        say(line)
    if options.to == "coco" and reading.exif == "ignore":
        say("boxes are of the pixels as they are stored: read this dataset with --exif ignore too")
    say(f"{options.out}: {', '.join(f'{len(split.images)} images of {name}' for name, split in splits.items())}")
    return 0


def _read_from(dataset: Dataset, splits: dict[str, Split]) -> list[str]:
    """The folders in which new files would be read with the dataset."""
    folders = [dataset.root] if dataset.root.is_dir() else []
    root = Path(os.path.abspath(dataset.root))
    for folder in {Path(path).parent for split in splits.values() for path in split.images.paths}:
        above = [parent for parent in Path(os.path.abspath(folder)).parents if parent.name == "images"]
        folders += [folder, *(parent for parent in above if not root.is_relative_to(parent))]
    return sorted(map(os.path.realpath, folders))
