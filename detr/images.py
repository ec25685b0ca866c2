"""Reading image files of every kind as RGB, and drawing boxes on them."""

import colorsys
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from detr.errors import DataError
from detr.labels import draw_labels

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# what Pillow raises on damaged files, apart from the subclasses of OSError
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_EXIF_ORIENTATION = 0x0112


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the header, as stored, without decoding.

    Raises:
        DataError: the file is missing, is no image, or is larger than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(path) as image:
            return _checked_size(image)
    except FileNotFoundError:
        raise DataError("the image file is missing") from None
    except _DAMAGED as error:
        raise DataError(f"not a readable image: {error}") from None


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, turned as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped.

    Args:
        size: (width, height) that the annotations are made for. An image whose stored size fits, while its turned size
            does not, is left as stored: its boxes were drawn without looking at the EXIF orientation.

    Raises:
        DataError: the file is missing, truncated, no image, too large, of floating-point pixels, or of another size.
    """
    try:
        with Image.open(path) as image:
            stored = _checked_size(image)
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
            if size is not None and size not in (stored, turned):
                raise DataError(f"the image is {turned[0]}x{turned[1]} pixels, expected {size[0]}x{size[1]}")
            image.load()
            if size is None or size == turned:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except FileNotFoundError:
        raise DataError("the image file is missing") from None
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"not a readable image: {error}") from None


def _checked_size(image: Image.Image) -> tuple[int, int]:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{image.width}x{image.height} pixels, expected at most {Image.MAX_IMAGE_PIXELS} in all")
    return image.size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("floating-point pixels, expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.int64) // 256
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def draw_boxes(
    image: Image.Image,
    boxes: list[list[float]],
    labels: list[int],
    names: list[str],
    scores: list[float] | None = None,
) -> Image.Image:
    """A copy of `image` with boxes, coloured by label, and their names and scores: see `detr.labels.draw_labels`.

    Args:
        boxes: x0, y0, x1, y1 in pixels of the image, best first.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    line = max(1, round(max(image.size) / 300))
    # steps of the golden ratio keep the hues of neighbouring labels apart
    hues = [colorsys.hsv_to_rgb(label * 0.618 % 1, 0.9, 1.0) for label in labels]
    colours = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]
    right, bottom = image.width - 1, image.height - 1
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):
        inside = [min(v, last) for v, last in zip(box, (right, bottom, right, bottom), strict=True)]
        draw.rectangle(inside, outline=colour, width=line)
    draw_labels(draw, boxes, labels, colours, names, scores)
    return image
