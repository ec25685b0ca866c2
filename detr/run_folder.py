"""The folder of a run: that nothing else lies in its way, and that one run at a time writes to it."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from detr.output import Folder, OutputError, make_parent, remove_temporary

BY = "detr train"
RESULTS = ("checkpoint.pt", "best.pt", "eval.json")
FILES = (*RESULTS, "config.json", "metrics.jsonl", "curves.png", "predictions.png", "nonfinite.jsonl")
_LOCK = ".detr-lock"
_PATIENCE = 7  # seconds; the loader processes of a run that was killed may hold its lock until they notice, after 5


def look(out: Path) -> None:
    """Make sure, before any work, that a new run can have the folder `out`.

    Raises:
        OutputError: a run is there already, or a file that a run would replace and did not write.
    """
    for name in RESULTS:
        if (out / name).exists():
            raise OutputError(
                f"{out / name}: a run is here already: continue it with --resume {out}, or choose another --out"
            )
    Folder(out, BY).claim(FILES)


@contextlib.contextmanager
def hold(out: Path, resume: bool) -> Iterator[None]:
    """Keep other runs out of the folder, and make it if it is not there.

    Raises:
        OutputError: another run is writing there, or as `look`.
    """
    make_parent(out / _LOCK)
    lock = filelock.FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except filelock.Timeout:
        raise OutputError(f"{out}: another process is writing to this run") from None
    except NotImplementedError:
        warnings.warn(f"{out}: its file system has no locks: do not start a second run there", stacklevel=3)
    except OSError as error:
        raise OutputError(f"{out / _LOCK}: not written: {error.strerror or error}") from error
    try:
        folder = Folder(out, BY)
        if not resume:
            look(out)
        elif not folder.knows_any():
            # a run had no manifest at first; else it is a checkpoint that was copied to a folder
            for name in FILES if _is_a_run(out) else ("checkpoint.pt",):
                if (out / name).exists():
                    folder.note(name, None)
        folder.claim(FILES)
        remove_temporary(out, FILES)
        yield
    finally:
        lock.release()


def _is_a_run(out: Path) -> bool:
    """Whether config.json is a run's: runs had no manifest at first."""
    try:
        config = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"config", "data", "classes"} <= config.keys()
