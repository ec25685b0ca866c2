"""Changes to a dataset on the disk, for the tests of resumed runs."""

import json

from PIL import Image


def edit(work, split, change):
    path = work / "data" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_names(content):
    first, second, *_ = content["categories"]
    first["name"], second["name"] = second["name"], first["name"]


def renumber(content):
    """The first class is called and numbered as the second, and the other way round: labels change their meaning."""
    first, second, *_ = content["categories"]
    first["id"], second["id"] = second["id"], first["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 2, 2: 1}.get(annotation["category_id"], annotation["category_id"])


def add_class(content):
    content["categories"].append({"id": 9, "name": "ghost"})


def move_a_box(work):
    edit(work, "train", lambda content: content["annotations"][0]["bbox"].__setitem__(0, 1.5))


def change_a_label(work):
    def change(content):
        annotation = content["annotations"][1]
        annotation["category_id"] = annotation["category_id"] % 4 + 1

    edit(work, "val", change)


def make_a_crowd(work):
    edit(work, "val", lambda content: content["annotations"][0].update(iscrowd=1))


def reorder(work):
    edit(work, "train", lambda content: content["images"].reverse())


def replace_an_image(work):
    (work / "data" / "train" / "000001.jpg").write_bytes((work / "data" / "train" / "000002.jpg").read_bytes())


def rename_an_image(work):
    (work / "data" / "val" / "000001.jpg").rename(work / "data" / "val" / "other.jpg")
    edit(work, "val", lambda content: content["images"][1].update(file_name="other.jpg"))


def enlarge_an_image(work):
    path = work / "data" / "val" / "000000.jpg"
    Image.open(path).resize((80, 80)).save(path)
    edit(work, "val", lambda content: content["images"][0].update(width=80, height=80))


def drop_an_image(split):
    def change(content):
        last = content["images"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != last["id"]]

    return lambda work: edit(work, split, change)


CHANGES = {
    "a box": (move_a_box, "train: other boxes"),
    "a label": (change_a_label, "val: other labels"),
    "a crowd": (make_a_crowd, "val: other boxes"),
    "the order": (reorder, "train: the images in another order"),
    "an image": (replace_an_image, "train: other image files"),
    "a name": (rename_an_image, "val: images of other names"),
    "a size": (enlarge_an_image, "val: other image files, images of other sizes in pixels"),
    "one training image less": (drop_an_image("train"), "train: 4 images instead of 5"),
    "one validation image less": (drop_an_image("val"), "val: 2 images instead of 3"),
}
