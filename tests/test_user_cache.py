"""The folder of files that are kept between processes."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from msda_triton import user_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.folder() == tmp_path / "msda_triton"
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache.folder() == Path("/home/someone/.cache/msda_triton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache.folder() == Path("/home/someone/.cache/msda_triton")


def test_what_is_written_is_read_and_nobody_else_may_look(home, monkeypatch):
    old = os.umask(0)
    try:
        assert user_cache.read("a") is None and not user_cache.folder().exists()
        assert user_cache.write("a", b"1") and user_cache.write("b", b"2") and user_cache.write("a", b"3")
    finally:
        os.umask(old)
    assert (user_cache.read("a"), user_cache.read("b"), user_cache.read("c")) == (b"3", b"2", None)
    assert mode(user_cache.folder()) == 0o700 and mode(user_cache.folder() / "a") == 0o600
    assert sorted(path.name for path in user_cache.folder().iterdir()) == ["a", "b"]


def test_a_folder_that_others_may_look_into_is_closed(home):
    user_cache.folder().mkdir(mode=0o755)
    user_cache.folder().chmod(0o777)
    assert user_cache.write("a", b"1") and mode(user_cache.folder()) == 0o700


@pytest.mark.parametrize("done", ["read", "written"])
def test_what_another_user_owns_is_left_alone(done, home, monkeypatch):
    user_cache.write("a", b"1")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(UserWarning) as caught:
        assert not (user_cache.read("a") if done == "read" else user_cache.write("a", b"2"))
    owner = user_cache.folder().stat().st_uid
    (message,) = [str(w.message) for w in caught]
    assert message == (
        f"msda_triton's cache is not {done}: {user_cache.folder()}: expected to be of user 12345, is of user {owner}"
    )
    assert (user_cache.folder() / "a").read_bytes() == b"1"


def test_a_file_or_a_link_of_another_user(home, monkeypatch):
    """Somebody put it there while the folder was open."""
    user_cache.write("a", b"1")
    (home / "theirs").write_bytes(b"2")
    (user_cache.folder() / "link").symlink_to(home / "theirs")
    mine = os.getuid()
    for name, path in (
        ("a", user_cache.folder() / "a"),
        ("link", home / "theirs"),
        ("link", user_cache.folder() / "link"),
    ):
        theirs = path.lstat().st_ino

        def owner(found, theirs=theirs):
            return mine + 1 if found.st_ino == theirs else mine

        monkeypatch.setattr(user_cache, "_owner", owner)
        with pytest.warns(
            UserWarning, match=rf"not read: .*/{name}: expected to be of user {mine}, is of user {mine + 1}"
        ):
            assert user_cache.read(name) is None


@pytest.mark.parametrize("place", ["a file", "a folder below a file", "a link to nothing"])
def test_where_there_can_be_no_folder(place, home, monkeypatch):
    if place == "a file":
        user_cache.folder().write_text("x")
    elif place == "a link to nothing":
        user_cache.folder().symlink_to(home / "nowhere" / "at" / "all")
    else:
        (home / "file").write_text("x")
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    with pytest.warns(UserWarning, match="msda_triton's cache is not written: ") as caught:
        assert not user_cache.write("a", b"1")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert user_cache.read("a") is None


def test_a_user_without_a_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="cache is not written: Could not determine home directory"):
        assert not user_cache.write("a", b"1")
    with pytest.warns(UserWarning, match="cache is not read: Could not determine home directory"):
        assert user_cache.read("a") is None


@pytest.mark.parametrize("step", ["replace", "open"])
def test_what_cannot_be_finished_leaves_what_was_there(step, home, monkeypatch):
    user_cache.write("a", b"1")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(user_cache, "open", full, raising=False)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not user_cache.write("a", b"2")
    monkeypatch.undo()
    assert [path.name for path in (home / "msda_triton").iterdir()] == ["a"]
    assert (home / "msda_triton/a").read_bytes() == b"1"


def test_an_interrupt_leaves_no_part(home, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        user_cache.write("a", b"1")
    assert list(user_cache.folder().iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_read(make, home):
    user_cache.folder().mkdir()
    make(user_cache.folder() / "a")
    with pytest.warns(UserWarning, match="cache is not read: .*/a: expected a file"):
        assert user_cache.read("a") is None


def test_the_new_file_is_made_in_the_folder_and_others_folders_are_not_changed(home, monkeypatch):
    parts, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (parts.append(Path(a).parent), replace(a, b)))
    assert user_cache.write("a", b"1") and parts == [user_cache.folder()]
    user_cache.folder().chmod(0o755)
    with monkeypatch.context() as patch, pytest.warns(UserWarning):
        patch.setattr(os, "getuid", lambda: 12345)
        user_cache.write("a", b"2")
    assert mode(user_cache.folder()) == 0o755
    monkeypatch.delattr(os, "getuid")  # Windows
    assert user_cache.write("a", b"3") and user_cache.read("a") == b"3"


PROCESS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("user_cache", "msda_triton/user_cache.py")
user_cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(user_cache)
for i in range(300):
    assert user_cache.write("a", sys.argv[1].encode() * 50_000)
    content = user_cache.read("a")
    assert len(content) == 50_000 and content in (b"1" * 50_000, b"2" * 50_000), content[:20]
"""


def test_processes_at_once_read_and_write_whole_files(home):
    both = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", PROCESS, n], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for n in "12"
    ]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in both] == [("", 0)] * 2
    assert [path.name for path in user_cache.folder().iterdir()] == ["a"]
