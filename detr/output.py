"""Writing files so that nothing of a user's is lost.

A file is written beside its place and then renamed: it is the old one or the new one, and always whole. And no command
overwrites what it did not write itself: a folder that a command fills holds a manifest of its files, and a single file
says in its content which command wrote it.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from detr.errors import OutputError

MANIFEST = ".detr-files.jsonl"  # a line for each file: its name in the folder, the sha256 of its bytes, the command
MARKED = (".png", ".jpg", ".jpeg", ".webp")  # pictures that can say who wrote them
WRITTEN_BY = "written_by"  # the key of a json object, or of a text chunk of a PNG, that names the command
_TEMPORARY = ".detr-{name}-{pid}-{count}.tmp"
_EXIF_SOFTWARE = 0x0131
_count = itertools.count()


class _Sink:
    """A binary file that keeps the first error of a write for later: PyTorch's writers abort the process on one."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.digest.update(data)
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
def naming(path: Path) -> Iterator[None]:
    """An error of the operating system becomes one that names the file that is written.

    Raises:
        OutputError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: not written: {error.strerror or error}") from error


@contextlib.contextmanager
def whole(path: Path, durable: bool = False, before: Callable[[str], None] | None = None) -> Iterator[_Sink]:
    """A file to `write` bytes to, which takes the place of `path` when all of them are written.

    Args:
        durable: wait until the disk has the bytes, so that even a power cut leaves the old file or the new one.
        before: called with the sha256 of the bytes when they are written, and not yet at `path`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to. What was at `path` is still there.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    name = _TEMPORARY.format(name=path.name[:40], pid=os.getpid(), count=next(_count))
    temporary = path.with_name(name)
    try:
        with naming(path):
            with temporary.open("wb") as file:
                sink = _Sink(file)
                yield sink
                sink.close(durable)
            if before is not None:
                before(sink.digest.hexdigest())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Replace or make the file at `path`, see `whole`."""
    with whole(path) as file:
        file.write(content)


def unshare(path: Path) -> None:
    """Make a file that will be added to one of its own, if it has another name too, in a copy of hard links."""
    if path.exists() and path.stat().st_nlink > 1:
        write_whole(path, path.read_bytes())


def remove_temporary(folder: Path, names: Iterable[str]) -> None:
    """Remove what a process that was killed while it wrote has left. No other process may be writing these files."""
    for name in names:
        for path in folder.glob(_TEMPORARY.format(name=glob.escape(name[:40]), pid="[0-9]*", count="[0-9]*")):
            if path.is_file():
                path.unlink(missing_ok=True)


class Folder:
    """A folder that a command fills.

    A file there is the command's own if the manifest has its name and its bytes. So a file that was changed since, or
    put in its place, is not.

    Args:
        by: the command, "detr predict" for example.

    Raises:
        OutputError: there is something else than a folder at `path`, or it is no name for a file system.
    """

    def __init__(self, path: Path, by: str) -> None:
        _check_name(path)
        if os.path.lexists(path) and not path.is_dir():
            raise OutputError(f"{path}: expected a folder to write to, found {_what(path)}")
        self.path, self.by = path, by
        self._own: dict[str, set[str | None]] = {}
        self._read()

    def _read(self) -> None:
        for name, lines in _manifest(self.path).items():
            self._own[name] = {digest for digest, writer in lines if writer == self.by}

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
                self._read()  # another process of the command may have written it just now
                if self._is_own(name, path):
                    continue
                raise _not_ours(path, self.by, f"was changed after `{self.by}` wrote it" if self._own.get(name) else "")

    def note(self, name: str, digest: str | None, durable: bool = False) -> None:
        """Take the file `name` for the command's own: with these bytes, or for None with any."""
        if digest in self._own.setdefault(name, set()):
            return
        line = json.dumps({"file": name, "sha256": digest, "by": self.by}) + "\n"
        path = self.path / MANIFEST
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputError(f"{path}: expected the list of files that detr writes, found something else")
        unshare(path)
        with naming(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(max(0, file.tell() - 1))
                # a process that was killed may have left half a line
                broken = file.read(1) not in (b"", b"\n")
                file.write(("\n" if broken else "").encode() + line.encode())
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        self._own[name].add(digest)

    def own(self, name: str) -> Path:
        """The path of a file that the command is about to add to, whatever bytes it will have."""
        self.claim([name])
        self.note(name, None)
        unshare(self.path / name)
        return self.path / name

    @contextlib.contextmanager
    def whole(self, name: str, durable: bool = False) -> Iterator[_Sink]:
        """One file to write to, see `whole` and `claim`."""
        self.claim([name])
        path = self.path / name
        make_parent(path)
        if self.is_own_link(name):  # else its target would be written to
            path.unlink()
        # the line comes first: killed in between, the file that is there is still known by its own line
        with whole(path, durable, lambda digest: self.note(name, digest, durable)) as file:
            yield file

    def write(self, name: str, content: bytes) -> None:
        """Write one file."""
        with self.whole(name) as file:
            file.write(content)

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link of this name to a file."""
        self.claim([name])
        path = self.path / name
        make_parent(path)
        self.note(name, _digest_of_link(target))
        temporary = path.with_name(_TEMPORARY.format(name=path.name[:40], pid=os.getpid(), count=next(_count)))
        with naming(path):
            temporary.symlink_to(target)
            temporary.replace(path)

    def remove(self, names: Iterable[str]) -> None:
        """Remove the files of these names, which must be the command's own (see `claim`), where they are there."""
        for name in names:
            self.claim([name])
            with naming(self.path / name):
                (self.path / name).unlink(missing_ok=True)

    def accept(self, names: Iterable[str]) -> None:
        """Take the files of these names that are there for the command's own, as they are now."""
        for name in names:
            if (self.path / name).is_file():
                self.note(name, _digest(self.path / name))

    def _is_own(self, name: str, path: Path) -> bool:
        digests = self._own.get(name, ())
        if self.is_own_link(name):
            return True
        return None in digests or (bool(digests) and path.is_file() and _digest(path) in digests)

    def is_own_link(self, name: str) -> bool:
        """Whether the command made a link of this name, which is as it was."""
        path = self.path / name
        return path.is_symlink() and _digest_of_link(os.readlink(path)) in self._own.get(name, ())


class Written:
    """Which files are results of ours: found by the manifests of their folders."""

    def __init__(self) -> None:
        # folder -> command by the name of a file, and by the sha256 of one
        self._commands: dict[Path, tuple[dict[str, str], dict[str, str]]] = {}

    def by(self, path: Path) -> str | None:
        """The command that wrote this file, whatever it is called now, or None."""
        path = Path(os.path.realpath(path))
        if not path.is_file() or not os.access(path, os.R_OK):
            return None
        for folder in path.parents:
            if folder not in self._commands:
                lines = [(name, *line) for name, lines in _manifest(folder).items() for line in lines]
                by_name = {name: writer for name, digest, writer in lines if digest is None}
                by_digest = {digest: writer for _, digest, writer in lines if digest is not None}
                self._commands[folder] = by_name, by_digest
            by_name, by_digest = self._commands[folder]
            writer = by_name.get(path.relative_to(folder).as_posix())
            writer = writer or (by_digest.get(_digest(path)) if by_digest else None)
            if writer:
                return writer
        return None


def claim_file(path: Path, by: str, writer: Callable[[Path], str | None] | None = None) -> None:
    """Make sure that the single file `path` may be written by the command `by`.

    Args:
        writer: names the command that says in a file that it wrote it; None reads json and PNG.

    Raises:
        OutputError: there is a folder, or a file that does not say so, or nothing can be written there.
    """
    _check_name(path)
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
    """An image file of the format that `suffix` names; one with a suffix in MARKED says who wrote it.

    Raises:
        OutputError: Pillow writes no format by this name, or not this image, which is too wide or high for it.
    """
    format = Image.registered_extensions().get(suffix.lower())
    if format not in Image.SAVE:
        raise OutputError(f"{suffix or 'no suffix'}: expected the suffix of an image format, such as .png")
    options: dict[str, Any] = {}
    if format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(WRITTEN_BY, by)
    elif format in ("JPEG", "WEBP"):
        options["exif"] = Image.Exif()
        options["exif"][_EXIF_SOFTWARE] = by
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except (OSError, ValueError) as error:
        message = f"{image.width}x{image.height} pixels, which Pillow does not write as {format}"
        raise OutputError(f"{message}: {error}") from None
    return buffer.getvalue()


def writer_of(path: Path) -> str | None:
    """The command that a json file or a picture says wrote it; None for every other file."""
    try:
        with path.open("rb") as file:
            start = file.read(8).lstrip()
        if start.startswith(b"{"):
            content = json.loads(path.read_bytes())
            return content.get(WRITTEN_BY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            return image.info.get(WRITTEN_BY) or image.getexif().get(_EXIF_SOFTWARE)
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None


def make_parent(path: Path) -> None:
    """The folder that `path` lies in, and those above it."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _what(path: Path) -> str:
    return "a link to nothing" if path.is_symlink() and not path.exists() else "a file"


def writable(folder: Path) -> None:
    """Make sure, before any work, that files can be made in `folder`, which need not be there yet.

    Raises:
        OutputError: a file is in its place, or this user may not write there.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{folder}: expected a folder to write to, and {place} is {_what(place)}")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"{folder}: not written: no permission to write to {place}")


def _check_name(path: Path) -> None:
    try:
        known = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        known = False
    if not known:
        raise OutputError(f"{str(path)!a}: expected a name that the file system can write")


def _not_ours(path: Path, by: str, why: str = "") -> OutputError:
    why = why or f"nothing says that `{by}` wrote it"
    return OutputError(f"{path}: is there already, and {why}: left as it is; choose another place, or move it away")


def _manifest(folder: Path) -> dict[str, list[tuple[str | None, str]]]:
    """Name -> (sha256, command) of the files in a folder that commands wrote; lines that are broken are left out."""
    path = folder / MANIFEST
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError:
        lines = []
    found = defaultdict(list)
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            entry = json.loads(line)
            name, digest, writer = entry["file"], entry["sha256"], entry["by"]
            if isinstance(name, str) and isinstance(digest, str | None) and isinstance(writer, str):
                found[name].append((digest, writer))
    return found


def _digest_of_link(target: str) -> str:
    return hashlib.sha256(b"a link to " + os.fsencode(target)).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
