"""Who may import whom, and what an import needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detr
import msda_triton
from detr.config import ModelConfig
from detr.model import build_model
from detr.packages import PACKAGES
from detr.presets import preset

ROOT = Path(__file__).parent.parent


def test_import_needs_neither_triton_nor_the_detector_libraries():
    code = (
        "import sys; sys.modules['triton'] = None; import msda_triton, torch;"
        "heavy = {'torchvision', 'scipy', 'matplotlib', 'pycocotools', 'transformers', 'detr'} & set(sys.modules);"
        "assert 'torch.utils.flop_counter' not in sys.modules;"
        "assert not heavy, heavy;"
        "x = torch.rand(1, 3, 1, 1, 1, 2);"
        "print(msda_triton.ms_deform_attn(torch.ones(1, 4, 1, 2), [(2, 2)], x, torch.ones(1, 3, 1, 1, 1)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 3, 2])", done.stderr


def test_the_help_of_the_commands_imports_no_library():
    code = """
import contextlib, io, sys
from detr.cli import main
for command in ([], ["synth"], ["check-data"], ["convert"], ["train"], ["eval"], ["predict"], ["inspect"], ["export"]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert text.getvalue().startswith("usage: detr"), command
heavy = {"torch", "torchvision", "numpy", "scipy", "PIL", "matplotlib", "pycocotools", "faster_coco_eval",
         "transformers", "safetensors", "yaml", "defusedxml", "tensorboard", "tqdm", "filelock", "onnx", "triton",
         "msda_triton"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ARROWS = {
    "call": set(),
    "constants": set(),
    "checks": {"call", "constants"},
    "reference": {"call", "constants"},
    "cpu.bags": {"call", "constants"},
    "cpu.fallback": {"call", "cpu.bags", "reference"},
    "cpu.inductor": {"call", "cpu.bags", "cpu.fallback"},
    "flops": set(),
    "user_cache": set(),
    "version": set(),
    "kernels.dtypes": set(),
    "kernels.channels": {"kernels.dtypes"},
    "kernels.sample": {"kernels.dtypes"},
    "kernels.forward": {"kernels.channels", "kernels.sample"},
    "kernels.backward": {"kernels.channels", "kernels.dtypes", "kernels.sample"},
    "kernels.bound": {"kernels.channels", "kernels.sample"},
    "kernels.plan": {"call"},
    "kernels.tuning": {"kernels.plan", "user_cache", "version"},
    "kernels.launch": {
        "call",
        "constants",
        "kernels.plan",
        "kernels.tuning",
        "kernels.forward",
        "kernels.backward",
        "kernels.bound",
    },
    "op": {
        "call",
        "constants",
        "flops",
        "reference",
        "cpu.fallback",
        "cpu.inductor",
        "kernels.launch",
        "kernels.tuning",
    },
    "functional": {"call", "checks", "constants", "op", "reference"},
    "module": {"checks", "functional", "reference"},
}
PACKAGE = ROOT / "msda_triton"
SHIMS = sorted(path.stem for path in (PACKAGE / "shims").glob("*.py"))


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        top = node in tree.body
        for name in names:
            yield name, top


def module_of(imported):
    """The module of ours that `import` names, or the one that holds what it names."""
    name = imported.removeprefix("msda_triton.")
    return name if name in ARROWS or "." not in name else name.rpartition(".")[0]


def test_every_file_has_its_arrows():
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(file.parts) for file in files if not file.name.startswith("__") and file.parts[0] != "shims"}
    assert names == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_of_the_house(name):
    for imported, top in imports(PACKAGE / f"{name.replace('.', '/')}.py"):
        package, *rest = imported.split(".")
        assert package not in ("detr", "benchmarks", "tests"), imported
        if package == "msda_triton" and rest and imported not in ("msda_triton.cpu", "msda_triton.kernels"):
            assert module_of(imported) in ARROWS[name], imported
            assert not (name == "op" and top and rest[0] == "kernels"), f"{imported} at import"
        assert not (not name.startswith("kernels.") and package == "triton"), imported


def test_the_arrows_only_go_down():
    done = set()
    while done != set(ARROWS):
        free = {name for name in ARROWS if name not in done and ARROWS[name] <= done}
        assert free, f"a circle among {set(ARROWS) - done}"
        done |= free


@pytest.mark.parametrize("name", SHIMS)
def test_arrows_of_the_shims(name):
    """They see the public functions and each other, and nothing of the packages that they stand in for."""
    for imported, _ in imports(PACKAGE / "shims" / f"{name}.py"):
        package, *rest = imported.split(".")
        if package == "msda_triton":
            assert not rest or rest[0] in ("functional", "module", "shims"), imported
        else:
            assert package == "torch" or package in sys.stdlib_module_names, imported


def test_the_detector_uses_public_names_only():
    for path in (ROOT / "detr").rglob("*.py"):
        for imported, _ in imports(path):
            if imported.startswith("msda_triton"):
                assert imported.removeprefix("msda_triton").removeprefix(".") in ("", *msda_triton.__all__), (
                    f"{path}: {imported}"
                )


def test_the_arrows_of_the_detector_only_go_down():
    """Imports within functions count: what comes first here needs nothing that comes later."""
    needs = {}
    for path in (ROOT / "detr").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        needs[name] = {imported for imported, _ in imports(path)} - {name}
    needs = {name: {module for module in needs if module in imported} - {"detr"} for name, imported in needs.items()}
    needs["detr"] = {"detr.errors"}  # its other names are imported when they are asked for
    done = set()
    while done != set(needs):
        free = {name for name in needs if name not in done and needs[name] <= done}
        assert free, f"a circle among {sorted(set(needs) - done)}"
        done |= free
    # the way of a batch, and the commands on top
    order = [f"detr.{name}" for name in ("config", "model", "learner", "run", "training", "cli")]
    for i, name in enumerate(order):
        assert not needs[name] & set(order[i:]), name


def test_one_place_prints():
    """Names from files hold what they like: `detr.terminal.say` alone knows what a terminal may have of it."""
    for path in (ROOT / "detr").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        writes = [call.lineno for call in calls if ast.unparse(call) in ("sys.stdout.write", "sys.stderr.write")]
        assert path.name == "terminal.py" or not prints + writes, f"{path}: lines {prints + writes}"


def test_a_backbone_cannot_read_a_learning_rate():
    for name in ("backbone", "transformer", "model", "position", "boxes"):
        names = {imported for imported, _ in imports(ROOT / "detr" / f"{name}.py")}
        assert "detr.config.Config" not in names and not names & {"detr.presets", "detr.learner", "detr.run"}, name
    config = preset("tiny", lr=0.5)
    seen = build_model(config, 2).config
    assert type(seen) is ModelConfig and seen == config.model and not hasattr(seen, "lr_backbone")


def test_the_public_names_of_the_detector():
    code = """
import sys
import detr
heavy = {"torch", "torchvision", "numpy", "scipy", "PIL", "matplotlib", "triton", "msda_triton"} & set(sys.modules)
assert not heavy, heavy
assert dir(detr) == sorted(detr.__all__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(detr, name).__doc__ for name in detr.__all__)
    assert callable(detr.load) and callable(detr.train)  # no module has taken a name away
    assert not hasattr(detr, "nothing") and (ROOT / "detr" / "py.typed").exists()


def test_the_extra_of_the_detector_is_what_it_looks_for():
    extra = re.search(r"^detr = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    named = {"pillow": "PIL", "pyyaml": "yaml"}
    names = re.findall(r'"([a-z]+)>=', extra)
    assert sorted(named.get(name, name) for name in names) == sorted(PACKAGES)


@pytest.mark.parametrize("arguments", [[], ["train", "--data", "x"], ["predict", "a.jpg", "--checkpoint", "b.pt"]])
def test_without_the_extra_a_line_says_how_to_install_it(arguments):
    hidden = "import sys; sys.modules['torchvision'] = sys.modules['tqdm'] = None; "
    line = "not installed: torchvision, tqdm: pip install '.[detr]'"
    code = f"{hidden}from detr.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"detr: error: {line}\n")
    code = f"{hidden}import detr; detr.load('x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"detr.errors.MissingPackageError: {line}"


def test_only_one_module_knows_that_there_are_formats():
    """Whatever comes after a `Split` must not depend on where it is from."""
    below = {"draft", "errors", "formats", "images", "problems", "progress", "split"}
    for path in (ROOT / "detr").rglob("*.py"):
        ours = {name.split(".")[1] for name, _ in imports(path) if name.startswith("detr.")}
        if path.parent.name == "formats":
            assert ours <= below, (path, ours - below)
        else:
            assert "formats" not in ours or path.stem == "splits", path
