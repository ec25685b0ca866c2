"""How much is in a dataset, and how large it is in a model."""

import math
from typing import Any

import numpy as np

from detr.config import Config
from detr.split import Split
from detr.terminal import one_line
from detr.transforms import resized_size


def tokens(size: tuple[int, int] | list[int], config: Config) -> int:
    """Tokens of all levels of an image of (height, width) pixels in the model."""
    strides = [8, 16, 16 if config.dilation else 32][-config.n_levels :]
    strides += [strides[-1] * 2 ** (i + 1) for i in range(config.n_levels - 3)]
    return sum(math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in strides)


def boxes_per_class(split: Split) -> dict[int, int]:
    """Boxes of each category id, crowds apart."""
    counts = np.bincount(split.images.labels[~split.images.crowd], minlength=len(split.categories))
    return dict(zip(split.categories, counts.tolist(), strict=True))


def summary(split: Split, config: Config) -> dict[str, Any]:
    """Counts of a faultless split, and its sizes in the model of `config`: see `summary_table`."""
    per_class, objects = boxes_per_class(split), split.images.objects
    sizes = {(height, width) for width, height in split.images.sizes.tolist()}
    resized = [resized_size(*size, config.image_size, config.max_size) for size in sizes]
    return {
        "images": len(split.images),
        "images_without_objects": int((objects == 0).sum()),
        "objects": int(objects.sum()),
        "crowds": int(split.images.crowd.sum()),
        "most_objects_in_an_image": int(objects.max(initial=0)),
        "objects_per_class": {split.categories[category_id]: count for category_id, count in per_class.items()},
        "shortest_side": [min(min(size) for size in sizes), max(min(size) for size in sizes)],
        "shortest_side_resized": [min(min(size) for size in resized), max(min(size) for size in resized)],
        "tokens": [min(tokens(size, config) for size in resized), max(tokens(size, config) for size in resized)],
        "n_queries": config.n_queries,
    }


def summary_table(counts: dict[str, Any]) -> str:
    """A `summary` for people."""

    def span(name: str) -> str:
        low, high = counts[name]
        return str(low) if low == high else f"{low} to {high}"

    rows = [
        ("images", f"{counts['images']}, {counts['images_without_objects']} of them without objects"),
        ("objects", f"{counts['objects']}, and {counts['crowds']} crowds, which are not trained on"),
        ("most in one image", f"{counts['most_objects_in_an_image']}; the model has {counts['n_queries']} queries"),
        ("shortest side", f"{span('shortest_side')} pixels; {span('shortest_side_resized')} in the model"),
        ("tokens", f"{span('tokens')} of an image in the model"),
    ]
    most, total = max(counts["objects_per_class"].values()), max(1, counts["objects"])
    for name, count in counts["objects_per_class"].items():
        rows.append((name, f"{count:>7} {100 * count / total:5.1f} %  {'#' * round(30 * count / max(1, most))}"))
    return "\n".join(f"  {one_line(name):<20} {text}" for name, text in rows)
