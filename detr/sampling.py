"""Where a query looks: the sampling points of the decoder, drawn as in the paper's Figure 6 (arXiv 2010.04159)."""

import colorsys
import inspect

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from detr.errors import ArgumentError
from detr.images import draw_boxes
from msda_triton import MSDeformAttn


def sampling_points(model: nn.Module, image: Tensor, layer: int = -1) -> tuple[dict, Tensor, Tensor]:
    """Run the model on one image, and recompute what a decoder layer's attention sampled.

    Args:
        image: [3, H, W], normalised, on the model's device. layer: of the decoder, from 0; -1 is the last.
    Returns:
        The model's outputs; locations [Q, M, L, P, 2] (x, y) in [0, 1] of the image, which the points may leave; and
        weights [Q, M, L, P], which sum to 1 for each query and head.
    Raises:
        ArgumentError: the model attends to every pixel and samples nothing.
    """
    attention = model.transformer.decoder.layers[layer].cross_attn
    if not isinstance(attention, MSDeformAttn):
        raise ArgumentError("attention: a model with global attention has no sampling points")
    seen = []
    arguments_of = inspect.signature(attention.forward).bind
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(arguments_of(*args, **kwargs).arguments), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            outputs = model(image[None], torch.zeros(1, *image.shape[1:], dtype=torch.bool, device=image.device))
    finally:
        hook.remove()
    [given] = seen
    with torch.inference_mode():
        locations, weights = attention.locations_and_weights(
            given["query"], given["reference_points"], given["input_spatial_shapes"]
        )
    return outputs, locations[0], weights[0]


def draw_sampling_points(
    picture: Image.Image,
    locations: Tensor,
    weights: Tensor,
    box: list[float],
    label: int,
    name: str,
    score: float,
) -> Image.Image:
    """A query's points on its image: blue for the smallest weight to red for the largest, and its box.

    Args:
        locations: [M, L, P, 2] and weights [M, L, P] of the query. box: x0, y0, x1, y1 in the picture's pixels.
        name: of the class, as from `detr.labels.drawable_names`.
    """
    drawn = draw_boxes(picture, [box], [label], [name], [score])
    draw = ImageDraw.Draw(drawn)
    radius = max(2, round(max(picture.size) / 200))
    points = (locations.reshape(-1, 2) * torch.tensor(picture.size, device=locations.device)).tolist()
    heat = (weights.flatten() / weights.max()).tolist()
    for (x, y), w in sorted(zip(points, heat, strict=True), key=lambda pair: pair[1]):  # the heaviest on top
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb((1 - w) * 2 / 3, 1.0, 1.0))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="black")
    return drawn
