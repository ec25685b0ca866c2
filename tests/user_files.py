"""For tests of what happens to a user's files: snapshots, a folder that cannot be written to, a full disk."""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from detr.output import MANIFEST

# flags of `detr train` for a model that is quick to train
SMALL = ["--set", "d_model=32", "--set", "n_heads=2", "--set", "ffn_dim=32", "--image-size", "64", "--batch-size", "2"]


def snapshot(root: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def assert_nothing_lost(before: dict[str, bytes], root: Path) -> None:
    """Every file of a `snapshot` is there and as it was; there may be more. No half-written file is left."""
    after = snapshot(root)
    for name, content in before.items():
        if name.endswith(MANIFEST):
            assert after[name].startswith(content)
        else:
            assert after.get(name) == content, name
    assert not [name for name in after if name.endswith(".tmp")]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be made, for root neither."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        with _permissions_count():
            yield
    finally:
        folder.chmod(mode)


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A file or folder that cannot be read, by root neither."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with _permissions_count():
            yield
    finally:
        path.chmod(mode)


@contextlib.contextmanager
def _permissions_count() -> Iterator[None]:
    """Without the capabilities by which root writes where it may not: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    before = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; twice
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    effective, *others = struct.unpack("6I", before.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~0b110, *others)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes, which fails where a full disk would.

    Python keeps no bytecode meanwhile: of what is imported for the first time it would keep the first `room` bytes, for
    every process that comes after.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    of_children = os.environ.get("PYTHONDONTWRITEBYTECODE", "")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
        sys.dont_write_bytecode = before
        os.environ["PYTHONDONTWRITEBYTECODE"] = of_children
