"""The subcommand `inspect`: what a checkpoint is, and where one of its queries looks."""

import argparse

import torch

from detr import checkpoint
from detr.errors import DataError
from detr.flags import checkpoint_of, reading_of
from detr.images import read_image
from detr.labels import drawable_names
from detr.output import MARKED, OutputError, claim_file, picture_of, write_file
from detr.postprocess import best_of_each_query
from detr.predict import load_pixels
from detr.sampling import draw_sampling_points, sampling_points


def run_inspection(options: argparse.Namespace, device: torch.device) -> int:
    """Say what a checkpoint is, and draw what a query samples if --image is given; the exit code."""
    if options.image:
        if options.out.suffix.lower() not in MARKED:
            raise OutputError(f"{options.out}: expected a name that ends in one of {', '.join(MARKED)}")
        claim_file(options.out, "detr inspect")
    file = checkpoint_of(options.checkpoint)
    content = checkpoint.load(file)
    model, config = checkpoint.model_of(content, file)
    model, categories = model.to(device).eval(), checkpoint.classes_of(content)
    print(checkpoint.describe(content, model))
    if not options.image:
        return 0
    try:
        picture = read_image(options.image, None, reading_of(vars(options)))
    except DataError as error:
        raise DataError(f"{options.image}: {error}") from None
    layer = options.layer or config.dec_layers
    if layer > config.dec_layers:
        raise DataError(f"--layer: expected at most {config.dec_layers}, got {layer}")
    try:
        outputs, locations, weights = sampling_points(model, load_pixels(picture, config).to(device), layer - 1)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{options.checkpoint}: {error}") from None
    # one detection for each query, in the order of queries
    scores, labels, boxes = best_of_each_query(outputs, picture.size)
    query = int(scores.argmax()) if options.query is None else options.query
    if query >= len(scores):
        raise DataError(f"--query: expected a number below {len(scores)}, got {query}")
    label = int(labels[query])
    box, score = boxes[query].tolist(), float(scores[query])
    category_id, name = list(categories.items())[label]
    [shown] = drawable_names({category_id: name})
    drawn = draw_sampling_points(picture, locations[query], weights[query], box, label, shown, score)
    write_file(options.out, picture_of(drawn, options.out.suffix, "detr inspect"), "detr inspect")
    count = weights[query].numel()
    print(f"{options.out}: the {count} points that query {query} ({name} {score:.2f}) samples in decoder layer {layer}")
    return 0
