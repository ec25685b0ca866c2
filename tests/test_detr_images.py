"""Image files of every kind: what is read, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from detr.images import DataError, draw_boxes, read_image, read_size

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def read(path, size=None):
    return np.asarray(read_image(path, size))


def test_rgb_and_grey(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert read_size(tmp_path / "rgb.png") == (4, 6)
    np.testing.assert_array_equal(read(tmp_path / "rgb.png"), RGB)
    np.testing.assert_array_equal(read(tmp_path / "grey.png"), GREY[..., None].repeat(3, 2))


def test_16_bit_is_scaled_and_not_clipped(tmp_path):
    deep = GREY.astype(np.uint16) * 256 + 77
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read(tmp_path / "deep.png"), GREY[..., None].repeat(3, 2))


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


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(RGB, -1)
    np.testing.assert_array_equal(read(tmp_path / "turned.png"), upright)
    np.testing.assert_array_equal(read(tmp_path / "turned.png", (6, 4)), upright)
    # annotated without looking at the orientation
    np.testing.assert_array_equal(read(tmp_path / "turned.png", (4, 6)), RGB)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, message in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "not a readable image"),
        ("none.jpg", "the image file is missing"),
        ("float.tif", "floating-point pixels, expected 8 or 16 bits"),
    ):
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="the image is 90x90 pixels, expected 90x80"):
        read_image(tmp_path / "whole.jpg", (90, 80))
    # a header that promises more pixels than anyone takes photographs with
    for limit in (8000, 4000):  # Pillow itself refuses at twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for reader in (read_image, read_size):
            with pytest.raises(DataError, match="pixels"):
                reader(tmp_path / "whole.jpg")


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
