"""The folder of a run: that nothing else lies in its way, and that one run at a time writes to it."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from detr.errors import OutputError
from detr.output import Folder, make_parent, remove_temporary, writer_of

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
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{str(out)!a}: expected a name in UTF-8, which TensorBoard needs") from None
    more = f"continue it with --resume {out}, or " if (out / "checkpoint.pt").exists() else ""
    for name in RESULTS:
        if (out / name).exists():
            raise OutputError(f"{out / name}: a run is here already: {more}choose another --out")
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
        else:
            known = folder.knows_any()
            folder.accept(["checkpoint.pt"])  # what is to be continued
            if not known:  # as all runs at first; else it is a checkpoint that was copied to a folder
                found = _files_of_a_run(out)
                folder.accept(found)
                for name in ("metrics.jsonl", "nonfinite.jsonl") if found else ():
                    folder.note(name, None)
            folder.claim(FILES)
        remove_temporary(out, FILES)
        yield
    finally:
        lock.release()


def _files_of_a_run(out: Path) -> list[str]:
    """What is a run's in a folder without a manifest, by what is in it; nothing if config.json is not a run's."""

    def keys(name: str) -> set[str]:
        try:
            content = json.loads((out / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return set()
        return set(content) if isinstance(content, dict) else set()

    if not {"config", "data", "classes"} <= keys("config.json"):
        return []
    found = ["config.json", "best.pt"]
    if {"AP", "per_class", "best_AP"} <= keys("eval.json"):
        found.append("eval.json")
    for name in ("curves.png", "predictions.png"):
        path = out / name
        if path.is_file() and path.read_bytes().startswith(b"\x89PNG") and writer_of(path) is None:
            found.append(name)
    return found
