"""Names of classes and files in every script, where the terminal or the log has another encoding."""

import io
import json
import os
import sys
from pathlib import Path

import coco_files
import pytest
import torch
from user_files import SMALL

from detr.cli import main
from detr.errors import OutputError
from detr.output import Folder, claim_file

torch.set_num_threads(1)  # test processes share the cores

CLASSES = {3: "Ka\u0308se", 17: "猫", 90: "\ud800"}
FILE = os.fsdecode(b"\xe9 \xe4\xb8\xad.png")  # half of it is UTF-8


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dataset with such names, and a run on it, in a folder that is called so too."""
    root = tmp_path_factory.mktemp("データ")
    content = coco_files.content()
    content["categories"] = [{"id": number, "name": name} for number, name in CLASSES.items()]
    content["images"][0]["file_name"] = FILE
    for split in ("train", "val"):
        coco_files.write(root / "data", content, split)
    arguments = ["--data", str(root / "data"), "--out", str(root / "run"), "--steps", "1", "--device", "cpu", *SMALL]
    assert run("train", *arguments, encoding="ascii")[0] == 0
    return root


def run(*arguments: str, encoding: str) -> tuple[int, str]:
    """The exit code and what was printed."""
    before = sys.stdout, sys.stderr
    buffer = io.BytesIO()
    sys.stdout = sys.stderr = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    try:
        return main(list(arguments)), buffer.getvalue().decode(encoding)
    finally:
        sys.stdout, sys.stderr = before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_name_stops_a_command(work, tmp_path, encoding):
    best, cpu = ["--checkpoint", str(work / "run" / "best.pt")], ["--device", "cpu"]
    code, printed = run("check-data", str(work / "data"), "--json", str(tmp_path / "check.json"), encoding=encoding)
    assert code == 0 and ("猫" if encoding == "utf-8" else "\\u732b") in printed and "\\ud800" in printed
    assert CLASSES[90] in json.loads((tmp_path / "check.json").read_text())["train"]["objects_per_class"]

    out = tmp_path / "eval.json"
    code, printed = run("eval", "--data", str(work / "data"), *best, *cpu, "--out", str(out), encoding=encoding)
    assert code == 0 and "\\ud800" in printed
    assert list(json.loads(out.read_text())["per_class"]) == list(CLASSES.values())

    (tmp_path / "list.txt").write_bytes(os.fsencode(work / "data" / "val" / FILE))
    arguments = [str(tmp_path / "list.txt"), *best, *cpu, "--threshold", "0", "--out", str(tmp_path / "out")]
    code, printed = run("predict", *arguments, encoding=encoding)
    assert code == 0 and printed.count("pictures show the class id") == 1
    [result] = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert Path(result["file"]).name == FILE and (tmp_path / "out" / FILE).is_file()
    assert {row["name"] for row in result["detections"]} <= set(CLASSES.values())

    image = str(work / "data" / "val" / FILE)
    code, printed = run("inspect", best[1], "--image", image, *cpu, "--out", str(tmp_path / "a.png"), encoding=encoding)
    assert code == 0 and (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("name", ["\ud800", "a\0b"])
def test_outputs_that_no_file_system_can_name(tmp_path, name):
    for claim in (lambda path: claim_file(path, "detr eval"), lambda path: Folder(path, "detr predict")):
        with pytest.raises(OutputError, match=r"(ud800|x00b)': expected a name that the file system can write"):
            claim(tmp_path / name)


def test_a_missing_image_is_named(work, capsys):
    assert main(["inspect", str(work / "run" / "best.pt"), "--image", "gone.png"]) == 1
    assert "detr inspect: error: gone.png: the image file is missing" in capsys.readouterr().err
