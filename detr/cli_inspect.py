"""The subcommand `inspect`: what a checkpoint is, and where one of its queries looks."""

import argparse

from detr import checkpoint
from detr.detector import load_pixels
from detr.devices import device_of
from detr.errors import ArgumentError, OutputError
from detr.images import as_picture, reading_of
from detr.labels import drawable_names
from detr.output import MARKED, claim_file, picture_of, write_file
from detr.postprocess import best_of_each_query
from detr.sampling import draw_sampling_points, sampling_points
from detr.terminal import say


def run_inspection(options: argparse.Namespace) -> int:
    """Say what a checkpoint is, and draw what a query samples if --image is given; the exit code."""
    if options.image:
        if options.out.suffix.lower() not in MARKED:
            raise OutputError(f"{options.out}: expected a name that ends in one of {', '.join(MARKED)}")
        claim_file(options.out, "detr inspect")
    device, file = device_of(options.device), checkpoint.file_of(options.checkpoint)
    if said := checkpoint.taken(options.checkpoint, file):
        say(said)
    content = checkpoint.load(file)
    model, config = checkpoint.model_of(content, file)
    model, categories = model.to(device).eval(), checkpoint.classes_of(content)
    say(*checkpoint.describe(content, model, config).split("\n"))
    if not options.image:
        return 0
    picture = as_picture(options.image, "image", reading_of(vars(options)))
    layer = options.layer or config.dec_layers
    if layer > config.dec_layers:
        raise ArgumentError(f"--layer: expected at most {config.dec_layers}, got {layer}")
    outputs, locations, weights = sampling_points(model, load_pixels(picture, config).to(device), layer - 1)
    # one detection for each query, in the order of queries
    scores, labels, boxes = best_of_each_query(outputs, picture.size)
    query = int(scores.argmax()) if options.query is None else options.query
    if query >= len(scores):
        raise ArgumentError(f"--query: expected a number below {len(scores)}, got {query}")
    label = int(labels[query])
    box, score = boxes[query].tolist(), float(scores[query])
    category_id, name = list(categories.items())[label]
    [shown] = drawable_names({category_id: name})
    drawn = draw_sampling_points(picture, locations[query], weights[query], box, label, shown, score)
    write_file(options.out, picture_of(drawn, options.out.suffix, "detr inspect"), "detr inspect")
    count = weights[query].numel()
    say(f"{options.out}: the {count} points that query {query} ({name} {score:.2f}) samples in decoder layer {layer}")
    return 0
