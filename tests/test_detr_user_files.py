"""No command overwrites or removes what it did not write, wherever its output is pointed at."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from user_files import SMALL, assert_nothing_lost, full_disk, read_only, snapshot

from detr import checkpoint, demo
from detr.cli import main
from detr.errors import OutputError
from detr.model import build_model
from detr.output import MANIFEST, Folder, writable
from detr.presets import preset

torch.set_num_threads(1)  # test processes share the cores


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with all that commands read: data, photos, the run of a model, and a model that can be exported."""
    root = tmp_path_factory.mktemp("original")
    assert main(["synth", str(root / "data"), "--train", "4", "--val", "2", "--size", "64"]) == 0
    (root / "data" / MANIFEST).unlink()  # a dataset of somebody else
    assert main(["train", "--data", str(root / "data"), "--out", str(root / "run"), "--steps", "2", *SMALL]) == 0
    (root / "photos" / "sub").mkdir(parents=True)
    Image.open(root / "data" / "val" / "000000.jpg").save(root / "photos" / "a.png")
    shutil.copy(root / "data" / "val" / "000001.jpg", root / "photos" / "sub" / "b.jpg")
    config = preset("deformable_detr_r50", backbone="resnet18", d_model=32, ffn_dim=32, n_queries=4, enc_layers=1,
                    dec_layers=1, n_heads=2, image_size=64, max_size=64, pretrained_backbone=False)  # fmt: skip
    names = {"class_names": ["ant", "bee"], "category_ids": [1, 2]}
    content = {"config": config.to_dict(), "model": build_model(config, 2).state_dict(), **names}
    checkpoint.save(root / "resnet.pt", content)
    return root


@pytest.fixture
def work(original, tmp_path):
    for name in ("data", "photos", "run"):
        shutil.copytree(original / name, tmp_path / name)
    (tmp_path / "resnet.pt").symlink_to(original / "resnet.pt")  # 45 MB
    return tmp_path


@dataclass
class Command:
    arguments: list[str]
    names: list[str]  # of the files that it writes; "" is the output itself
    suffix: str = ""  # that its output must have
    slow: bool = False  # to run, not to refuse

    def run(self, work: Path, out: Path) -> int:
        if not out.suffix and not out.is_dir():
            out = out.with_suffix(self.suffix)
        arguments = [part.replace("WORK", str(work)).replace("OUT", str(out)) for part in self.arguments]
        return demo.main(arguments[1:]) if arguments[0] == "demo" else main(arguments)


EXPORT = ["export", "--checkpoint", "WORK/resnet.pt", "--size", "32", "32", "--out", "OUT", "--to"]
TRAIN = ["train", "--data", "WORK/data", "--out", "OUT", "--steps", "1", *SMALL]
IMAGES = [f"{split}/00000{i}.jpg" for split, count in (("train", 2), ("val", 1)) for i in range(count)]
COMMANDS = {
    "synth": Command(
        ["synth", "OUT", "--train", "2", "--val", "1", "--size", "32"],
        ["instances_train.json", "instances_val.json", *IMAGES],
    ),
    "check-data": Command(["check-data", "WORK/data", "--json", "OUT"], [""]),
    "convert": Command(["convert", "WORK/data", "OUT"], ["instances_train.json", "train/000000.jpg", "val/000000.jpg"]),
    "convert links": Command(
        ["convert", "WORK/data", "OUT", "--images", "link", "--to", "yolo"],
        ["data.yaml", "images/train/000000.jpg", "labels/val/000000.txt"],
    ),
    "train": Command(
        TRAIN,
        ["checkpoint.pt", "best.pt", "eval.json", "config.json", "metrics.jsonl", "curves.png", "predictions.png"],
    ),
    "eval": Command(["eval", "--data", "WORK/data", "--checkpoint", "WORK/run/best.pt", "--out", "OUT"], [""]),
    "predict": Command(
        ["predict", "WORK/photos", "--checkpoint", "WORK/run/best.pt", "--threshold", "0", "--out", "OUT"],
        ["a.png", "sub/b.jpg", "predictions.json"],
    ),
    "inspect": Command(["inspect", "WORK/run/best.pt", "--image", "WORK/photos/a.png", "--out", "OUT"], [""], ".png"),
    "export official": Command([*EXPORT, "official"], [""]),
    "export hf": Command([*EXPORT, "hf"], ["config.json", "model.safetensors"]),
    "export onnx": Command([*EXPORT, "onnx"], [""], ".onnx", slow=True),
    "export torch-export": Command([*EXPORT, "torch-export"], [""], ".pt2", slow=True),
    "export aoti": Command([*EXPORT, "aoti"], [""], ".pt2", slow=True),
    "demo": Command(
        ["demo", "--out", "OUT", "--train", "2", "--val", "1", "--steps", "1"], ["data/instances_train.json"]
    ),
}
QUICK = [name for name, command in COMMANDS.items() if not command.slow]


def one_error_line(captured) -> str:
    """The error line of a command that failed; there is one, and no traceback."""
    lines = [line for line in captured.err.splitlines() if line.startswith("detr ")]
    assert len(lines) == 1 and ": error: " in lines[0], captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def inputs(work: Path) -> list[Path]:
    return [
        *(work / "data" / name for name in ("instances_train.json", "train/000000.jpg", "val")),
        *(work / name for name in ("data", "photos", "photos/a.png", "run", "run/best.pt", "run/eval.json")),
    ]


@pytest.mark.parametrize("name", QUICK)
def test_the_output_is_an_input(work, name, capsys):
    before = snapshot(work)
    for place in inputs(work)[:4] if name == "demo" else inputs(work):
        capsys.readouterr()
        code = COMMANDS[name].run(work, place)
        assert_nothing_lost(before, work)
        # a command may add its files to a folder of others
        if code or not place.is_dir():
            assert code == 1
            one_error_line(capsys.readouterr())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_output_holds_files_of_somebody_else(work, name, capsys):
    command = COMMANDS[name]
    for file in command.names:
        out = work / f"foreign-{file.replace('/', '-')}"
        path = out / file if file else out.with_suffix(command.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"mine": 1}')
        before = snapshot(work)
        assert command.run(work, out) == 1
        assert str(path) in one_error_line(capsys.readouterr())
        assert snapshot(work) == before  # and nothing beside it
        # an empty file, a broken link and a folder are somebody's too
        path.write_bytes(b"")
        assert command.run(work, out) == 1
        path.unlink()
        path.symlink_to("nowhere")
        assert command.run(work, out) == 1 and path.is_symlink()
        path.unlink()
        path.mkdir()
        assert command.run(work, out) == 1 and path.is_dir()
        capsys.readouterr()


def test_what_is_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name, found in (("link", "a link to nothing"), ("file", "a file")):
        path = tmp_path / name
        with pytest.raises(OutputError, match=rf"{path}: expected a folder to write to, found {found}$"):
            Folder(path, "detr predict")
        with pytest.raises(OutputError, match=rf"{path}/a: expected a folder to write to, and {path} is {found}$"):
            writable(path / "a")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_to(work, name, capsys):
    (work / "locked").mkdir()
    before = snapshot(work)
    with read_only(work / "locked"):
        assert COMMANDS[name].run(work, work / "locked" / "out") == 1
    line = one_error_line(capsys.readouterr())
    assert str(work / "locked") in line and "not written: no permission to write to" in line
    assert snapshot(work) == before


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(f"export {to}", marks=pytest.mark.long) for to in ("onnx", "torch-export", "aoti"))]
)
def test_a_full_disk(work, name, capsys):
    before = snapshot(work)
    with full_disk(room=300):
        assert COMMANDS[name].run(work, work / "out") == 1
    assert "File too large" in one_error_line(capsys.readouterr())
    assert_nothing_lost(before, work)
    # what was written before is recognised, and there is room now
    assert COMMANDS[name].slow or COMMANDS[name].run(work, work / "out") == 0


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in COMMANDS if n not in QUICK)]
)
def test_a_second_time_into_the_same_place(work, name, capsys):
    command, out = COMMANDS[name], work / "new" / "out"
    assert command.run(work, out) == 0
    first = snapshot(work)
    again = command.run(work, out)
    if name == "train":  # a run is kept, and so is its best model alone
        assert again == 1
        (out / "checkpoint.pt").unlink()
        (out / "eval.json").unlink()
        assert command.run(work, out) == 1
        assert f"{out}/best.pt: a run is here already" in capsys.readouterr().err
        assert (out / "best.pt").read_bytes() == first["new/out/best.pt"]
    elif name == "demo":
        assert_nothing_lost({key: first[key] for key in first if "/run/" in key}, work)
        assert (out / "run2" / "best.pt").exists() and (out / "predict2" / "predictions.json").exists()
    else:
        assert again == 0


def test_what_was_changed_since_is_not_overwritten(work, capsys):
    out = work / "out"
    predict = COMMANDS["predict"]
    assert predict.run(work, out) == 0
    (out / "a.png").write_bytes((work / "photos" / "a.png").read_bytes())
    before = snapshot(work)
    assert predict.run(work, out) == 1
    assert "was changed after `detr predict` wrote it" in one_error_line(capsys.readouterr())
    assert snapshot(work) == before


def test_another_command_is_somebody_else(work, capsys):
    assert COMMANDS["eval"].run(work, work / "out.json") == 0
    before = snapshot(work)
    assert COMMANDS["check-data"].run(work, work / "out.json") == 1
    # the picture of one run of `predict` among the files of another command
    assert COMMANDS["predict"].run(work, work / "pictures") == 0
    assert main(["inspect", str(work / "run/best.pt"), "--image", str(work / "photos/a.png"), "--out",
                 str(work / "pictures/a.png")]) == 1  # fmt: skip
    assert_nothing_lost(before, work)


def test_predict_leaves_out_its_own_pictures(work, monkeypatch, capsys):
    monkeypatch.chdir(work / "photos")
    arguments = ["--checkpoint", str(work / "run" / "best.pt"), "--threshold", "0"]
    before = snapshot(work)
    assert main(["predict", "a.png", "--out", ".", *arguments]) == 1
    for _ in range(3):
        assert main(["predict", ".", "--out", "boxes", *arguments]) == 0
        results = json.loads(Path("boxes/predictions.json").read_text())
        assert [result["file"] for result in results] == ["a.png", "sub/b.jpg"]
    assert "left out 2 pictures that detr wrote, the first: boxes/a.png" in capsys.readouterr().err
    assert main(["predict", "**/*.png", "--out", "glob", *arguments]) == 0
    assert len(json.loads(Path("glob/predictions.json").read_text())) == 1
    # one that is named by itself is wanted; and so is a photograph that was put in a picture's place
    assert main(["predict", "boxes/a.png", "--out", "again", *arguments]) == 0
    shutil.copy("a.png", "boxes/a.png")
    assert main(["predict", "boxes", "--out", "third", *arguments]) == 0
    assert [result["file"] for result in json.loads(Path("third/predictions.json").read_text())] == ["boxes/a.png"]
    # the pictures of a run are no photographs, the images of a synthetic dataset are
    assert main(["predict", str(work / "run"), "--out", "fourth", *arguments]) == 1
    assert main(["predict", str(work / "data" / "val"), "--out", "fifth", *arguments]) == 0
    assert_nothing_lost(before, work)


@pytest.mark.parametrize("to", ["official", "hf", "onnx"])
def test_export_to_the_checkpoint_itself(original, tmp_path, capsys, to):
    place = tmp_path / ("resnet.onnx" if to == "onnx" else "resnet.pt")
    shutil.copy(original / "resnet.pt", place)
    before = snapshot(tmp_path)
    assert main(["export", "--checkpoint", str(place), "--to", to, "--out", str(place)]) == 1
    one_error_line(capsys.readouterr())
    assert snapshot(tmp_path) == before


def test_a_picture_of_another_format_is_recognised(work, capsys):
    inspect = ["inspect", str(work / "run/best.pt"), "--image", str(work / "photos/a.png"), "--out"]
    for suffix in ("png", "jpg", "webp"):
        for _ in range(2):
            assert main([*inspect, str(work / f"out.{suffix}")]) == 0
    capsys.readouterr()
    for name in ("out.gif", "out", "out.blp"):  # they could not say who wrote them
        assert main([*inspect, str(work / name)]) == 1
        assert f"{work / name}: expected a name that ends in one of .png, " in one_error_line(capsys.readouterr())
    Image.new("1", (15_000, 15_000)).save(work / "large.png")
    before = (work / "large.png").read_bytes()
    assert main([*inspect, str(work / "large.png")]) == 1
    one_error_line(capsys.readouterr())
    assert (work / "large.png").read_bytes() == before


def test_pictures_that_were_renamed_or_linked_to(work, capsys):
    assert COMMANDS["predict"].run(work, work / "photos" / "boxes") == 0
    (work / "photos" / "boxes" / "a.png").rename(work / "photos" / "boxes" / "renamed.png")
    (work / "photos" / "linked.jpg").symlink_to(work / "photos" / "boxes" / "sub" / "b.jpg")
    assert COMMANDS["predict"].run(work, work / "out") == 0
    results = json.loads((work / "out" / "predictions.json").read_text())
    assert [Path(result["file"]).name for result in results] == ["a.png", "b.jpg"]
    assert "left out 3 pictures that detr wrote" in capsys.readouterr().err


def test_odd_entries_of_a_folder_of_photographs(work, capsys):
    """Beside a manifest, where files are compared with what was written."""
    predict = COMMANDS["predict"]
    assert main(["synth", str(work / "photos"), "--train", "1", "--val", "1", "--size", "32"]) == 0
    (work / "photos" / "album.jpg").mkdir()
    shutil.copy(work / "photos" / "a.png", work / "photos" / "album.jpg")
    (work / "photos" / "dangling.jpg").symlink_to("nowhere")
    capsys.readouterr()
    for _ in range(2):
        assert predict.run(work, work / "out") == 1  # for the link
        assert "warning: " in capsys.readouterr().err
        files = [result["file"] for result in json.loads((work / "out" / "predictions.json").read_text())]
        assert [Path(file).name for file in files] == ["a.png", "a.png", "b.jpg", "000000.jpg", "000000.jpg"]
    (work / "photos" / "predictions.json").mkdir()
    shutil.copy(work / "photos" / "a.png", work / "photos" / "predictions.json")
    assert predict.run(work, work / "new") == 1
    assert "its picture would be in the place of" in one_error_line(capsys.readouterr())
    assert not (work / "new").exists()


def test_a_file_that_another_process_wrote_meanwhile(tmp_path):
    first, second = Folder(tmp_path, "detr predict"), Folder(tmp_path, "detr predict")
    first.write("a.png", b"1")
    second.write("a.png", b"2")
    first.write("a.png", b"3")
    with pytest.raises(OutputError, match=r"a\.png: is there already"):
        Folder(tmp_path, "detr synth").write("a.png", b"4")


def test_a_link_to_a_file_of_ours_stays_a_link(work):
    (work / "out").mkdir()
    assert COMMANDS["predict"].run(work, work / "out") == 0
    shutil.move(work / "out" / "predictions.json", work / "elsewhere.json")
    (work / "out" / "predictions.json").symlink_to(work / "elsewhere.json")
    assert COMMANDS["predict"].run(work, work / "out") == 0
    assert (work / "out" / "predictions.json").is_symlink()


def test_a_manifest_with_a_broken_end(work):
    assert COMMANDS["predict"].run(work, work / "out") == 0
    manifest = work / "out" / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b'{"file": "a.p')
    (work / "out" / "a.png").unlink()
    for threshold in ("0.9", "0"):
        arguments = [
            "predict",
            str(work / "photos"),
            "--checkpoint",
            str(work / "run/best.pt"),
            "--out",
            str(work / "out"),
        ]
        assert main([*arguments, "--threshold", threshold]) == 0
