"""Pascal VOC: corners that count from 1, the places of its files, and every fault by file and object."""

import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import user_files
from PIL import Image

from detr.cli import main
from detr.errors import DataError
from detr.formats import Given, open_dataset
from detr.images import Reading
from detr.splits import load_split, read_part


def thing(name="ant", corners=(16, 6, 25, 15), more=""):
    box = "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


SIZE = "<size><width>40</width><height>20</height><depth>3</depth></size>"


def write(root, stem, *things, size=SIZE, annotations="Annotations", images="JPEGImages", file_name=None, **kwargs):
    """An image of 40 x 20 pixels and its xml."""
    for folder in (annotations, images):
        (root / folder).mkdir(parents=True, exist_ok=True)
    file_name = file_name or f"{stem}.png"
    xml = f"<annotation><filename>{file_name}</filename>{size}{''.join(things)}</annotation>"
    (root / annotations / f"{stem}.xml").write_text(xml)
    pixels = np.random.default_rng(zlib.crc32(stem.encode())).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / images / f"{stem}.png", **kwargs)
    return root / annotations / f"{stem}.xml"


def lists(root, **names):
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    for split, text in names.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text(text)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "a", thing("owl"), thing("ant", (1, 1, 40, 20)))
    write(tmp_path, "b", thing("bee"))
    write(tmp_path, "c", thing("ant"))
    lists(tmp_path, train="a\nb\n", val="c\n", ant_train="a 1\nb -1\n")
    return tmp_path


def test_boxes_in_numbers(root):
    dataset = open_dataset(root)
    assert (dataset.title, dataset.splits) == ("Pascal VOC", ["train", "val"])
    split = load_split(dataset)
    # of all splits, in the order of the alphabet
    assert split.categories == {1: "ant", 2: "bee", 3: "owl"}
    first, second = split.images
    assert (first.path, first.width, first.height) == (root / "JPEGImages/a.png", 40, 20)
    # the pixels 16 to 25 are ten, and the whole image is the whole image
    assert first.boxes.tolist() == [[15, 5, 25, 15], [0, 0, 40, 20]] and first.labels.tolist() == [2, 0]
    assert first.areas.tolist() == [100, 800]
    assert second.labels.tolist() == [1]
    assert load_split(dataset, "val").categories == split.categories
    # one pixel is a box
    write(root, "b", thing("bee", (40, 20, 40, 20)))
    assert load_split(root).images[1].boxes.tolist() == [[39, 19, 40, 20]]


def test_the_order_of_classes(root):
    given = open_dataset(root, given=Given(("owl", "cow", "bee", "ant")))
    split = load_split(given)
    assert split.class_names == ["owl", "cow", "bee", "ant"] and split.images.labels.tolist() == [0, 3, 2]
    (root / "classes.txt").write_text("bee\nowl \nant\n\n")
    split = load_split(root)
    assert split.class_names == ["bee", "owl", "ant"] and split.images.labels.tolist() == [1, 2, 0]
    # the flag has the last word, and a class that is in neither is named by file and object
    with pytest.raises(DataError, match=r"a\.xml: object 2: name: class 'ant' is not one of --classes$"):
        load_split(open_dataset(root, given=Given(("owl", "bee"))))
    (root / "classes.txt").write_text("owl\nbee\n")
    with pytest.raises(DataError, match=r"a\.xml: object 2: name: class 'ant' is not one of .*/classes\.txt$"):
        load_split(root)
    for text in ("", "owl\nowl\n", "owl\n\nbee\n"):
        (root / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=r"classes\.txt: expected a name on each line, no two the same, got"):
            load_split(root)
    (root / "classes.txt").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"classes\.txt: byte 0: expected text in UTF-8: "):
        load_split(root)


def test_difficult_objects_are_crowds(root, capsys):
    write(root, "a", thing("owl"), thing("ant", more="<difficult>1</difficult>"), thing("ant", (1, 1, 40, 20)))
    with pytest.warns(
        UserWarning, match=r"difficult: 1, the first: .*a\.xml: object 2: difficult: is difficult, so it"
    ):
        split = load_split(root)
    assert split.images[0].crowd.tolist() == [False, True, False]
    assert main(["check-data", str(root)]) == 0
    out = capsys.readouterr().out
    assert "objects              3, and 1 crowds, which are not trained on" in out
    assert "warning difficult: 1, the first: " in out


LAYOUTS = {
    "Annotations and images": {"annotations": "annotations", "images": "images"},
    "Annotations beside the images": {"images": "."},
    "all in one": {"annotations": ".", "images": "."},
    "in Annotations": {"images": "Annotations"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_places_of_files(tmp_path, name):
    for stem in "ba":
        write(tmp_path, stem, thing(), **LAYOUTS[name])
    dataset = open_dataset(tmp_path)
    assert dataset.format == "voc" and dataset.splits == ["train"]
    assert [image.path.stem for image in load_split(dataset).images] == ["a", "b"]


@pytest.mark.parametrize("inside", ["", "Annotations"])
def test_a_folder_for_each_split(tmp_path, inside):
    """As Roboflow writes it."""
    for split, stem in (("train", "a"), ("train", "b"), ("valid", "c"), ("test", "d")):
        images = f"{split}/JPEGImages" if inside else split
        write(tmp_path, stem, thing(), annotations=f"{split}/{inside}", images=images)
    dataset = open_dataset(tmp_path)
    assert dataset.format == "voc" and dataset.splits == ["train", "val", "test"]
    assert [len(load_split(dataset, split).images) for split in dataset.splits] == [2, 1, 1]


def test_lists(root):
    lists(root, train="b\t-1\r\n\na.png\n")
    assert [image.path.stem for image in load_split(root).images] == ["b", "a"]
    # of CVAT
    lists(root, Train="b\n", Validation="c\n")
    for name in ("train", "val"):
        (root / "ImageSets/Main" / f"{name}.txt").rename(root / f"{name}.txt")
    dataset = open_dataset(root)
    assert dataset.splits == ["train", "val"] and load_split(dataset).names == ["b.png"]
    for name in ("Train", "Validation"):
        (root / "ImageSets/Main" / f"{name}.txt").unlink()
    for name in ("train", "val"):
        (root / f"{name}.txt").rename(root / "ImageSets/Main" / f"{name}.txt")
    # trainval, where there is no train
    (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/trainval.txt")
    dataset = open_dataset(root)
    assert dataset.splits == ["train", "val"] and len(load_split(dataset).images) == 2
    lists(root, trainval="a\na\nz\nb\n")
    problems = read_part(open_dataset(root), "train").problems
    list_ = root / "ImageSets/Main/trainval.txt"
    assert [str(problem) for problem in problems] == [
        f"{list_}: line 2: {root}/Annotations/a.xml is named by {list_}: line 1 too",
        f"{list_}: line 3: no xml at {root}/Annotations/z.xml",
    ]
    assert [problem.fatal for problem in problems] == [False, True]


def test_an_image_in_two_lists(root, capsys):
    lists(root, val="c\nb\n")
    assert main(["check-data", str(root)]) == 0
    message = f"{root}/JPEGImages/b.png is {root}/JPEGImages/b.png, an image of the training"
    assert f"seen in training: 1, the first: {root}/Annotations/b.xml: {message}" in capsys.readouterr().out


def test_a_billion_laughs_are_refused_at_once(root):
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE annotation [<!ENTITY l0 "ha">{entities}]><annotation><filename>&l9;</filename></annotation>'
    (root / "Annotations/b.xml").write_text(bomb)
    start = time.perf_counter()
    [problem] = read_part(open_dataset(root), "train").problems
    assert problem.fatal and "refused: it defines entities" in problem.message and time.perf_counter() - start < 5


def test_images_are_found_by_name(tmp_path):
    # by the name of the xml, whatever it says of itself
    write(tmp_path, "a", thing(), file_name="C:\\photos\\other.jpg")
    # by what it says, where there is no other
    xml = write(tmp_path, "b", thing())
    xml.rename(xml.with_name("label_b.xml"))
    (tmp_path / "JPEGImages/a.png").rename(tmp_path / "JPEGImages/a.PNG")
    split = load_split(tmp_path)
    assert [image.path.name for image in split.images] == ["a.PNG", "b.png"]
    write(tmp_path, "c", thing(), file_name="b.png")
    (tmp_path / "JPEGImages/c.png").unlink()
    [problem] = read_part(open_dataset(tmp_path), "train").problems
    message = f"{tmp_path}/JPEGImages/b.png is the image of {tmp_path}/Annotations/c.xml too"
    assert problem.fatal and str(problem) == f"{tmp_path}/Annotations/label_b.xml: filename: {message}"


def test_an_image_without_an_xml_is_left_out(tmp_path):
    for stem in "ab":
        write(tmp_path, stem, thing())
    (tmp_path / "Annotations/b.xml").unlink()
    with pytest.warns(UserWarning, match=r"image without xml: 1, the first: .*JPEGImages/b\.png: is left out"):
        assert len(load_split(tmp_path).images) == 1
    # lists say which are meant
    lists(tmp_path, train="a\n")
    assert read_part(open_dataset(tmp_path), "train").problems == []


@pytest.mark.parametrize("size", ["", SIZE.replace("40", "0"), "<size><width/><height/></size>"])
def test_sizes_that_the_xml_lacks_are_those_of_the_image(tmp_path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, "a", thing(corners=(1, 1, 10, 10)), size=size, exif=exif)
    split = load_split(tmp_path)
    assert split.images.sizes.tolist() == [[20, 40]]
    assert load_split(tmp_path, reading=Reading("ignore")).images.sizes.tolist() == [[40, 20]]


def test_the_size_says_which_pixels_are_meant(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, "a", thing(), exif=exif)
    assert load_split(tmp_path).images.sizes.tolist() == [[40, 20]]


BOMB = (
    '<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
    "<annotation><filename>&b;</filename></annotation>"
)
OUTSIDE = (
    '<!DOCTYPE annotation [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>'
)
XMLS = {
    "an entity bomb": (BOMB, "refused: it defines entities, by which a small file fills the memory"),
    "an entity of another file": (OUTSIDE, "refused: it defines entities, .*"),
    "does not parse": ("<annotation><object></annotation>", r"line 1 column \d+: not xml: mismatched tag"),
    "half": ("<annotation><object>", r"line 1 column \d+: not xml: no element found"),
    "empty": ("", r"line 1 column 1: not xml: no element found"),
    "another xml": ("<project><annotation/></project>", "expected <annotation>, got <project>"),
    "an encoding": ('<?xml version="1.0" encoding="ebcdic-x"?><annotation/>', ".*not xml: .*"),
    "a size that is no number": (
        f"<annotation><filename>b.png</filename>{SIZE.replace('40', 'wide')}{thing()}</annotation>",
        "size: width: expected an integer, pixels, got wide",
    ),
    "half a pixel": (
        f"<annotation><filename>b.png</filename>{SIZE.replace('40', '40.5')}{thing()}</annotation>",
        r"size: width: expected an integer, pixels, got 40\.5",
    ),
    "another size": (
        f"<annotation><filename>b.png</filename>{SIZE.replace('40', '41')}{thing()}</annotation>",
        r".*b\.png: the image is 40x20 pixels, expected 41x20",
    ),
}


@pytest.mark.parametrize("name", XMLS)
def test_each_fault_of_an_xml_is_one_line(root, name, capsys):
    text, message = XMLS[name]
    (root / "Annotations/b.xml").write_text(text)
    problems = [problem for problem in read_part(open_dataset(root), "train").problems if problem.fatal]
    [problem] = problems
    assert re.fullmatch(f"{re.escape(str(root / 'Annotations/b.xml'))}: {message}", str(problem))
    assert main(["check-data", str(root)]) == 1
    assert f"the first: {problem}" in capsys.readouterr().out


OBJECTS = {
    "swapped": (
        thing(corners=(25, 6, 16, 15)),
        "bndbox: expected xmin <= xmax and ymin <= ymax, got xmin 25, ymin 6, xmax 16, ymax 15",
    ),
    "upside down": (thing(corners=(16, 15, 25, 6)), "bndbox: expected xmin <= xmax and ymin <= ymax, .*"),
    "NaN": (thing(corners=("nan", 6, 25, 15)), r"bndbox: expected 4 finite numbers .*, got \['nan', '6', '25', '15'\]"),
    "infinite": (thing(corners=(16, 6, "inf", 15)), "bndbox: expected 4 finite numbers .*"),
    "huge": (thing(corners=(16, 6, "9" * 400, 15)), "bndbox: expected 4 finite numbers .*"),
    "a word": (thing(corners=(16, "six", 25, 15)), "bndbox: expected 4 finite numbers .*"),
    "an empty corner": (thing(corners=(16, "", 25, 15)), "bndbox: expected 4 finite numbers .*"),
    "no corner": (thing().replace("<xmax>25</xmax>", ""), "bndbox: expected 4 finite numbers .*, got .*None.*"),
    "no box": ("<object><name>ant</name></object>", "bndbox: expected a box, got none"),
    "no name": (thing(""), "name: expected a text, got nothing"),
    "outside": (
        thing(corners=(16, 6, 42, 15)),
        r"bndbox: \[16, 6, 42, 15\] reaches outside its image of 40x20 pixels",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_each_fault_of_an_object_is_named_by_file_and_number(root, name, capsys):
    text, message = OBJECTS[name]
    xml = write(root, "b", thing("bee"), text, thing("owl", (1, 1, 2, 2)))
    [problem] = [problem for problem in read_part(open_dataset(root), "train").problems if problem.fatal]
    assert re.fullmatch(f"{re.escape(str(xml))}: object 2: {message}", str(problem))
    assert main(["train", "--data", str(root), "--out", str(root / "run")]) == 1
    assert f"detr train: error: {xml}: object 2: " in capsys.readouterr().err


def test_corners_that_count_from_0_are_warned_of(root):
    xml = write(root, "b", thing("bee", (0, 0, 39, 19)))
    [problem] = read_part(open_dataset(root), "train").problems
    assert not problem.fatal
    assert str(problem) == (
        f"{xml}: object 1: bndbox: corners count from 1, so 0 is outside: taken for the border of the image"
    )
    with pytest.warns(UserWarning, match="corner 0: 1, the first: "):
        assert load_split(root).images[1].boxes.tolist() == [[0, 0, 39, 19]]


def test_boxes_in_fractions(root):
    for stem in "abc":
        write(root, stem, thing("ant", (0.25, 0.25, 0.75, 0.75)), thing("bee", (0.1, 0.25, 0.3, 0.75)))
    fatal = [problem for problem in read_part(open_dataset(root), "train").problems if problem.fatal]
    assert {problem.kind for problem in fatal} == {"fractions"} and len(fatal) == 4


def test_an_image_that_is_missing_or_broken(root):
    (root / "JPEGImages/b.png").unlink()
    [problem] = read_part(open_dataset(root), "train").problems
    assert str(problem) == (
        f"{root}/Annotations/b.xml: filename: no image in {root}/JPEGImages for it: looked for b and b.png"
    )
    (root / "JPEGImages/b.png").write_text("x")
    [problem] = read_part(open_dataset(root), "train").problems
    assert str(problem).startswith(f"{root}/Annotations/b.xml: {root}/JPEGImages/b.png: not a readable image: ")
    write(root, "b", thing("bee"), size="")
    (root / "JPEGImages/b.png").write_text("x")
    [problem] = read_part(open_dataset(root), "train").problems
    assert str(problem).startswith(f"{root}/Annotations/b.xml: {root}/JPEGImages/b.png: not a readable image: ")


def test_other_xml_files_are_no_dataset(tmp_path):
    (tmp_path / "pom.xml").write_text("<project/>")
    with pytest.raises(
        DataError, match=r"no dataset: looked for .* Annotations/\*\.xml, with ImageSets.*; found pom\.xml$"
    ):
        open_dataset(tmp_path)


def test_a_class_that_the_training_did_not_have(root):
    with pytest.raises(DataError, match=r"a\.xml: class 'owl' is none of the training, which has 'ant', 'bee'"):
        load_split(root, "train", {4: "ant", 9: "bee"})
    split = load_split(root, "train", {4: "owl", 9: "cow", 10: "ant", 11: "bee"})
    assert split.images.labels.tolist() == [0, 2, 3] and split.class_names == ["owl", "cow", "ant", "bee"]


@pytest.mark.parametrize(
    ("text", "difficult"),
    [
        ("0", False),
        (" 1 ", True),
        ("true", True),
        ("False", False),
        ("Unspecified", False),
        ("", False),
        ("\n", False),
        ("yes", True),
    ],
)
def test_ways_to_write_difficult(root, text, difficult):
    write(root, "b", thing("bee", more=f"<difficult>{text}</difficult>"), thing("ant"))
    split = read_part(open_dataset(root), "train").split
    assert split.images.crowd.tolist() == [False, False, difficult, False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("<difficult>2</difficult>", "difficult: expected 0 or 1, got 2"),
        ("<difficult>0</difficult><difficult>1</difficult>", "difficult: expected one, got 2"),
        ("<name>owl</name>", "name: expected one, got 2"),
        ("<bndbox></bndbox>", "bndbox: expected one, got 2"),
    ],
)
def test_fields_that_say_two_things(root, more, message):
    xml = write(root, "b", thing("bee", more=more))
    [problem] = read_part(open_dataset(root), "train").problems
    assert problem.fatal and str(problem) == f"{xml}: object 1: {message}"


def test_folders_of_splits_come_before_a_stray_xml(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path, "a", thing(), annotations=split, images=split)
    write(tmp_path, "example", thing(), annotations=".", images=".")
    assert open_dataset(tmp_path).splits == ["train", "val"]


def test_what_macos_leaves_beside_an_xml(root):
    for name in ("._a.xml", "._b.xml", "._c.xml", "._d.xml", "._e.xml", "._f.xml"):
        (root / "Annotations" / name).write_bytes(b"\0\5")
    (root / "ImageSets/Main/train.txt").unlink()
    (root / "ImageSets/Main/val.txt").unlink()
    assert [path.stem for path in map(Path, load_split(root).images.paths)] == ["a", "b", "c"]


def test_a_name_with_a_dot_is_no_suffix(root):
    lists(root, train="a.v2\n")
    [problem] = [problem for problem in read_part(open_dataset(root), "train").problems if problem.fatal][:1]
    assert str(problem) == f"{root}/ImageSets/Main/train.txt: line 1: no xml at {root}/Annotations/a.v2.xml"


def test_an_xml_that_cannot_be_read(root):
    with user_files.unreadable(root / "Annotations/b.xml"):
        [problem] = [problem for problem in read_part(open_dataset(root), "train").problems if problem.fatal]
    assert str(problem) == f"{root}/Annotations/b.xml: not read: Permission denied"
    (root / "JPEGImages/a.png").rename(root / "JPEGImages/a.Png")
    assert load_split(root).names == ["a.Png", "b.png"]


def test_the_order_is_that_of_the_images(tmp_path):
    for stem in ("a", "a.k", "a-1"):
        write(tmp_path, stem, thing())
    assert load_split(tmp_path).names == ["a.png", "a-1.png", "a.k.png"]
