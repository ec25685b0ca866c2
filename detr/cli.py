"""The command `detr`: synth, check-data, train, eval, predict, inspect, export."""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from detr.arguments import NUMBERS, run_folder_of
from detr.config import COUNT, FORMATS, MAX_DETS, NODES, SEED
from detr.errors import DetrError, MissingPackageError
from detr.flags import Parser, add_data_flags, add_flags, add_reading_flags, fields_of, names, number, path, place
from detr.packages import check_packages
from detr.presets import PRESETS
from detr.terminal import say

# The commands import what they need by themselves: with PyTorch and its kin `detr --help` would take ten seconds.

EX_SOFTWARE = 70  # of sysexits.h
_DATA = "folder of the dataset (COCO, YOLO or Pascal VOC, exported by Roboflow too), or a data.yaml"
_IMAGES = 1_000_000  # the most that are drawn for a split


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, 1 after an error that one line explains, 70 after one that is a fault of this program (its
        traceback is in a file), 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that somebody put there
            stream.reconfigure(errors="backslashreplace")  # no name of a class or file stops a command
    began = time.perf_counter()  # before the libraries are imported
    if not {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        try:
            check_packages()
        except MissingPackageError as error:
            say(f"detr: error: {error}", error=True)
            return 1
    options = _parser().parse_args(arguments)
    options.began = began
    shown, of_threads = warnings.showwarning, threading.excepthook
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", error=True)
    # the one of TensorBoard finds the disk full, for example
    threading.excepthook = lambda thread: say(f"warning: {thread.exc_type.__name__}: {thread.exc_value}", error=True)
    try:
        return options.run(options)
    except (DetrError, OSError) as error:
        return _complain(options, f"error: {error}", 1)
    except KeyboardInterrupt:
        return _complain(options, "interrupted", 130)
    except Exception as error:  # whatever it is, the user gets one line
        message = (str(error).strip() or "no message").split("\n")[0]
        if _is_want_of_memory(error):
            return _complain(options, f"error: not enough memory: {message}; fewer or smaller images need less", 1)
        text = f"{type(error).__name__}: {message}"
        where = _keep_traceback(options)
        return _complain(options, f"{text} (a fault of detr: please report it, with {where})", EX_SOFTWARE)
    finally:
        warnings.showwarning, threading.excepthook = shown, of_threads


def _is_want_of_memory(error: Exception) -> bool:
    # PyTorch has a class for that of a GPU only
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


def _complain(options: argparse.Namespace, text: str, code: int) -> int:
    say(f"detr {options.command}: {text}", error=True)
    return code


def _keep_traceback(options: argparse.Namespace) -> str:
    """Write the traceback of the exception that is handled to a new file: in the folder of the run, if there is one.

    Returns:
        Words that name it.
    """
    from detr import run_folder
    from detr.output import Folder

    run = run_folder_of(options.out, options.resume) if options.command == "train" else None
    folder = run if run and run.is_dir() and Folder(run, run_folder.BY).knows_any() else None
    for parent in (folder, None):
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(".txt", "detr-traceback-", parent, text=True)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                traceback.print_exc(file=file)
            return f"the traceback in {name}"
    return "what you did: there is no room for its traceback"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="detr", description="Train and use Deformable DETR on your own boxes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    text = "Write a synthetic dataset, JPEG and COCO json: coloured shapes, or large animals, on textured backgrounds."
    synth = add("synth", _synth, text)
    synth.add_argument("out", type=path, help="folder to write to")
    synth.add_argument(
        "--large",
        action="store_true",
        help="few images with one or more large animals, instead of shapes",
    )
    synth.add_argument("--train", type=number(int, 1, _IMAGES), help="training images (2000; 160 with --large)")
    synth.add_argument("--val", type=number(int, 1, _IMAGES), default=200, help="validation images (%(default)s)")
    synth.add_argument(
        "--size", type=number(int, 32, 4096), help="width and height of the images, pixels (128; 192 with --large)"
    )
    synth.add_argument(
        "--seed", type=number(int, 0, SEED), default=0, help="the same seed draws the same images (%(default)s)"
    )

    check = add(
        "check-data", _check_data, "Look for every fault of a dataset that would spoil a training; exit code 1 if any."
    )
    check.add_argument("data", type=path, help=_DATA)
    _add_split_names(check, "train")
    _add_split_names(check, "val")
    add_data_flags(check)
    check.add_argument(
        "--preset",
        choices=PRESETS,
        default="tiny",
        metavar="NAME",
        help="the model to be trained (%(default)s)",
    )
    check.add_argument("--image-size", type=number(int), help="as for train, pixels (the preset's)")
    check.add_argument("--n-queries", type=number(int), help="most objects that the model can find (the preset's)")
    check.add_argument("--json", type=path, help="also write everything that was found to this file")

    conversion = add("convert", _convert, "Write a dataset of any format that is read, as COCO json or as YOLO.")
    conversion.add_argument("data", type=path, metavar="SRC", help=_DATA)
    conversion.add_argument("out", type=path, metavar="OUT", help="folder to write to")
    conversion.add_argument("--to", choices=("coco", "yolo"), default="coco", help="format to write (%(default)s)")
    conversion.add_argument(
        "--images",
        choices=("copy", "link"),
        default="copy",
        help="copy the image files, or make symbolic links to them (%(default)s)",
    )
    conversion.add_argument("--splits", type=names, metavar="A,B,...", help="splits to convert (all)")
    _add_split_names(conversion, "train")
    _add_split_names(conversion, "val")
    add_data_flags(conversion, divided=False)

    training = add("train", _train, "Train a detector; the run directory can be resumed after any interruption.")
    training.add_argument("--data", type=path, help=_DATA)
    _add_split_names(training, "train")
    _add_split_names(training, "val")
    add_data_flags(training)
    add_flags(training)
    _add_device_and_workers(training)

    evaluation = add("eval", _eval, "Evaluate a checkpoint by COCO's average precision.")
    evaluation.add_argument("--data", type=path, required=True, help=_DATA)
    evaluation.add_argument("--split", default="val", help="train, val, test, ... (%(default)s)")
    evaluation.add_argument("--images", type=path, help="image folder, if its name is another")
    evaluation.add_argument("--annotations", type=path, help="json, if its name is another")
    evaluation.add_argument(
        "--checkpoint", type=path, required=True, help="best.pt or checkpoint.pt of a run, or its folder"
    )
    add_data_flags(evaluation)
    evaluation.add_argument(
        "--batch-size", type=number(*NUMBERS["batch_size"]), help="images of one size at once (as in the training)"
    )
    evaluation.add_argument(
        "--max-dets",
        type=number(*NUMBERS["max_dets"]),
        default=MAX_DETS,
        metavar="N",
        help="most detections of an image that count, the best ones (%(default)s, as COCO does)",
    )
    evaluation.add_argument("--out", type=path, help="also write the metrics to this json file")
    _add_device_and_workers(evaluation)

    prediction = add("predict", _predict, "Detect objects in images: pictures with boxes, and predictions.json.")
    prediction.add_argument(
        "inputs",
        nargs="+",
        type=place,
        metavar="IMAGE",
        help="image, folder, glob pattern, or .txt file with one of these a line",
    )
    prediction.add_argument(
        "--checkpoint", type=path, required=True, help="best.pt or checkpoint.pt of a run, or its folder"
    )
    prediction.add_argument("--out", type=path, default=Path("runs/predict"), help="folder to write to (%(default)s)")
    prediction.add_argument(
        "--threshold",
        type=number(*NUMBERS["threshold"]),
        default=0.5,
        help="lowest score to report, 0 to 1 (%(default)s)",
    )
    add_reading_flags(prediction)
    prediction.add_argument(
        "--batch-size",
        type=number(*NUMBERS["batch_size"]),
        default=1,
        help="images of one size at once (%(default)s)",
    )
    _add_device(prediction)

    inspection = add("inspect", _inspect, "Say what a checkpoint is; with --image, draw where one query looks.")
    inspection.add_argument("checkpoint", type=path, help="best.pt or checkpoint.pt of a run, or its folder")
    inspection.add_argument("--image", type=path, help="draw the sampling points of a query on this image")
    add_reading_flags(inspection)
    inspection.add_argument(
        "--query", type=number(int, 0, COUNT), help="number of the query (the one with the best score)"
    )
    inspection.add_argument(
        "--layer", type=number(int, 1, COUNT), help="decoder layer whose points are drawn, from 1 (the last)"
    )
    inspection.add_argument(
        "--out", type=path, default=Path("runs/sampling.png"), help="picture to write (%(default)s)"
    )
    _add_device(inspection)

    export = add("export", _export, "Write the weights of a checkpoint for other code, or the whole model.")
    export.add_argument(
        "--checkpoint", type=path, required=True, help="best.pt or checkpoint.pt of a run, or its folder"
    )
    export.add_argument(
        "--to",
        choices=("official", "hf", *FORMATS),
        required=True,
        help="weights: the original's file, or a Hugging Face folder; the model: onnx, torch-export (a .pt2 file of "
        "torch.export), aoti (a .pt2 package that AOTInductor compiles for this CPU)",
    )
    export.add_argument("--out", type=path, required=True, help="file or folder to write")
    export.add_argument(
        "--size",
        type=number(*NUMBERS["size"]),
        nargs=2,
        metavar=("H", "W"),
        help="of the padded images that an exported model takes, pixels (image_size of the config, twice)",
    )
    export.add_argument(
        "--attention",
        choices=NODES,
        default="plain",
        help="in ONNX: plain operators, or one node by the name of TensorRT's or mmdeploy's plugin (%(default)s)",
    )
    return parser


def _add_split_names(parser: argparse.ArgumentParser, split: str) -> None:
    for what, kind in (("json", "json"), ("images", "image folder")):
        text = f"{kind} of the split {split}, relative to the dataset, if its name is not one of COCO's"
        parser.add_argument(f"--{split}-{what}", type=path, help=text)


def _add_device(parser: argparse.ArgumentParser) -> None:
    text = "cpu, cuda, cuda:1, ... (cuda if there is a GPU, else cpu)"
    parser.add_argument("--device", help=text)


def _add_device_and_workers(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument(
        "--workers",
        type=number(*NUMBERS["workers"]),
        help="processes that load images (default: 0 if all fit in memory)",
    )


def _synth(options: argparse.Namespace) -> int:
    from detr.synth import write_dataset

    train = options.train or (160 if options.large else 2000)
    size = options.size or (192 if options.large else 128)
    write_dataset(options.out, train, options.val, size, options.seed, options.large)
    say(f"{options.out}: {train} training and {options.val} validation images")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from detr.cli_data import run_check

    return run_check(options)


def _convert(options: argparse.Namespace) -> int:
    from detr.cli_data import run_conversion

    return run_conversion(options)


def _train(options: argparse.Namespace) -> int:
    from detr import distributed
    from detr.devices import device_of
    from detr.training import train

    fields = fields_of(options)
    recipe = fields.pop("recipe", options.recipe)
    names = ("preset", "out", "minutes", "weights", "resume", "accept_changed_data", "format", "classes", "train_json")
    names += ("train_images", "val_json", "val_images", "val_fraction", "split_seed", "exif", "large_images", "workers")
    given = {name: getattr(options, name) for name in (*names, "wandb", "began")}
    with (
        distributed.joined(device_of(options.device)) as device,
        distributed.one_line_for_lost_processes(),
        contextlib.closing(distributed.StopOnSignal()) as stop,
    ):
        detector = train(options.data, recipe=recipe, device=device, stop=stop, **given, **fields)
    return 130 if detector.stopped else 0


def _eval(options: argparse.Namespace) -> int:
    from detr.output import claim_file, json_of, write_file

    if options.out:
        claim_file(options.out, "detr eval")
    detector = _detector(options)
    names = ("split", "annotations", "images", "format", "classes", "val_fraction", "split_seed", "exif")
    names += ("large_images", "batch_size", "max_dets", "workers")
    metrics = detector.evaluate(options.data, **{name: getattr(options, name) for name in names})
    if options.out:
        write_file(options.out, json_of(metrics, "detr eval"), "detr eval")
    say(*str(metrics).split("\n"))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from detr.images import reading_of
    from detr.predict import find_images, write_predictions

    images = find_images(options.inputs)
    detector, reading = _detector(options), reading_of(vars(options))
    results, unreadable = write_predictions(
        detector, images, options.out, options.threshold, options.batch_size, reading
    )
    for message in unreadable:
        say(f"warning: {message}", error=True)
    count = sum(len(result["detections"]) for result in results)
    say(f"{options.out}: {count} objects in {len(results)} images; pictures and predictions.json are there")
    return 1 if unreadable else 0


def _inspect(options: argparse.Namespace) -> int:
    from detr.cli_inspect import run_inspection

    return run_inspection(options)


def _export(options: argparse.Namespace) -> int:
    options.device = "cpu"
    path = _detector(options).export(options.out, options.to, options.size, options.attention)
    say(f"{path}: written")
    return 0


def _detector(options: argparse.Namespace) -> Any:
    """The Detector of --checkpoint; a line says which file of a run was taken."""
    from detr import checkpoint
    from detr.detector import load

    detector = load(options.checkpoint, options.device)
    if said := checkpoint.taken(options.checkpoint, detector.path):
        say(said)
    return detector
