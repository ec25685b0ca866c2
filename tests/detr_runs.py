"""Small training runs for tests."""


def advance(run, steps):
    """The losses of the next steps."""
    batches = run.batches()
    return [run.step(next(batches)).loss for _ in range(steps)]


def trained(run, val, out, data=None):
    """The final metrics of a run that is taken to its end, or None if it was stopped."""
    found = run.train(val, out, {} if data is None else data)
    return found and found.metrics
