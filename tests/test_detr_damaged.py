"""Checkpoints that are damaged or made by hand: one line that names file and field, and never a changed value."""

import copy
import dataclasses
import math
import random
import shutil

import pytest
import torch
from user_files import SMALL

from detr import checkpoint, resume
from detr.cli import main
from detr.config import SEED, Config
from detr.errors import CheckpointError
from detr.run import Run
from detr.splits import load_split

CPU = torch.device("cpu")
torch.set_num_threads(1)  # test processes share the cores
WRONG = [None, True, 7, -1, 1.5, math.inf, "x", b"x", [], [1], ["x", 2], {}, {"x": 1}, {1: "x"}, (), torch.zeros(3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset, and a run on it with averaged weights and scaled gradients, so that every field is in use."""
    root = tmp_path_factory.mktemp("root")
    assert main(["synth", str(root / "data"), "--train", "4", "--val", "2", "--size", "64"]) == 0
    more = ["--steps", "2", "--ema", "0.9", "--amp", "fp16", "--device", "cpu"]
    assert main(["train", "--data", str(root / "data"), "--out", str(root / "run"), *SMALL, *more]) == 0
    return root


@pytest.fixture(scope="module")
def good(root):
    return checkpoint.load(root / "run" / "checkpoint.pt")


@pytest.fixture(scope="module")
def run(root, good):
    split = load_split(root / "data", "train")
    return Run(checkpoint.config_of(good, root), split, CPU)


def read_all(path, run, content=None):
    """What `detr train --resume` reads of a checkpoint, or of its content."""
    state = checkpoint.load(path) if content is None else checkpoint.checked(content, path)
    resume.located(state.get("data"), {}, path)
    config = checkpoint.config_of(state, path)
    checkpoint.check_sizes(config, state["model"], len(state["class_names"]), path)
    run.load_state(state, path)
    return state


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def fields(state):
    """(place, what is there) of every field, as deep as dicts and lists go, of tensors some."""
    for key, value in state.items():
        yield (key,), value
    for key, value in state["config"].items():
        yield ("config", key), value
    for name in ("model", "ema"):
        for key in list(state[name])[::40]:
            yield (name, key), state[name][key]
    for key in ("data", "train_images"):
        if isinstance(state[key], dict):
            yield from (((key, name), value) for name, value in state[key].items())
    yield from ((("scaler", name), value) for name, value in state["scaler"].items())
    optimizer = state["optimizer"]
    yield from ((("optimizer", name), value) for name, value in optimizer.items())
    yield from ((("optimizer", "state", 0, name), value) for name, value in optimizer["state"][0].items())
    yield ("optimizer", "param_groups", 1), optimizer["param_groups"][1]
    for name, value in optimizer["param_groups"][0].items():
        yield ("optimizer", "param_groups", 0, name), value


def changed(state, place, change):
    """A copy of the dicts and lists of a state, one entry of it changed by `change(parent, key)`."""
    state = dict(state)
    parent = state
    for key in place[:-1]:
        parent[key] = copy.copy(parent[key])
        parent = parent[key]
    change(parent, place[-1])
    return state


# may be absent: only for people, or because older and newer versions of torch do not write them
OPTIONAL = {("averaged",), ("data", "content"), ("data", "format"), ("metrics",)}


def may_be_absent(place, good):
    value = good
    for key in place:
        value = value[key]
    group = place[:2] == ("optimizer", "param_groups") and len(place) == 4
    added = place[0] == "config" and place[-1] in checkpoint._ADDED
    return place in OPTIONAL or added or (group and place[3] not in checkpoint._OF_A_GROUP)


def test_a_file_from_before_a_field(tmp_path, good, run):
    for name in checkpoint._ADDED:
        older = changed(good, ("config", name), lambda parent, key: parent.pop(key))
        read_all(tmp_path / "a.pt", run, older)
        default = next(field.default for field in dataclasses.fields(Config) if field.name == name)
        assert getattr(checkpoint.config_of(older, tmp_path / "a.pt"), name) == default


def test_the_whole_file_is_read(root, good, run):
    assert equal(read_all(root / "run" / "checkpoint.pt", run), good)
    assert {place[0] for place, _ in fields(good)} == set(good)


def test_each_field_absent(tmp_path, good, run):
    for place, _ in fields(good):
        if may_be_absent(place, good):
            continue
        with pytest.raises(CheckpointError) as error:
            read_all(tmp_path / "a.pt", run, changed(good, place, lambda parent, key: parent.pop(key)))
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'a.pt'}: ") and "\n" not in message, message
        name = place[-1] if isinstance(place[-1], str) else place[-2]
        assert name in message or place[0] in message, (place, message)


def allowed(place, before, value) -> bool:
    """Whether a value of this kind may stand at a place."""
    if value is None and place in (("config", "steps"), ("config", "eval_steps")):
        return True
    kinds = {int: (int,), float: (int, float)}.get(type(before), (type(before),))
    if before is None or isinstance(before, list | tuple | torch.Tensor):  # settings that torch leaves open
        return before is None and place[0] in ("optimizer", "config")
    return type(value) in kinds or place in (("scaler",),)


def each_wrong_type(good):
    for place, value in fields(good):
        for wrong in WRONG:
            if not equal(wrong, value) and not allowed(place, value, wrong):
                yield place, wrong


def refuse_each(cases, path, good, run):
    before = copy.deepcopy(run.state())
    for place, wrong in cases:
        try:
            read_all(path, run, changed(good, place, lambda parent, key, wrong=wrong: set_item(parent, key, wrong)))
        except CheckpointError as error:
            message = str(error)
        else:
            pytest.fail(f"accepted: {place}: {wrong!r}")
        assert message.startswith(f"{path}: ") and "\n" not in message, message
        known = (place[0], place[-1], "of another model")
        assert any(str(name) in message for name in known), (place, wrong, message)
    assert equal(run.state(), before)  # a file that is refused has changed nothing


def set_item(parent, key, value):
    parent[key] = value


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_each_field_of_each_wrong_type(tmp_path, good, run, every):
    cases = list(each_wrong_type(good))
    assert len(cases) > 1000
    refuse_each(cases[::every], tmp_path / "a.pt", good, run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", 10**9), ("d_model", 2**70), ("ffn_dim", 10**9), ("enc_layers", 10**5), ("dec_layers", 10**5),
     ("n_levels", 10**5), ("n_queries", 10**12), ("enc_points", 10**6), ("dec_points", 2**40), ("n_heads", 32),
     ("ffn_dim", 400_000)],
)  # fmt: skip
def test_sizes_beyond_the_weights_are_not_tried(tmp_path, good, capsys, field, value):
    content = {key: good[key] for key in checkpoint.KEYS}
    checkpoint.save(tmp_path / "a.pt", content | {"config": good["config"] | {field: value}})
    assert main(["inspect", str(tmp_path / "a.pt"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"detr inspect: error: {tmp_path / 'a.pt'}: ") and error.count("\n") == 1
    assert field in error or "of another model" in error or "its sizes do not fit" in error


def refused_or_the_same(path, good, run) -> bool:
    """Whether a file is refused by one line; if it is not, it holds what it held."""
    try:
        state = read_all(path, run)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return True
    assert equal(state, good)
    return False


def damage(path, data, good, run, flips, cuts, seed):
    generator = random.Random(seed)
    refused = 0
    for _ in range(flips):
        flipped = bytearray(data)
        # as often at the start, in the directory at the end and in the zip's headers as in the numbers
        ends = [
            data.find(b"PK\x03\x04", generator.randrange(len(data))) + generator.randrange(80),
            -generator.randrange(1, 6000),
        ]
        flipped[generator.choice([generator.randrange(len(data)), generator.randrange(3000), *ends])] ^= (
            1 << generator.randrange(8)
        )
        path.write_bytes(flipped)
        refused += refused_or_the_same(path, good, run)
    for _ in range(cuts):
        path.write_bytes(data[: generator.randrange(len(data))])
        assert refused_or_the_same(path, good, run)
    return refused


def test_flipped_bits_and_cut_files(tmp_path, root, good, run):
    data = (root / "run" / "checkpoint.pt").read_bytes()
    assert damage(tmp_path / "a.pt", data, good, run, flips=24, cuts=6, seed=0) >= 12


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_flipped_bits_and_cut_files(tmp_path, root, good, run, seed):
    data = (root / "run" / "checkpoint.pt").read_bytes()
    assert damage(tmp_path / "a.pt", data, good, run, flips=200, cuts=20, seed=seed) >= 100


def test_bytes_within_a_tensor(tmp_path, root, good, capsys):
    """torch.load does not look at the checksums of its files."""
    data = bytearray((root / "run" / "best.pt").read_bytes())
    place = data.find(next(iter(good["ema"].values())).numpy().tobytes()[:64])
    data[place : place + 64] = bytes(64)
    (tmp_path / "best.pt").write_bytes(data)
    torch.load(tmp_path / "best.pt", weights_only=True)
    for arguments in (
        ["inspect", str(tmp_path / "best.pt")],
        ["eval", "--data", str(root / "data"), "--checkpoint", str(tmp_path / "best.pt")],
        [
            "predict",
            str(root / "data" / "val"),
            "--checkpoint",
            str(tmp_path / "best.pt"),
            "--out",
            str(tmp_path / "out"),
        ],
        ["export", "--checkpoint", str(tmp_path / "best.pt"), "--to", "onnx", "--out", str(tmp_path / "a.onnx")],
        ["train", "--data", str(root / "data"), "--weights", str(tmp_path / "best.pt"), "--out", str(tmp_path / "run")],
    ):
        assert main(arguments) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / 'best.pt'}: not readable: damaged: archive/data/0 is not what was written" in line


def test_an_entry_marked_as_a_folder(tmp_path, root):
    """torch.load then leaves the memory of a tensor as it was, and the checksum in the file is right."""
    data = bytearray((root / "run" / "best.pt").read_bytes())
    place = -1
    while (place := data.find(b"PK\x01\x02", place + 1)) >= 0:
        length = int.from_bytes(data[place + 28 : place + 30], "little")
        if data[place + 46 : place + 46 + length].endswith(b"data/0"):
            data[place + 38] ^= 0x10
    (tmp_path / "best.pt").write_bytes(data)
    torch.load(tmp_path / "best.pt", weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"best\.pt: not readable: damaged: archive/data/0 is not what was written"
    ):
        checkpoint.load(tmp_path / "best.pt")


def deep(value="x", levels=100_000):
    for _ in range(levels):
        value = [value]
    return value


def expanded(tensor):
    """A tensor of the same shape whose numbers share one place: fused optimisers would write beyond it."""
    return torch.zeros(1).expand(tensor.shape)


def transposed(tensor):
    return torch.zeros(tensor.shape[::-1]).permute(*range(tensor.dim())[::-1])


OF_WEIGHT, OF_GROUP = ("optimizer", "state", 0), ("optimizer", "param_groups", 0)
HAND_MADE = [
    ((*OF_WEIGHT, "exp_avg"), expanded, "optimizer.state.0.exp_avg: its numbers lie in another order"),
    ((*OF_WEIGHT, "exp_avg_sq"), transposed, "optimizer.state.0.exp_avg_sq: its numbers lie in another order"),
    *(((*OF_GROUP, name), lambda _: True, f"optimizer.param_groups[0].{name}: expected False, got True")
      for name in ("amsgrad", "maximize", "differentiable", "capturable")),
    ((*OF_GROUP, "betas"), lambda _: (10**400, 0.9), "betas[0]: expected float, got an integer beyond"),
    (("best_ap",), lambda _: math.nan, "best_ap: expected a number, got nan"),
    (("steps_done",), lambda _: 10**30, "steps_done: expected an integer of at least 0, got an integer beyond 64 bits"),
    (("sums",), lambda _: {"loss": 10**400}, "sums: expected a dict of numbers"),
    (("sums",), lambda _: {"\udcff": 1.0}, "sums: expected a dict of numbers"),
    (("config", "seed"), lambda _: 10**30, f"config: seed: expected an integer from 0 to {SEED}, got an"),
    (("config", "lr"), lambda _: 10**400, "config: lr: expected a number from 0 to 1, got an integer beyond 64 bits"),
    (("config", "d_model"), lambda _: torch.zeros(100, 100), "d_model: expected an integer from 32 to 4096, got a Ten"),
    (("data", "x"), lambda _: torch.zeros(3), "data: unknown field 'x'"),
    (("data", ("a", 1)), lambda _: "x", "data: unknown field a tuple"),
    (("data", "content"), lambda _: torch.zeros(3), "data.content: not what `detr train` writes, got a Tensor"),
    (("data", "format"), lambda _: torch.zeros(3), "data.format: not what `detr train` writes, got a Tensor"),
    (("data", "format"), lambda _: "pickle", "data.format: not what `detr train` writes, got 'pickle'"),
    (("data", "classes"), lambda _: ["a", 1], "data.classes: not what `detr train` writes, got a list"),
    (("data", "val_fraction"), lambda _: math.nan, "data.val_fraction: not what `detr train` writes, got nan"),
    (("data", "split_seed"), lambda _: True, "data.split_seed: not what `detr train` writes, got True"),
    (("data", "wandb"), lambda _: {"project": 3}, "data.wandb: not what `detr train` writes, got a dict"),
    (("model", "transformer.level_embed"), expanded, "model: expected a dict of tensors"),
    *(((name,), lambda _: deep(), f"{name}: ")
      for name in ("class_names", "category_ids", "model", "metrics", "ema", "optimizer", "data")),
    (("config", "d_model"), lambda _: deep(), "config: d_model: expected an integer from 32 to 4096, got a list"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HAND_MADE)))
def test_checkpoints_that_were_made_by_hand(tmp_path, good, run, case):
    place, value, message = HAND_MADE[case]
    made = changed(good, place, lambda parent, key: set_item(parent, key, value(parent.get(key))))
    before = copy.deepcopy(run.state())
    with pytest.raises(CheckpointError) as error:
        read_all(tmp_path / "a.pt", run, made)
    assert str(error.value).startswith(f"{tmp_path / 'a.pt'}: ") and message in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    assert equal(run.state(), before)


def test_weights_that_are_not_numbers(tmp_path, root, good, capsys):
    weights = {name: torch.full_like(tensor, math.nan) for name, tensor in good["ema"].items()}
    path = tmp_path / "nan.pt"
    checkpoint.save(path, {key: good[key] for key in checkpoint.KEYS} | {"model": weights, "metrics": {"AP": 10**400}})
    image = str(root / "data" / "val" / "000000.jpg")
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    for arguments in (
        ["eval", "--data", str(root / "data"), "--checkpoint", str(path)],
        ["predict", image, "--checkpoint", str(path), "--out", str(tmp_path / "out")],
        ["inspect", str(path), "--image", image, "--out", str(tmp_path / "a.png")],
    ):
        assert main([*arguments, "--device", "cpu"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"detr {arguments[0]}: error: the model's scores or boxes are not finite")
    # nor are they exported, or trained on
    for to, out in (("onnx", "a.onnx"), ("torch-export", "a.pt2"), ("aoti", "b.pt2")):
        assert main(["export", "--checkpoint", str(path), "--to", to, "--out", str(tmp_path / out)]) == 1
        line = capsys.readouterr().err
        assert line.startswith(f"detr export: error: {path}: backbone.stem.0.weight: expected finite numbers")
        assert line.count("\n") == 1 and not (tmp_path / out).exists()
    flags = ["--data", str(root / "data"), "--out", str(tmp_path / "run"), *SMALL, "--device", "cpu"]
    assert main(["train", "--weights", str(path), *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"detr train: error: {path}: backbone.stem.0.weight: ")


def test_a_run_that_diverges_ends_in_one_line(tmp_path, root, monkeypatch, capsys):
    step = Run.step

    def diverges(run, batches, stop=False):
        loss = step(run, batches, stop)
        with torch.no_grad():
            next(run.learner.model.parameters()).fill_(math.nan)
        return loss

    monkeypatch.setattr(Run, "step", diverges)
    flags = ["--steps", "4", "--set", "eval_steps=2", *SMALL, "--device", "cpu"]
    assert main(["train", "--data", str(root / "data"), "--out", str(tmp_path / "run"), *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("detr train: error: the model's scores or boxes are not finite")


def test_a_file_that_was_saved_again_is_valid(tmp_path, root, good, run):
    torch.save(good, tmp_path / "a.pt")
    assert equal(read_all(tmp_path / "a.pt", run), good)


@pytest.mark.parametrize("name", ["config", "model", "optimizer", "data", "best_ap", "sums"])
def test_resume_says_it_in_one_line(tmp_path, root, good, capsys, name):
    shutil.copytree(root / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    for state in ({k: v for k, v in good.items() if k != name}, good | {name: ["x"]}):
        checkpoint.save(path, state)
        before = path.read_bytes()
        assert main(["train", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 1
        line = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(line) == 1 and line[0].startswith(f"detr train: error: {path}: {name}")
        assert path.read_bytes() == before
