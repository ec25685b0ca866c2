"""Small datasets of YOLO on disk for the tests of the detector."""

import zlib

import numpy as np
from PIL import Image

from detr.formats import open_dataset
from detr.splits import read_part

LINE = "0 0.5 0.5 0.25 0.5\n"


def image(path, size=(40, 20), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(
        0, 256, (size[1], size[0], 3), dtype=np.uint8
    )
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def birds(root):
    """Two training images and one of val, of 40 x 20 pixels, each with a box in the middle."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        image(root / "images" / split / f"{name}.png")
        write(root / "labels" / split / f"{name}.txt", LINE)
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [ant, owl]\n")
    return root


def fatal(root, name="train"):
    """The only fatal problem."""
    problems = read_part(open_dataset(root), name).problems
    [problem] = [problem for problem in problems if problem.fatal]
    return problem
