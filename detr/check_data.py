"""Every fault of a split that would spoil a training, found before it starts, whatever format the split is from."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Iterator

from detr.config import Config
from detr.errors import DataError
from detr.images import DEEP, for_each, read_header, read_image
from detr.problems import Problem
from detr.split import Annotated, Split
from detr.summary import boxes_per_class, tokens
from detr.transforms import resized_size


def check_images(split: Split, decode: bool = False) -> Iterator[Problem]:
    """Image files that cannot be read, or are of another size, or may not be what they look like.

    Args:
        decode: read the pixels too, which finds truncated files.
    """

    def look(image: Annotated):
        size = (image.width, image.height)
        header = read_header(image.path, size, split.reading)
        if decode:
            read_image(image.path, size, split.reading)
        return header

    field = "file_name" if split.files is None else ""
    headers = for_each(look, split.images, f"checking {split.source}")
    for i, (path, header) in enumerate(zip(split.images.paths, headers, strict=True)):
        file, entry = split.place(i)
        name = "" if file == path else f"{path}: "
        if isinstance(header, DataError):
            yield Problem(file, "image file", entry, field, f"{name}{header}")
            continue
        if header.doubtful and split.own_sizes:
            message = (
                f"{name}EXIF orientation {header.orientation}, and width and height fit the turned pixels as well as "
                "the stored ones: boxes are taken to be of the turned; if they are not, --exif ignore"
            )
            yield Problem(file, "orientation in doubt", entry, field, message, False)
        if header.deep:
            yield Problem(file, "deep grey", entry, field, f"{name}{DEEP}", False)


def check_classes(split: Split, categories: dict[int, str]) -> Iterator[Problem]:
    """Classes that are not those of a training, `categories`: id -> name, in the order of labels.

    Names and ids have to be the same, for two files that number classes in another order are likely a mistake. But the
    same names in the same order are fine, and so are names alone in a format that has no ids.
    """
    if split.class_names == list(categories.values()):
        return
    id_of = {name: category_id for category_id, name in categories.items()}
    for label, (category_id, name) in enumerate(split.categories.items()):
        if split.own_ids and categories.get(category_id) != name:
            expected = f"{categories[category_id]!r}" if category_id in categories else "no such category"
            there = f" (category {id_of[name]} there)" if name in id_of else ""
            message = f"expected {expected}, got {name!r}{there}: classes must be those of the training"
            yield Problem(str(split.source), "class", f"category {category_id}", "name", message)
        elif name not in id_of:
            images = split.images.image_of_box[split.images.labels == label]
            file = split.place(int(images[0]))[0] if len(images) else str(split.source)
            known = ", ".join(map(repr, id_of))
            message = f"class {name!r} is none of the training, which has {known}"
            yield Problem(file, "class", "", "", message)


def check_objects(split: Split, hint: str = "") -> Iterator[Problem]:
    """Without a box that counts there is nothing to learn, and no average precision."""
    crowds, total = int(split.images.crowd.sum()), len(split.images.labels)
    if crowds == total:
        message = (
            f"the dataset is empty: expected a box in one of the {len(split.images)} images, found none that has an "
            f"area and counts; {crowds} are crowds, which are neither learned nor counted{hint}"
        )
        yield Problem(str(split.source), "empty", "", "", message)


def check_against(split: Split, config: Config) -> Iterator[Problem]:
    """What of a faultless split does not go well with a model; none of it is fatal."""
    for category_id, count in boxes_per_class(split).items():
        if not count:
            message = "no box is of this class, so it cannot be learned or evaluated"
            entry = f"category {category_id} ({split.categories[category_id]})"
            yield Problem(str(split.source), "class without examples", entry, "", message, False)
    for i, ((width, height), count) in enumerate(zip(split.images.sizes.tolist(), split.images.objects, strict=True)):
        if count > config.n_queries:
            message = f"{count} objects, and only n_queries = {config.n_queries} can be found"
            yield Problem(*_where(split, i, "too many objects"), message, False)
        size = resized_size(height, width, config.image_size, config.max_size)
        if config.two_stage and tokens(size, config) < config.n_queries:
            message = (
                f"resized to {size[1]}x{size[0]} pixels it has {tokens(size, config)} tokens, so no more than as many "
                f"of the n_queries = {config.n_queries}"
            )
            yield Problem(*_where(split, i, "few tokens"), message, False)


def _where(split: Split, i: int, kind: str) -> tuple[str, str, str, str]:
    file, entry = split.place(i)
    return file, kind, entry, ""


def check_pair(train: Split, val: Split) -> Iterator[Problem]:
    """Images of `val` that are images of `train` too, byte for byte; none of it is fatal."""
    in_train = defaultdict(list)  # other files may have the same digest
    for digest, path in zip(train.file_digests, train.images.paths, strict=True):
        in_train[digest].append(path)
    for i, (digest, path) in enumerate(zip(val.file_digests, val.images.paths, strict=True)):
        others = in_train.get(digest, ())
        other = next((x for x in others if os.path.samefile(path, x) or filecmp.cmp(path, x, shallow=False)), None)
        if other is not None:
            file, entry = val.place(i)
            message = f"{path} is {other}, an image of the training: what is measured on it says nothing of new images"
            yield Problem(file, "seen in training", entry, "file_name" if entry else "", message, False)
