"""Files for `detr train --weights` that are damaged or something else: one line that names the file, no traceback."""

import json
import random

import pytest
import torch
from user_files import SMALL

from detr.cli import main
from detr.model import build_model
from detr.presets import preset
from detr.weights import load_weights

torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = str(tmp_path_factory.mktemp("data"))
    assert main(["synth", data, "--train", "4", "--val", "2", "--size", "64"]) == 0
    return data


def hugging_face(folder, config):
    import safetensors.torch

    folder.mkdir()
    safetensors.torch.save_file({"model.level_embed": torch.zeros(3, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


FILES = {
    "empty.pth": lambda path: path.write_bytes(b""),
    "text.pth": lambda path: path.write_text("not a checkpoint\n" * 50),
    "zeros.pth": lambda path: path.write_bytes(bytes(1000)),
    "cut zip.pth": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "empty zip.pth": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "header.safetensors": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "list.pth": lambda path: torch.save([1, 2], path),
    "number.pth": lambda path: torch.save(5, path),
    "tensor.pth": lambda path: torch.save(torch.zeros(3), path),
    "model.pth": lambda path: torch.save({"model": 5}, path),
    "keys.pth": lambda path: torch.save({1: torch.zeros(3), None: torch.zeros(3)}, path),
    "scalar.pth": lambda path: torch.save({"backbone.stem.0.weight": torch.tensor(1.0)}, path),
    "integers.pth": lambda path: torch.save({"backbone.stem.0.weight": torch.ones(9, dtype=torch.int64)}, path),
    "names.pth": lambda path: torch.save({"model": {"backbone.x": torch.zeros(1)}, "class_names": 5}, path),
    "ema.pth": lambda path: torch.save({"model": {"a": torch.zeros(1)}, "ema": "x", "class_names": ["a"]}, path),
    "sparse.pth": lambda path: torch.save({"backbone.stem.0.weight": torch.zeros(2, 2).to_sparse()}, path),
    "meta.pth": lambda path: torch.save({"backbone.stem.0.weight": torch.zeros(2, device="meta")}, path),
    "folder": lambda path: path.mkdir(),
    "list of labels": lambda path: hugging_face(path, {"id2label": ["a", "b"]}),
    "numbers of labels": lambda path: hugging_face(path, {"id2label": {"0": 1, "1": 2}}),
    "labels from 1": lambda path: hugging_face(path, {"id2label": {"1": "a", "2": "b"}}),
    "a list": lambda path: hugging_face(path, []),
    "text": lambda path: hugging_face(path, "{"),
    "other text": lambda path: hugging_face(path, '{"id2label": ' * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_for_weights(tmp_path, data, capsys, name):
    FILES[name](tmp_path / name)
    out = str(tmp_path / "run")
    assert main(["train", "--data", data, "--weights", str(tmp_path / name), "--out", out, "--steps", "1", *SMALL]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith(f"detr train: error: {tmp_path / name}"), lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bits_in_weights(tmp_path, legacy):
    """A file of torch 1.5 has no checksums: it may be read with other numbers, but never ends in a traceback."""
    model = build_model(preset("tiny", d_model=32, n_heads=2, ffn_dim=32, enc_layers=1, dec_layers=1), 4)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" not in name}
    weights = dict(list(weights.items())[:6])
    path = tmp_path / "a.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    data, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        flipped = bytearray(data)
        flipped[generator.randrange(min(len(data), 3000))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            load_weights(model, path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
    assert refused > 10
