"""Labels on pictures: whose letters are drawn, where, and that they can be read."""

import colorsys
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from detr import labels
from detr.images import draw_boxes
from detr.labels import draw_labels, drawable_names, readable_on

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


@pytest.fixture(autouse=True)
def system_fonts(monkeypatch):
    """The fonts of the system: none, until a test puts some there."""
    files: list[str] = []
    monkeypatch.setattr(labels, "_files", {})
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: files)
    return files


def drawn(boxes, names, scores=None, size=(300, 200)):
    """What `draw_labels` writes on black, with as many colours as there are boxes."""
    image = Image.new("RGB", size)
    colours = [(250, 100 + i, 100) for i in range(len(boxes))]
    draw_labels(ImageDraw.Draw(image), boxes, list(range(len(boxes))), colours, names, scores)
    return np.asarray(image)


def cut_out(pixels):
    """What is not black, and nothing around it."""
    rows, columns = (np.flatnonzero(pixels.any(2).any(axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def label_by_hand(text, file):
    """Black letters of 10 pixels with a margin of 1."""
    font, plain = (ImageFont.truetype(path, 10) for path in (file, FONTS / "DejaVuSans.ttf"))
    boxes = font.getbbox(text, anchor="ls"), plain.getbbox("Ag", anchor="ls")
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    image = Image.new("RGB", (math.ceil(font.getlength(text)) + 2, math.ceil(bottom - top) + 2), (250, 100, 100))
    ImageDraw.Draw(image).text((1, 1 - top), text, fill="black", font=font, anchor="ls")
    return np.asarray(image)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        *((name, name) for name in ("cat", "Größe", "łódź", "γάτα", "кошка", "Éléphant")),
        ("Ka\u0308se", "Käse"),  # as macOS writes it
        (" traffic\n light\t", "traffic light"),
    ],
)
def test_latin_greek_and_cyrillic_need_no_font_of_the_system(name, shown):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawable_names({7: name}) == [shown]
    label = cut_out(drawn([[0, 60, 9, 90]], [name]))
    np.testing.assert_array_equal(label, label_by_hand(shown, FONTS / "DejaVuSans.ttf"))
    assert label.min() < 50  # there are letters


@pytest.mark.parametrize("name", ["猫", "बिल्ली", "🐈", "\ud800", "a\x1bb", "\ue000"])
def test_names_that_no_font_can_draw_are_ids(name):
    with pytest.warns(UserWarning) as caught:
        assert drawable_names({7: "cat", 90: name, 12: name + "2"}) == ["cat", "90", "12"]
    text = f"pictures show the class id 90 instead of {name!r}, and those of 1 other classes: no font on this computer"
    assert [str(warning.message)[: len(text)] for warning in caught] == [text]
    # without an id there is the label, and never a crossed box
    np.testing.assert_array_equal(drawn([[0, 60, 9, 90]], [name]), drawn([[0, 60, 9, 90]], ["0"]))


def test_a_font_of_the_system_that_has_the_letters(tmp_path, system_fonts):
    name, file = "\u2316\u2322", str(FONTS / "STIXGeneral.ttf")  # two signs that DejaVu Sans lacks
    (tmp_path / "broken.ttf").write_text("no font")
    has_boxes_for_all = str(FONTS / "LastResortHE-Regular.ttf")
    system_fonts += [has_boxes_for_all, str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf")]
    with pytest.warns(UserWarning, match="class id 3"):
        assert drawable_names({3: name}) == ["3"]
    labels._files.clear()
    system_fonts += [str(FONTS / "cmr10.ttf"), file]
    assert drawable_names({3: name, 4: "cat"}) == [name, "cat"]
    assert labels._files == {name: file, "cat": str(FONTS / "DejaVuSans.ttf")}
    np.testing.assert_array_equal(cut_out(drawn([[0, 60, 9, 90]], [name])), label_by_hand(name, file))
    with_score = cut_out(drawn([[0, 60, 9, 90]], [name], [0.5]))  # which the font need not have
    assert with_score.shape[1] > label_by_hand(name, file).shape[1] + 15


@pytest.mark.parametrize("raqm", [True, False])
def test_arabic_is_joined_and_from_the_right_or_not_drawn(monkeypatch, raqm):
    monkeypatch.setattr(features, "check", lambda name: raqm)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert drawable_names({5: "قطة"}) == ["قطة" if raqm else "5"]


def test_letters_can_be_read_on_every_colour():
    def luminance(colour):
        r, g, b = ((c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    used = {"black": 0, "white": 0}
    for hue in range(360):
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360, 0.9, 1.0))
        text = readable_on(colour)
        low, high = sorted((luminance(colour), 0.0 if text == "black" else 1.0))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour
        used[text] += 1
    assert min(used.values()) > 30


def test_no_label_covers_a_better_one():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (250, 150), (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 60, (60, 2))], 1).tolist()
    names, scores = [f"class {i}" for i in range(60)], np.linspace(0.9, 0.1, 60).tolist()
    everything = drawn(boxes, names, scores)
    for count in (1, 5, 20):
        first = drawn(boxes[:count], names[:count], scores[:count])
        there = first.any(2)
        np.testing.assert_array_equal(everything[there], first[there])
    shown = [i for i in range(60) if (everything == (250, 100 + i, 100)).all(2).any()]
    assert shown[0] == 0 and 10 < len(shown) < 60  # others are left out


@pytest.mark.parametrize(
    "box",
    [[280, 100, 299, 120], [0, 0, 40, 40], [290, 0, 300, 9], [-30, 195, 5, 200], [299, 199, 300, 200]],
)
def test_no_label_is_cut_at_the_border(box):
    in_the_middle = cut_out(drawn([[100, 100, 110, 110]], ["Ägypten"], [0.5]))
    np.testing.assert_array_equal(cut_out(drawn([box], ["Ägypten"], [0.5])), in_the_middle)
    assert min(in_the_middle.shape[:2]) > 10


def test_long_names_are_shortened_and_scores_are_not():
    def width(name, size):
        return cut_out(drawn([[0, 30, 20, 60]], [name], [0.5], size)).shape[1]

    assert width("elephant " * 20, (64, 64)) <= 64 < width("elephant " * 20, (900, 64))
    assert width("elephant " * 20, (64, 64)) > width("", (64, 64)) + 10
    assert not drawn([[0, 3, 5, 9]], ["cat"], [0.5], (20, 60)).any()  # no room for a score
    assert not drawn([[0, 3, 5, 9]], ["cat"], [0.5], (60, 9)).any()


def test_the_best_box_is_on_top_of_the_others():
    box = [20.0, 60.0, 250.0, 150.0]
    best, both = (np.asarray(draw_boxes(Image.new("RGB", (300, 200)), [box] * n, [0, 1][:n], [""] * n)) for n in (1, 2))
    np.testing.assert_array_equal(both, best)
