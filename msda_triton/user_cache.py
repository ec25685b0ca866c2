"""What the package keeps between processes: files in a folder of the user's own.

The folder is `msda_triton` in $XDG_CACHE_HOME, or in ~/.cache. It belongs to this user, and nobody else may look into
it: what is in there decides what runs. Where there can be no such folder nothing is kept, and one line says why.
"""

import contextlib
import os
import tempfile
import warnings
from pathlib import Path


def folder() -> Path:
    """Where the files are; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path is none, says the XDG base directory specification
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "msda_triton"


def read(name: str) -> bytes | None:
    """What was last written under a name; None if nothing was, or nothing that is this user's."""
    try:
        path = folder() / name
        if not path.exists():
            return None
        _check_owner(path.parent)
        _check_owner(path)
        if not path.is_file():  # a pipe would be waited for
            raise OSError(f"{path}: expected a file")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:
        _tell("read", error)
        return None


def write(name: str, content: bytes) -> bool:
    """Keep content under a name; whether that was possible. A reader finds all of the old content or all of the new."""
    part = None
    try:
        path = folder() / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(path.parent)
        path.parent.chmod(0o700)
        number, part = tempfile.mkstemp(dir=path.parent, prefix=f"{name}.")
        with open(number, "wb") as file:
            file.write(content)
        os.replace(part, path)
        part = None
        return True
    except (OSError, RuntimeError) as error:
        _tell("written", error)
        return False
    finally:  # of an interrupt nothing stays either
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def _check_owner(path: Path) -> None:
    """Raises a PermissionError for what another user could have put there."""
    if not hasattr(os, "getuid"):  # Windows: a user's folders are closed to others
        return
    for found in (path.lstat(), path.stat()):  # a link, and what it leads to
        if _owner(found) != os.getuid():
            raise PermissionError(f"{path}: expected to be of user {os.getuid()}, is of user {_owner(found)}")


def _owner(found: os.stat_result) -> int:
    return found.st_uid


def _tell(done: str, error: Exception) -> None:
    warnings.warn(f"msda_triton's cache is not {done}: {error}", stacklevel=3)
