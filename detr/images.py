"""Reading image files of every kind as RGB, and drawing boxes on them."""

import colorsys
import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from torch import Tensor

from detr.arguments import path_of
from detr.config import MAX_PIXELS, short
from detr.errors import DataError
from detr.labels import draw_labels
from detr.progress import progress

T, U = TypeVar("T"), TypeVar("U")
AnyImage = str | os.PathLike | Image.Image | np.ndarray | Tensor  # see `as_picture`

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# what Pillow raises on damaged files, apart from the subclasses of OSError
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_TENSORS = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# keys of what Pillow knows of an image, in which it finds an orientation
_EXIF = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")

# said of images by `detr check-data`, `train`, `eval` and `predict`
DEEP = "grey of 16 or 32 bits: each such image is mapped from its 0.5 and 99.5 percentile to 0..255"

# what has to be done to stored pixels, by their EXIF orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Reading:
    """How image files are read, the same in training, evaluation and prediction."""

    exif: str = "turn"  # pixels are turned as the EXIF orientation says; "ignore" leaves them as they are stored
    large: bool = False  # also images of more than MAX_PIXELS


DEFAULT_READING = Reading()


def reading_of(flags: dict[str, Any]) -> Reading:
    """How image files are read, from "exif" and "large_images", which may be absent or None."""
    return Reading(flags.get("exif") or "turn", bool(flags.get("large_images")))


@dataclass(frozen=True)
class Header:
    """What is known of an image file without decoding it."""

    size: tuple[int, int]  # (width, height) of the pixels as they are read
    orientation: int  # of EXIF, 1 to 8; 1 if there is none
    turn: bool  # whether the pixels are turned as the orientation says
    doubtful: bool  # whether the size of the annotations fits both the turned pixels and the stored ones
    deep: bool  # grey of more than 8 bits


def read_header(path: Path, size: tuple[int, int] | None = None, reading: Reading = DEFAULT_READING) -> Header:
    """Look at an image file without decoding it.

    Args:
        size: as of `read_image`.

    Raises:
        DataError: the file is missing, no image, too large, or of another size.
    """
    with _open(path, reading) as image:
        return _header(image, size, reading)


def for_each(function: Callable[[T], U], items: Sequence[T], text: str) -> list[U | DataError]:
    """What `function` gives for each item, several at a time, with a progress bar; the error where it raises one."""

    def call(item: T) -> U | DataError:
        try:
            return function(item)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return list(progress(pool.map(call, items), desc=text, total=len(items), leave=False, delay=2))


def read_image(path: Path, size: tuple[int, int] | None = None, reading: Reading = DEFAULT_READING) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, turned as its EXIF orientation says.

    Palette, CMYK and 8-bit grey images are converted; transparency is dropped. Grey images of 16 or 32 bits, floating
    point too, are mapped one by one: their 0.5 percentile becomes 0 and their 99.5 percentile 255, what is not a number
    0. Of 16-bit colours, and of 16-bit grey with transparency, the upper 8 bits are taken.

    Args:
        size: (width, height) that the annotations are made for. An image whose stored size fits, while its turned size
            does not, is left as stored: its boxes were drawn without looking at the EXIF orientation. Where both fit
            it is turned.

    Raises:
        DataError: the file is missing, truncated, no image, too large, or of another size.
    """
    with _open(path, reading) as image:
        return _decode(image, size, reading)


def _decode(image: Image.Image, size: tuple[int, int] | None, reading: Reading) -> Image.Image:
    header = _header(image, size, reading)
    # with its name Pillow 13 maps an uncompressed TIFF by its turned size, and scrambles it
    filename, image.filename = getattr(image, "filename", ""), ""
    try:
        image.load()
    finally:
        image.filename = filename
    # Pillow turns a TIFF when it loads it, and takes the orientation away
    turned = header.orientation != _orientation(image)
    rgb = _to_rgb(image)
    for name in _EXIF:  # who looks at it again must not turn it again
        rgb.info.pop(name, None)
    if turned == header.turn:
        return rgb
    back = {6: 8, 8: 6} if turned else {}
    return rgb.transpose(_TURNS[back.get(header.orientation, header.orientation)])


def as_picture(image: AnyImage, name: str, reading: Reading = DEFAULT_READING) -> Image.Image:
    """An image of any kind that `Detector.predict` takes, as 8-bit RGB.

    Args:
        name: of the argument, for messages.

    Raises:
        DataError: it is none of these kinds, or cannot be read; names what was expected and what came.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return read_image(path_of(name, image), None, reading)
        except DataError as error:
            raise DataError(f"{image}: {error}") from None
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise DataError(f"{name}: expected at least one pixel, got {image.width} x {image.height}")
        try:
            return _decode(image, None, reading)
        except (*_DAMAGED, AssertionError) as error:  # the latter for a file that was closed
            raise DataError(f"{name}: not a readable image: {str(error) or 'its file is closed'}") from None
    if isinstance(image, np.ndarray):
        return _of_numbers(image, f"{name}: expected a uint8 array [H, W, 3], red, green and blue", last=True)
    if isinstance(image, Tensor):
        expected = f"{name}: expected a tensor [3, H, W] of uint8 or of floats from 0 to 1"
        return _of_numbers(_to_bytes(image, expected), expected, last=False)
    expected = "a path, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W]"
    raise DataError(f"{name}: expected {expected}, got {short(image)}")


def _to_bytes(image: Tensor, expected: str) -> np.ndarray:
    """A tensor's numbers as they are, or those from 0 to 1 as 0 to 255."""
    plain = image.layout is torch.strided and image.device.type != "meta" and not image.is_quantized
    if not plain or image.dtype not in _TENSORS:
        raise DataError(f"{expected}, got {str(image.layout)[6:]} {str(image.dtype)[6:]} of shape {list(image.shape)}")
    image = image.detach().cpu()
    if image.dtype != torch.uint8 and image.numel():
        low, high = image.min().item(), image.max().item()
        if not 0 <= low <= high <= 1:
            raise DataError(f"{expected}, got numbers from {low:g} to {high:g}: it must not be normalised")
        image = (image.double() * 255).round()
    return image.byte().numpy()


def _of_numbers(image: np.ndarray, expected: str, last: bool) -> Image.Image:
    """uint8 numbers of a colour image, grey or with transparency too; channels come last or first."""
    channels, others = (-1, 0) if last else (0, -1)
    if image.dtype != np.uint8:
        hint = ': of numbers from 0 to 1 make it by (255 * image).astype("uint8")' if image.dtype.kind == "f" else ""
        raise DataError(f"{expected}, got {image.dtype} of shape {list(image.shape)}{hint}")
    if image.ndim == 2:
        image = np.expand_dims(image, channels)
    if image.ndim != 3 or image.shape[channels] not in (1, 3, 4) or 0 in image.shape:
        hint = ""
        if image.ndim == 3 and image.shape[others] in (1, 3, 4):
            hint = ": channels come last in an array" if last else ": channels come first in a tensor"
        elif image.ndim == 4:
            hint = ": several images are a list"
        raise DataError(f"{expected}, got shape {list(image.shape)}{hint}")
    image = image if last else np.moveaxis(image, 0, -1)
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)).convert("RGB")


@contextlib.contextmanager
def _open(path: Path, reading: Reading) -> Iterator[Image.Image]:
    """An image file that is open; what is wrong with it is a DataError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError("expected an image file")
        with _no_limit, Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS and not reading.large:
                raise Image.DecompressionBombError
            if image.format == "PNG" and "exif" not in image.info and (exif := _late_exif(path)):
                image.info["exif"] = exif
            yield image
    except FileNotFoundError:
        raise DataError("the image file is missing") from None
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"more than {MAX_PIXELS / 1e6:.0f} million pixels, the limit against decompression bombs: "
            "--large-images reads it all the same"
        ) from None
    except MemoryError:
        raise DataError("its pixels do not fit into memory") from None
    except _DAMAGED as error:
        raise DataError(f"not a readable image: {error}") from None


class _NoLimit:
    """Within it Pillow opens images of any size, in all threads: `_open` has a limit of its own."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                Image.MAX_IMAGE_PIXELS = self.before


_no_limit = _NoLimit()


def _late_exif(path: Path) -> bytes | None:
    """The EXIF of a PNG, which may come after its pixels: Pillow finds it there when it has decoded them."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _header(image: Image.Image, size: tuple[int, int] | None, reading: Reading) -> Header:
    # of a TIFF Pillow knows the turned size
    stored = tuple(image.tag_v2[tag] for tag in (256, 257)) if image.format == "TIFF" else image.size
    orientation = _orientation(image)
    turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    ignore = reading.exif == "ignore"
    if size is not None and size != stored and (ignore or size != turned):
        width, height = stored if ignore else turned
        where = " as stored" if ignore and stored != turned else ""
        raise DataError(f"the image is {width}x{height} pixels{where}, expected {size[0]}x{size[1]}")
    turn = orientation != 1 and not ignore and size in (None, turned)
    return Header(turned if turn else stored, orientation, turn, turn and size == stored, _is_deep(image))


def _orientation(image: Image.Image) -> int:
    try:
        # not the method of a PNG, which decodes its pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:  # damaged EXIF says nothing of the pixels
        return 1
    return orientation if orientation in _TURNS else 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):  # Pillow would clip them at 255
        numbers = np.asarray(image)
        if image.format == "TIFF" and image.mode == "I" and image.tag_v2.get(339, (1,))[0] == 1:
            numbers = numbers.view(np.uint32)  # which Pillow has no mode for
        image = Image.fromarray(_to_8_bits(numbers))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Numbers [H, W] of any range as uint8, from their 0.5 and 99.5 percentile; 0 where all are the same."""
    grey = grey.astype(np.float64)
    finite = grey[np.isfinite(grey)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 0.0)
    if low == high and finite.size:  # less than one pixel in a hundred is not the background
        low, high = finite.min(), finite.max()
    if low == high:
        return np.zeros(grey.shape, np.uint8)
    scaled = (grey - low) * (255 / (high - low))
    return np.nan_to_num(scaled.clip(0, 255)).round().astype(np.uint8)


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
