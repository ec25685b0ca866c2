"""Image files of every kind: what is read, and what is refused in one line."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from detr.errors import DataError
from detr.images import Reading, draw_boxes, read_header, read_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def read(path, size=None, **reading):
    return np.asarray(read_image(path, size, Reading(**reading)))


def tiff(path, numbers, order="<", orientation=1):
    """An uncompressed grey TIFF of any kind of numbers: Pillow writes few of them."""
    numbers = numbers.astype(numbers.dtype.newbyteorder(order))
    data = numbers.tobytes()
    (height, width), kind = numbers.shape, {"u": 1, "i": 2, "f": 3}[numbers.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * numbers.itemsize, 259: 1, 262: 1, 273: 8, 274: orientation, 277: 1}
    tags |= {278: height, 279: len(data), 339: kind}
    entries = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4))


def test_rgb_and_grey(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert not read_header(tmp_path / "rgb.png", (4, 6)).deep
    np.testing.assert_array_equal(read(tmp_path / "rgb.png"), RGB)
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), GREY[..., None].repeat(3, 2))


# 200 even steps: the 0.5 percentile is 0.995 of them above the least, and the 99.5 percentile as much below the largest
STEPS = np.arange(200).reshape(10, 20)
MAPPED = ((STEPS - 0.995) / (199 - 2 * 0.995) * 255).clip(0, 255).round()


@pytest.mark.parametrize(
    ("dtype", "low", "step"),
    [
        *[(np.uint16, 0, 1), (np.uint16, 29000, 4), (np.uint16, 40, 300), (np.int16, -3000, 20)],
        *[(np.uint32, 2**32 - 10**9, 4 * 10**6), (np.int32, -(2**31), 2 * 10**7), (np.float32, 0, 2.0**-9)],
        *[(np.float32, -(2.0**127), 2.0**119)],
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_deep_grey_is_mapped_by_its_percentiles(tmp_path, dtype, low, step, order):
    numbers = (low + STEPS.astype(np.float64) * step).astype(dtype)
    tiff(tmp_path / "deep.tif", numbers, order)
    if (dtype, order) == (np.uint32, ">"):
        with pytest.raises(DataError, match="not a readable image: cannot identify"):  # Pillow cannot
            read_image(tmp_path / "deep.tif")
        return
    assert read_header(tmp_path / "deep.tif").deep
    np.testing.assert_array_equal(read(tmp_path / "deep.tif"), MAPPED[..., None].repeat(3, 2))


def test_deep_grey_of_a_png(tmp_path):
    Image.fromarray((STEPS * 7 + 100).astype(np.uint16)).save(tmp_path / "deep.png")
    assert read_header(tmp_path / "deep.png").deep
    np.testing.assert_array_equal(read(tmp_path / "deep.png"), MAPPED[..., None].repeat(3, 2))


@pytest.mark.parametrize("constant", [0, 7, 65535, np.float32("nan"), np.float32("inf")])
def test_constant_deep_grey_is_black(tmp_path, constant):
    numbers = np.full((5, 5), constant, np.float32 if isinstance(constant, np.floating) else np.uint16)
    tiff(tmp_path / "constant.tif", numbers)
    assert not read(tmp_path / "constant.tif").any()


def test_deep_grey_with_few_bright_pixels(tmp_path):
    """Fewer than the percentiles see: they are still told from the rest."""
    numbers = np.full((40, 40), 500, np.uint16)
    numbers[3, 5], numbers[4, 5] = 1500, 1000
    tiff(tmp_path / "spots.tif", numbers)
    expected = np.zeros((40, 40), np.uint8)
    expected[3, 5], expected[4, 5] = 255, 128
    np.testing.assert_array_equal(read(tmp_path / "spots.tif")[..., 0], expected)


def test_deep_grey_that_is_not_finite(tmp_path):
    numbers = STEPS.astype(np.float32)
    numbers[[0, 0, 9], [0, 1, 19]] = np.nan, -np.inf, np.inf
    tiff(tmp_path / "holes.tif", numbers)
    grey = read(tmp_path / "holes.tif")[..., 0]
    assert grey[[0, 0, 9], [0, 1, 19]].tolist() == [0, 0, 255]
    low, high = 2 + 0.005 * 196, 2 + 0.995 * 196  # percentiles of 2 to 198
    expected = ((STEPS - low) / (high - low) * 255).clip(0, 255).round()
    np.testing.assert_array_equal(grey[1:9], expected[1:9])


def test_transparency_is_dropped(tmp_path):
    alpha = np.arange(24, dtype=np.uint8).reshape(6, 4, 1)
    Image.fromarray(np.concatenate([RGB, alpha], 2), "RGBA").save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read(tmp_path / "rgba.png"), RGB)


@pytest.mark.parametrize("transparency", [None, 1])
def test_palette(tmp_path, transparency):
    image = Image.fromarray(GREY // 64, "P")
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50, 255, 255, 255])
    image.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    table = np.array([[0, 0, 0], [10, 20, 30], [200, 100, 50], [255, 255, 255]])
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), table[GREY // 64])


def test_cmyk(tmp_path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 1:3] = 255  # full magenta and yellow: red
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read(tmp_path / "cmyk.jpg").astype(int) - (255, 0, 0)).max() <= 3


# how stored pixels are seen
SEEN = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", SEEN)
def test_exif_orientation(tmp_path, orientation, kind):
    stored = np.kron(np.array([[0, 90, 250], [170, 210, 40]], np.uint8), np.ones((8, 8), np.uint8))
    path = tmp_path / f"image.{kind}"
    if kind == "tif":
        tiff(path, stored, orientation=orientation)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    seen = SEEN[orientation](stored)
    size = seen.shape[::-1]

    def assert_reads(expected, size=None, **reading):
        np.testing.assert_allclose(read(path, size, **reading)[..., 0], expected, atol=3)
        return read_header(path, size, Reading(**reading)).doubtful

    assert not assert_reads(seen)
    assert not assert_reads(stored, exif="ignore")
    assert assert_reads(seen, size) == (orientation in (2, 3, 4))
    assert not assert_reads(stored, (24, 16), exif="ignore")
    if orientation > 4:
        assert not assert_reads(stored, (24, 16))  # annotated without looking at the orientation
        for reader in (read_image, read_header):
            with pytest.raises(DataError, match="the image is 24x16 pixels as stored, expected 16x24"):
                reader(path, (16, 24), Reading(exif="ignore"))


def test_exif_that_comes_after_the_pixels_of_a_png(tmp_path):
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, :2] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    path = tmp_path / "late.png"
    path.write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    header = read_header(path, (4, 6))
    assert (header.orientation, header.turn, header.doubtful) == (6, True, False)
    np.testing.assert_array_equal(read(path, (4, 6)), np.rot90(stored, -1))
    with pytest.raises(DataError, match="6x4 pixels as stored, expected 4x6"):
        read_header(path, (4, 6), Reading(exif="ignore"))


@pytest.mark.parametrize("orientation", SEEN)
def test_exif_orientation_of_a_square(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB[:4]).save(tmp_path / "square.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "square.png", (4, 4)), SEEN[orientation](RGB[:4]))
    np.testing.assert_array_equal(read(tmp_path / "square.png", (4, 4), exif="ignore"), RGB[:4])
    assert read_header(tmp_path / "square.png", (4, 4)).doubtful == (orientation > 1)


def test_exif_that_says_nothing(tmp_path):
    for name, content in {"damaged": b"Exif\0\0no TIFF at all", "absurd": None}.items():
        exif = Image.Exif()
        exif[0x0112] = 77
        Image.fromarray(RGB).save(tmp_path / f"{name}.png", exif=content or exif)
        np.testing.assert_array_equal(read(tmp_path / f"{name}.png", (4, 6)), RGB)


def test_refused(tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "not a readable image"),
        ("none.jpg", "the image file is missing"),
    ):
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="the image is 90x90 pixels, expected 90x80"):
        read_image(tmp_path / "whole.jpg", (90, 80))


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("limit", [8000, 4000, 2000])  # Pillow itself warns at its limit and refuses at twice of it
def test_more_pixels_than_allowed(tmp_path, monkeypatch, recwarn, kind, limit):
    """A header may promise more pixels than anyone takes photographs with."""
    path = tmp_path / f"large.{kind}"
    Image.new("RGB", (90, 90), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("detr.images.MAX_PIXELS", limit)
    for reader in (read_image, read_header):
        with pytest.raises(DataError, match=r"^more than 0 million pixels, .*--large-images reads it all the same$"):
            reader(path)
    assert read(path, large=True).shape == (90, 90, 3)
    read_header(path, (90, 90), Reading(large=True))
    assert not recwarn


def test_draw_boxes_marks_the_border_of_the_box_only():
    black = Image.new("RGB", (60, 40))
    drawn = np.asarray(draw_boxes(black, [[10.0, 20.0, 30.0, 35.0]], [0], [""]))
    assert np.asarray(black).max() == 0
    changed = drawn.any(2)
    expected = np.zeros((40, 60), bool)
    expected[20:36, 10:31] = True
    expected[21:35, 11:30] = False
    np.testing.assert_array_equal(changed, expected)


def test_draw_boxes_shows_the_far_borders_of_a_box_as_large_as_the_image():
    boxes = [[0.0, 0.0, 60.0, 40.0], [59.5, 39.5, 60.0, 40.0]]
    drawn = np.asarray(draw_boxes(Image.new("RGB", (60, 40)), boxes, [0, 0], ["", ""]))
    assert (drawn[:, -1].any(1)).all() and (drawn[-1].any(1)).all() and not drawn[1:-1, 1:-1].any()
