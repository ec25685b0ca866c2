"""Class names on pictures: a font that has their letters, and a place where they can be read."""

import functools
import itertools
import math
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

_LONGEST = 100  # letters of a name that are drawn at most
_files: dict[str, str | None] = {}  # text -> the file of a font that has all its letters, or None

Colour = tuple[int, int, int]


def drawable_names(categories: dict[int, str]) -> list[str]:
    """The names of classes as pictures show them, in their order: an id in the place of a name that no font can draw.

    Letters come from DejaVu Sans, else from a font of the system. Warns of names without a font, once for all.

    Args:
        categories: id -> name.
    """
    names = {category_id: _one_line(name) for category_id, name in categories.items()}
    _find_fonts(names.values())
    missing = [category_id for category_id, name in names.items() if _files[name] is None]
    if missing:
        more = f", and those of {len(missing) - 1} other classes" if len(missing) > 1 else ""
        warnings.warn(
            f"pictures show the class id {missing[0]} instead of {categories[missing[0]]!r}{more}: no font on this "
            "computer has the letters",
            stacklevel=2,
        )
    return [str(category_id) if category_id in missing else name for category_id, name in names.items()]


def draw_labels(
    draw: ImageDraw.ImageDraw,
    boxes: list[list[float]],
    labels: list[int],
    colours: list[Colour],
    names: list[str],
    scores: list[float] | None = None,
) -> None:
    """Write a name, and a score if there are any, at a corner of each box: above its upper border, or below that.

    A label is moved and its name shortened so that all of it is in the picture. It is left out where it would cover one
    that came before it.

    Args:
        boxes: x0, y0, x1, y1 in pixels, best first. colours: red, green and blue in 0 .. 255.
        names: for each box, as from `drawable_names`; in the place of others that no font can draw comes the label.
    """
    names = list(map(_one_line, names))
    _find_fonts(names)
    shown = [name if _files[name] else str(label) for name, label in zip(names, labels, strict=True)]
    _find_fonts(shown)
    width, height = draw.im.size
    size = max(10, round(max(width, height) / 45))
    pad = max(1, size // 8)
    taken: list[tuple[int, int, int, int]] = []
    for i, (box, colour, name) in enumerate(zip(boxes, colours, shown, strict=True)):
        parts = _parts(name, f" {scores[i]:.2f}" if scores else "", size, width - 2 * pad)
        extents = [font.getbbox(text, anchor="ls") for text, font in parts if text]
        if not extents:
            continue
        extents.append(_font(_dejavu(), size).getbbox("Ag", anchor="ls"))
        above, below = (f(extent[k] for extent in extents) for f, k in ((min, 1), (max, 3)))
        wide = math.ceil(sum(font.getlength(text) for text, font in parts)) + 2 * pad
        high = math.ceil(below - above) + 2 * pad
        place = _free(box, wide, high, (width, height), taken)
        if place is None:
            continue
        taken.append(place)
        x, y = place[:2]
        draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
        x, y = x + pad, y + pad - above
        for text, font in parts:
            draw.text((x, y), text, fill=readable_on(colour), font=font, anchor="ls")
            x += font.getlength(text)


def readable_on(colour: Colour) -> str:
    """Black or white: whichever has more contrast with a colour, by WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def _free(
    box: list[float], wide: int, high: int, size: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A place (x0, y0, x1, y1) for a label at its box, inside the picture and beside all that is taken."""
    if wide > size[0] or high > size[1]:
        return None
    for x, y in itertools.product((box[0], box[2] - wide), (box[1] - high, box[1])):
        x, y = min(max(round(x), 0), size[0] - wide), min(max(round(y), 0), size[1] - high)
        if not any(x < x1 and x0 < x + wide and y < y1 and y0 < y + high for x0, y0, x1, y1 in taken):
            return x, y, x + wide, y + high
    return None


def _parts(name: str, end: str, size: int, room: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """A name and what comes after it, each with its font; the name is cut to `room` pixels. Empty if none fits."""
    plain = _font(_dejavu(), size)
    font = _font(_files[name], size)
    for count in range(min(len(name), _LONGEST), -1, -1):
        parts = [(name[:count], font), (end if count == len(name) else f"…{end}", plain)]
        if sum(font.getlength(text) for text, font in parts) <= room:
            return parts
    return []


@functools.cache
def _dejavu() -> str:
    """The file of DejaVu Sans, which ships with matplotlib: Latin, Greek, Cyrillic, and more."""
    import matplotlib  # slow, and not every command draws

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def _one_line(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def _find_fonts(texts: Iterable[str]) -> None:
    """Fill `_files`: every font is opened once at most."""
    from matplotlib.ft2font import FT2Font

    missing = {text: _letters(text) for text in texts if text not in _files}
    shaped = features.check("raqm")
    for file in _font_files():
        drawable = [text for text in missing if shaped or not any(map(_is_shaped, text))]
        if not drawable:
            break
        try:
            font = FT2Font(file)
        except (OSError, RuntimeError):
            continue
        for text in drawable:
            if all(map(font.get_char_index, missing[text])) and (file == _dejavu() or _has_ink(file, text)):
                _files[text] = file
                del missing[text]
    _files.update(dict.fromkeys(missing))


def _font_files() -> Iterator[str]:
    yield _dejavu()
    from matplotlib.font_manager import findSystemFonts  # may take seconds, the first time

    files = [file for file in findSystemFonts() if "lastresort" not in file.lower()]  # which has boxes for letters
    yield from sorted(files, key=lambda file: ("regular" not in file.lower(), "sans" not in file.lower(), file))


def _letters(text: str) -> set[int]:
    """The characters that a font must have, those apart that only say how others look."""
    return {ord(c) for c in text if unicodedata.category(c) != "Cf" and c not in "\ufe0e\ufe0f"}


def _is_shaped(letter: str) -> bool:
    """Whether it is drawn right by libraqm only: written from right to left, or joined to others."""
    kind = unicodedata.category(letter)
    return unicodedata.bidirectional(letter) in ("R", "AL", "AN") or kind.startswith("M") or kind == "Cf"


def _has_ink(file: str, text: str) -> bool:
    # fonts of coloured pictures are refused by Pillow at this size, or drawn as nothing
    try:
        return _font(file, 20).getmask(text).getbbox() is not None
    except OSError:
        return False
