"""Checkpoints are whole or absent, run nothing, and say what is wrong with them."""

import errno
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr import checkpoint, load
from detr.errors import CheckpointError, OutputError
from detr.model import build_model
from detr.presets import preset

CONFIG = preset("tiny", d_model=32, n_heads=2, ffn_dim=32, n_queries=8)


def content(config=CONFIG, names=("ant", "bee")):
    torch.manual_seed(1)
    model = build_model(config, len(names))
    return {
        "config": config.to_dict(),
        "class_names": list(names),
        "category_ids": [7, 3][: len(names)],
        "model": model.state_dict(),
    }


def test_round_trip(tmp_path):
    written = content()
    checkpoint.save(tmp_path / "a.pt", written)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    read = checkpoint.load(tmp_path / "a.pt")
    assert {key: value for key, value in read.items() if key != "model"} == {
        key: value for key, value in written.items() if key != "model"
    }
    torch.testing.assert_close(read["model"], written["model"], rtol=0, atol=0)
    detector = load(tmp_path / "a.pt", "cpu")
    assert detector.config == CONFIG and not detector.model.training
    assert (detector.category_ids, detector.classes) == ([7, 3], ["ant", "bee"])
    torch.testing.assert_close(dict(detector.model.state_dict()), dict(written["model"]), rtol=0, atol=0)


def test_pre_trained_weights_are_not_fetched_again(tmp_path, monkeypatch):
    config = preset("deformable_detr_r50", enc_layers=1, dec_layers=1, backbone="resnet18", n_queries=5)
    written = content(replace(config, pretrained_backbone=False))
    checkpoint.save(tmp_path / "a.pt", written | {"config": config.to_dict()})
    assert config.pretrained_backbone
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)  # would fail if it were called
    detector = load(tmp_path / "a.pt", "cpu")
    assert detector.config == config
    torch.testing.assert_close(dict(detector.model.state_dict()), dict(written["model"]), rtol=0, atol=0)


class FullDisk(io.BufferedWriter):
    """A file on a disk that has room for 10,000 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", content())
    before = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(io.FileIO(path, mode)))
    with pytest.raises(OutputError, match=r"a\.pt: not written: No space left on device$"):
        checkpoint.save(tmp_path / "a.pt", content())
    monkeypatch.undo()
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save(content() | {"extra": Malicious(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: refused"):
        checkpoint.load(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    checkpoint.save(tmp_path / "cut.pt", content())
    data = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("none.pt", "the file is missing"),
        ("cut.pt", "not readable: damaged, or of another program"),
        ("text.pt", "not readable: damaged, or of another program"),
        ("other.pt", "config: not in the file"),
        ("list.pt", "no checkpoint of `detr train`: expected a dict, got list"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.load(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_weights_of_another_model(tmp_path):
    written = content()
    for change, message in (
        ({"config": CONFIG.to_dict() | {"d_model": 64}}, r"of another model: .*: expected \[.*\], got \[.*\]"),
        ({"config": CONFIG.to_dict() | {"two_stage": False}}, r"expected \[.*\], got no such tensor"),
        ({"config": CONFIG.to_dict() | {"dec_layers": 1}}, r"expected no such tensor, got \[.*\]"),
        (
            {"class_names": ["ant", "bee", "cat"], "category_ids": [1, 2, 3]},
            r"class_embed\.0\.weight: expected \[3, 32\], got \[2, 32\]",
        ),
        ({"config": CONFIG.to_dict() | {"colour": "red"}}, "config: unknown field 'colour'"),
    ):
        checkpoint.save(tmp_path / "a.pt", written | change)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "a.pt", "cpu")
