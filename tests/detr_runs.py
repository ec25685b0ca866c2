"""Small training runs for tests."""

from detr.splits import load_split
from detr.synth import write_dataset


def synthetic_splits(root):
    """The splits "train" of 7 and "val" of 3 images of 64 x 64 pixels, drawn into the folder `root`."""
    write_dataset(root, 7, 3, 64, 0)
    train = load_split(root, "train")
    return train, load_split(root, "val", train.categories)


def advance(run, steps):
    """The losses of the next steps."""
    batches = run.batches()
    return [run.step(next(batches)).loss for _ in range(steps)]


def trained(run, val, out, data=None):
    """The final metrics of a run that is taken to its end, or None if it was stopped."""
    found = run.train(val, out, {} if data is None else data)
    return found and found.metrics
