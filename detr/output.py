"""Writing files so that nothing of a user's is lost.

A file is written beside its place and then renamed: it is the old one or the new one, and always whole. And no command
overwrites what it did not write itself: a folder that a command fills holds a manifest of its files, and a single file
says in its content which command wrote it.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

MANIFEST = ".detr-files.jsonl"  # a line for each file: its name in the folder, the sha256 of its bytes, the command
WRITTEN_BY = "written_by"  # the key of a json object, or of a text chunk of a PNG, that names the command
_TEMPORARY = ".detr-{}.tmp"
_count = itertools.count()


class OutputError(Exception):
    """A file that cannot be written, or must not be; the message names it and says why."""


class _Sink:
    """A binary file that keeps the first error of a write for later: PyTorch's writers abort the process on one."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def close(self, durable: bool) -> None:
        if self.error is not None:
            raise self.error
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())


@contextlib.contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[_Sink]:
    """A file to `write` bytes to, which takes the place of `path` when all of them are written.

    Args:
        durable: wait until the disk has the bytes, so that even a power cut leaves the old file or the new one.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to. What was at `path` is still there.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(_TEMPORARY.format(f"{os.getpid()}-{next(_count)}"))
    try:
        with temporary.open("wb") as file:
            sink = _Sink(file)
            yield sink
            sink.close(durable)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: not written: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, durable: bool = False) -> None:
    """Replace or make the file at `path`, see `whole`."""
    with whole(path, durable) as file:
        file.write(content)


def remove_temporary(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in `folder`. No process may be writing there."""
    for path in folder.glob(_TEMPORARY.format("*")):
        path.unlink(missing_ok=True)


class Folder:
    """A folder that a command fills.

    A file there is the command's own if the manifest has its name and its bytes. So a file that was changed since, or
    put in its place, is not.

    Args:
        by: the command, "detr predict" for example.

    Raises:
        OutputError: there is something else than a folder at `path`.
    """

    def __init__(self, path: Path, by: str) -> None:
        if os.path.lexists(path) and not path.is_dir():
            raise OutputError(f"{path}: expected a folder to write to, found a file")
        self.path, self.by = path, by
        self._own: dict[str, set[str | None]] = {}
        for name, lines in _manifest(path).items():
            self._own[name] = {digest for digest, writer in lines if writer == by}

    def knows_any(self) -> bool:
        """Whether the command has written to this folder before."""
        return any(self._own.values())

    def claim(self, names: Iterable[str]) -> None:
        """Make sure that files of these names (relative, with / between folders) may be written.

        Raises:
            OutputError: one is there that is not the command's own, or nothing can be written there.
        """
        writable(self.path)
        for name in names:
            path = self.path / name
            if os.path.lexists(path) and not self._is_own(name, path):
                raise _not_ours(path, self.by, f"was changed after `{self.by}` wrote it" if self._own.get(name) else "")

    def note(self, name: str, digest: str | None) -> None:
        """Take the file `name` for the command's own: with these bytes, or for None with any."""
        if digest in self._own.setdefault(name, set()):
            return
        line = json.dumps({"file": name, "sha256": digest, "by": self.by}) + "\n"
        path = self.path / MANIFEST
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                # a process that was killed may have left half a line
                broken = file.read(1) not in (b"", b"\n")
                file.write(("\n" if broken else "").encode() + line.encode())
        except OSError as error:
            raise OutputError(f"{path}: not written: {_reason(error)}") from error
        self._own[name].add(digest)

    def write(self, name: str, content: bytes) -> None:
        """Write one file, see `whole` and `claim`."""
        self.claim([name])
        path = self.path / name
        # the line comes first: killed in between, the file that is there is still known by its own line
        self.note(name, hashlib.sha256(content).hexdigest())
        make_parent(path)
        write_whole(path, content)

    def _is_own(self, name: str, path: Path) -> bool:
        digests = self._own.get(name, ())
        return None in digests or (bool(digests) and path.is_file() and _digest(path) in digests)


class Written:
    """Which files are results of ours: found by the manifests of their folders."""

    def __init__(self) -> None:
        self._manifests: dict[Path, dict[str, list[tuple[str | None, str]]]] = {}

    def by(self, path: Path) -> str | None:
        """The command that wrote these bytes to this file, or None."""
        path = Path(os.path.abspath(path))
        for folder in path.parents:
            if folder not in self._manifests:
                self._manifests[folder] = _manifest(folder)
            name = path.relative_to(folder).as_posix()
            for digest, writer in self._manifests[folder].get(name, ()):
                if digest is None or digest == _digest(path):
                    return writer
        return None


def claim_file(path: Path, by: str, writer: Callable[[Path], str | None] | None = None) -> None:
    """Make sure that the single file `path` may be written by the command `by`.

    Args:
        writer: names the command that says in a file that it wrote it; None reads json and PNG.

    Raises:
        OutputError: there is a folder, or a file that does not say so, or nothing can be written there.
    """
    if path.is_dir():
        raise OutputError(f"{path}: expected a file to write, found a folder")
    if os.path.lexists(path) and (not path.is_file() or (writer or writer_of)(path) != by):
        raise _not_ours(path, by)
    writable(path.parent)


def write_file(path: Path, content: bytes, by: str, writer: Callable[[Path], str | None] | None = None) -> None:
    """Write a single file, and the folders above it; see `whole` and `claim_file`."""
    claim_file(path, by, writer)
    make_parent(path)
    write_whole(path, content)


def json_of(content: dict[str, Any], by: str) -> bytes:
    """A json file that says who wrote it."""
    return (json.dumps({WRITTEN_BY: by} | content, indent=2) + "\n").encode()


def picture_of(image: Image.Image, suffix: str, by: str) -> bytes:
    """An image file of the format that `suffix` names; a PNG says who wrote it.

    Raises:
        OutputError: Pillow writes no format by this name.
    """
    format = Image.registered_extensions().get(suffix.lower())
    if format not in Image.SAVE:
        raise OutputError(f"{suffix or 'no suffix'}: expected the suffix of an image format, such as .png")
    options: dict[str, Any] = {}
    if format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(WRITTEN_BY, by)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def writer_of(path: Path) -> str | None:
    """The command that a json or PNG file says wrote it; None for every other file."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(b"\x89PNG"):
            with Image.open(path) as image:
                return image.info.get(WRITTEN_BY)
        content = json.loads(path.read_bytes()) if start.lstrip().startswith(b"{") else {}
        return content.get(WRITTEN_BY)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None


def make_parent(path: Path) -> None:
    """The folder that `path` lies in, and those above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: not written: {_reason(error)}") from error


def writable(folder: Path) -> None:
    """Make sure, before any work, that files can be made in `folder`, which need not be there yet.

    Raises:
        OutputError: a file is in its place, or this user may not write there.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{folder}: expected a folder to write to, and {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"{folder}: not written: no permission to write to {place}")


def _not_ours(path: Path, by: str, why: str = "") -> OutputError:
    why = why or f"nothing says that `{by}` wrote it"
    return OutputError(f"{path}: is there already, and {why}: left as it is; choose another place, or move it away")


def _manifest(folder: Path) -> dict[str, list[tuple[str | None, str]]]:
    """Name -> (sha256, command) of the files in a folder that commands wrote; lines that are broken are left out."""
    try:
        lines = (folder / MANIFEST).read_bytes().splitlines()
    except OSError:
        return {}
    found = defaultdict(list)
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[entry["file"]].append((entry["sha256"], entry["by"]))
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
