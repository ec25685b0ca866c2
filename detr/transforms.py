"""What happens to an image and its boxes between the file and the model, in training and in evaluation."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from detr.config import Config

# of ImageNet, as torchvision's pre-trained backbones expect
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
EARLY_PASSES = 8  # over the training images, without random windows
NOISE = 0.5  # centres move by up to NOISE / 2 of the sides, and sides are multiplied by exp(-NOISE) to exp(NOISE)
# sides of a random window, as factors on the image's, and on top of it the height's factor, which divides the width
SCALE, STRETCH = (0.6, 1.4), (1 / 1.2, 1.2)
LEAST_VISIBLE = 0.3  # of a box's area: less of an object is not asked for


class Transform:
    """(uint8 image [3, H, W], boxes [T, 4] xyxy pixels, labels [T]) -> (normalised float32 image, boxes, labels)."""

    def __init__(self, *steps: nn.Module) -> None:
        float_image = {tv_tensors.Image: torch.float32, "others": None}
        self.steps = v2.Compose([*steps, v2.ToDtype(float_image, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
        sample = self.steps({"image": tv_tensors.Image(image), "boxes": boxes, "labels": labels})
        return sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor), sample["labels"]


class RandomSizedCrop(v2.Transform):
    """Crop to a width and a height drawn independently from [smallest, largest], as far as the image is that large."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        height, width = v2.functional.get_size(flat_inputs[0])
        h, w = (self._draw(min(self.smallest, n), min(self.largest, n)) for n in (height, width))
        return {"top": self._draw(0, height - h), "left": self._draw(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return v2.functional.crop(inpt, **params)

    @staticmethod
    def _draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))


class RandomWindow(v2.Transform):
    """A random part of the image, or the image within a black margin, stretched to the size that the image had.

    Objects come larger, smaller, wider, taller and in other places. A box stays, cut off at the border, where at least
    LEAST_VISIBLE of it is seen. SCALE and STRETCH are drawn evenly on a logarithmic scale.
    """

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        image, boxes = sample["image"], sample["boxes"]
        height, width = image.shape[-2:]
        scale, stretch = (math.exp(self._draw(math.log(low), math.log(high))) for low, high in (SCALE, STRETCH))
        h, w = max(1, round(height * scale * stretch)), max(1, round(width * scale / stretch))
        top, left = (round(self._draw(min(0, n - part), max(0, n - part))) for n, part in ((height, h), (width, w)))
        image = v2.functional.resized_crop(image, top, left, h, w, [height, width], antialias=True)
        # by hand: torchvision's crop cuts boxes off, and what was outside is not known any more
        ends = torch.tensor([width, height] * 2)
        moved = (boxes.as_subclass(Tensor) - torch.tensor([left, top] * 2)) * ends / torch.tensor([w, h] * 2)
        seen = torch.minimum(moved.clamp(min=0), ends)
        whole, part = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (moved, seen))
        keep = (part >= LEAST_VISIBLE * whole) & (part > 0)
        return {"image": image, "boxes": tv_tensors.wrap(seen[keep], like=boxes), "labels": sample["labels"][keep]}

    @staticmethod
    def _draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(()))


def noised(boxes: Tensor, most: int) -> Tensor:
    """Boxes near `boxes` [T, 4] (cx, cy, w, h), for a decoder to correct (arXiv 2203.01305, section 4.2).

    The centre is moved by up to a quarter of the sides, and each side multiplied by 0.6 to 1.65. The IoU with the
    object is then 0.54 on the mean; that of a small detector's proposals is 0.6 to 0.75.

    Args:
        most: there are as many copies of all boxes as come to so many, but one at least.
    Returns:
        [copies * T, 4], the first copy of all boxes, then the second.
    """
    boxes = boxes.repeat(max(1, most // max(1, len(boxes))), 1)
    centre, size = boxes[:, :2], boxes[:, 2:]
    shift, factor = torch.rand(2, *size.shape)
    moved = torch.cat([centre + NOISE * (shift - 0.5) * size, size * (NOISE * (2 * factor - 1)).exp()], 1)
    # nearer to an end the sigmoid of a box hardly moves any more
    return moved.clamp(0.005, 0.995)


def resize(image: Tensor, shortest: int, longest: int) -> Tensor:
    """[3, H, W] uint8 in its proportions, the short side of `shortest` pixels unless the long one exceeds `longest`."""
    return v2.functional.resize(image, resized_size(*image.shape[-2:], shortest, longest), antialias=True)


def resized_size(height: int, width: int, shortest: int, longest: int) -> list[int]:
    """(height, width) after `resize`, in pixels."""
    scale = min(shortest / min(height, width), longest / max(height, width))
    return [max(1, round(height * scale)), max(1, round(width * scale))]


def training_transform(config: Config) -> Transform:
    """Random augmentation, drawn from torch's global generator: the recipe `config.augment`."""
    if config.augment == "tiny":
        return Transform(v2.RandomHorizontalFlip())
    if config.augment == "window":
        return Transform(v2.RandomHorizontalFlip(), v2.RandomApply([RandomWindow()]))
    # the original's sizes are for image_size 800; other image sizes keep their proportions
    sizes, before_crop, crop = (
        [round(size * config.image_size / 800) for size in original]
        for original in (range(480, 801, 32), (400, 500, 600), (384, 600))
    )
    multi_scale = v2.RandomShortestSize(sizes, max_size=config.max_size)
    cropped = v2.Compose([v2.RandomShortestSize(before_crop), RandomSizedCrop(*crop), multi_scale])
    return Transform(
        v2.RandomHorizontalFlip(),
        v2.RandomChoice([multi_scale, cropped]),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(),
    )


def early(config: Config) -> tuple[Transform | None, int]:
    """The transform of the first passes over the images, and their number.

    An image that was seen a few times only is not known by heart yet, and is learned faster as it is.
    """
    return (Transform(v2.RandomHorizontalFlip()), EARLY_PASSES) if config.augment == "window" else (None, 0)


def evaluation_transform() -> Transform:
    """Nothing but normalisation: images arrive resized."""
    return Transform()
