"""`patch` and `unpatch`: what is found, replaced, left alone, and put back."""

import functools
import gc
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import shim_packages
import torch
from attention import gradients, make_inputs, oracle, oracle_gradients

import msda_triton
from msda_triton import __main__
from msda_triton.shims import deformable_detr, mmcv, patching, rtdetr

SHAPES, STARTS = [(3, 5), (2, 3)], [0, 15]
shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
EXTENSION = "MultiScaleDeformableAttention"


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    msda_triton.unpatch()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write packages to a folder on the path, from {file: source}; they are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(*packages: dict[str, str]) -> None:
        for name, source in {key: text for package in packages for key, text in package.items()}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in path.relative_to(tmp_path).parents:
                (tmp_path / folder / "__init__.py").touch()
            path.write_text(source)
        importlib.invalidate_caches()

    yield write
    msda_triton.unpatch()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is None or str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def inputs():
    return make_inputs(SHAPES, B=2, Q=5, M=3, D=4, P=2)


def six(function):
    return lambda v, x, a: function.apply(v, shapes, starts, x, a, 64)


def four(function):
    return lambda v, x, a: function(v, SHAPES, x, a)


def assert_oracle(call) -> None:
    tensors, grad_out = inputs(), torch.randn(2, 5, 12)
    want = oracle_gradients(lambda v, x, a: oracle(v, SHAPES, x, a), tensors, grad_out)
    for x, y in zip(gradients(call, tensors, grad_out), want, strict=True):
        assert x.dtype == torch.float32  # the stand-in packages' own results are float64
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def replaced(patch: patching.Patch) -> set[str]:
    return {row.entry_point for row in patch.rows if row.replaced}


def snapshot() -> dict:
    """Every value in every module's namespace, and every attribute of every class and nn.Module there is."""
    found = {"sys.modules": dict(sys.modules)}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and not name.startswith(("torch", "_pytest")):
            found[name] = dict(vars(module))
            for key, thing in vars(module).items():
                if isinstance(thing, type):
                    found[f"{name}.{key}"] = dict(vars(thing))
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.nn.Module):
            found[id(thing)] = dict(vars(thing))
    return found


@pytest.mark.entry_point("MultiScaleDeformableAttention, not compiled: Deformable DETR's own autograd function")
def test_a_repository_that_was_never_compiled_runs(install):
    install(shim_packages.DEFORMABLE_DETR)
    with pytest.raises(ModuleNotFoundError, match=EXTENSION):
        importlib.import_module("models.ops.functions")
    with msda_triton.patch("c_extension") as patch:
        functions = importlib.import_module("models.ops.functions")
        assert_oracle(six(functions.MSDeformAttnFunction))
        with pytest.raises(NotImplementedError, match="dcnv3_forward: not compiled"):
            sys.modules[EXTENSION].dcnv3_forward()
    assert replaced(patch) == {EXTENSION} and "stood in for" in str(patch)
    assert EXTENSION not in sys.modules


@pytest.mark.entry_point("MSDeformAttnFunction in a repository's models.ops")
def test_an_autograd_function_and_its_copies(install):
    install(shim_packages.DEFORMABLE_DETR)
    with msda_triton.patch("c_extension"):
        functions = importlib.import_module("models.ops.functions")
        modules = importlib.import_module("models.ops.modules")
    original = functions.MSDeformAttnFunction
    before = snapshot()
    with msda_triton.patch("models.ops") as patch:
        assert modules.MSDeformAttnFunction is functions.MSDeformAttnFunction is deformable_detr.MSDeformAttnFunction
        assert_oracle(six(modules.MSDeformAttnFunction))
        assert_oracle(four(functions.ms_deform_attn_core_pytorch))
    assert replaced(patch) == {
        "models.ops.functions.MSDeformAttnFunction", "models.ops.functions.ms_deform_attn_core_pytorch"
    }  # fmt: skip
    assert "MSDeformAttnFunction         replaced: in 2 modules" in str(patch)
    assert modules.MSDeformAttnFunction is original
    assert_same_snapshot(before)

    # graphs look the function up by name, and see one operator in its place
    with msda_triton.patch("models.ops"):
        call = lambda v, x, a: modules.MSDeformAttnFunction.apply(v, shapes, starts, x, a, 64)  # noqa: E731
        assert_oracle(torch.compile(call, fullgraph=True, backend="aot_eager"))


def assert_same_snapshot(before: dict) -> None:
    after = snapshot()
    for key, values in before.items():
        if key in after and not str(key).startswith(("msda_triton", "test_", "hypothesis")):
            changed = [name for name in values if after[key].get(name) is not values[name]]
            assert not changed, f"{key}: {changed[:5]}"


def test_a_compiled_extension_gets_other_functions_and_its_own_back(monkeypatch):
    extension = ModuleType(EXTENSION)
    own = extension.ms_deform_attn_forward = extension.ms_deform_attn_backward = lambda *args: None
    monkeypatch.setitem(sys.modules, EXTENSION, extension)
    with msda_triton.patch("c_extension") as patch:
        assert sys.modules[EXTENSION] is extension
        value, locations, weights = inputs()
        out = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
        torch.testing.assert_close(out.double(), oracle(value, SHAPES, locations, weights), rtol=1e-5, atol=1e-5)
    assert replaced(patch) == {f"{EXTENSION}.ms_deform_attn_forward", f"{EXTENSION}.ms_deform_attn_backward"}
    assert extension.ms_deform_attn_forward is own


@pytest.mark.parametrize(
    ("package", "module"),
    [
        pytest.param(
            source, module, id=name,
            marks=[pytest.mark.entry_point(f"{name}._C"), pytest.mark.entry_point(f"{module} (Function, function)")],
        )
        for name, source, module in (
            ("groundingdino", shim_packages.GROUNDINGDINO, "groundingdino.models.GroundingDINO.ms_deform_attn"),
            ("detrex", shim_packages.DETREX, "detrex.layers.multi_scale_deform_attn"),
        )
    ],
)  # fmt: skip
def test_groundingdino_and_detrex(install, package, module):
    install(package)
    name = module.split(".")[0]
    with msda_triton.patch(name) as patch:
        functions = sys.modules[module]  # imported by patch, which its missing extension did not prevent
        assert_oracle(six(functions.MultiScaleDeformableAttnFunction))
        assert_oracle(four(functions.multi_scale_deformable_attn_pytorch))
        value, locations, weights = inputs()
        out = functions._C.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
        torch.testing.assert_close(out.double(), oracle(value, SHAPES, locations, weights), rtol=1e-5, atol=1e-5)
    assert replaced(patch) == {
        f"{name}._C", f"{module}.MultiScaleDeformableAttnFunction", f"{module}.multi_scale_deformable_attn_pytorch"
    }  # fmt: skip
    assert issubclass(functions.MultiScaleDeformableAttnFunction, torch.autograd.Function)


@pytest.mark.entry_point("mmcv.ops.multi_scale_deform_attn (Function, function; mmcv-lite's missing _ext)")
@pytest.mark.entry_point("MultiScaleDeformableAttnFunction_fp16, _fp32 in BEVFormer's modules")
def test_mmcv_and_what_imports_from_it(install):
    install(shim_packages.MMCV)
    with msda_triton.patch("mmcv") as patch:
        module = sys.modules["mmcv.ops.multi_scale_deform_attn"]
        assert_oracle(six(module.MultiScaleDeformableAttnFunction))
        assert_oracle(four(module.multi_scale_deformable_attn_pytorch))
        with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms: not compiled"):
            module.ext_module.nms()
        bevformer = importlib.import_module("projects.mmdet3d_plugin.modules")
        assert bevformer.multi_scale_deformable_attn_pytorch is mmcv.multi_scale_deformable_attn_pytorch
        with msda_triton.patch("projects.mmdet3d_plugin"):
            assert_oracle(six(bevformer.MultiScaleDeformableAttnFunction_fp32))
            assert_oracle(six(bevformer.MultiScaleDeformableAttnFunction_fp16))
    assert {"mmcv._ext", "mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction"} <= replaced(patch)
    # another package imported the stand-in by name: nobody can tell that it wanted mmcv's, and both do the same
    assert bevformer.multi_scale_deformable_attn_pytorch is mmcv.multi_scale_deformable_attn_pytorch
    assert module.multi_scale_deformable_attn_pytorch.__module__ == module.__name__

    # the package's own autograd function again, on the two functions of its extension
    assert issubclass(module.MultiScaleDeformableAttnFunction, torch.autograd.Function)
    assert_oracle(six(module.MultiScaleDeformableAttnFunction))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.entry_point(f"RT-DETR decoder, {n}")) for n in ("default", "discrete")]
)
def test_a_captured_function_is_replaced_in_the_models_that_exist(install, name):
    install(shim_packages.RT_DETR)
    decoder = importlib.import_module("src.zoo.rtdetr.decoder")
    model = torch.nn.Sequential(decoder.MSDeformableAttention(name), torch.nn.Identity())
    captured, original = model[0].ms_deformable_attn_core, model[0].first_version
    value, locations, weights = inputs()
    arguments = value, SHAPES, locations.flatten(3, 4), weights.flatten(3), [2, 2]
    expected = model[0](*arguments).double()
    elsewhere = functools.partial(original)
    before = snapshot()
    with msda_triton.patch("src.zoo.rtdetr") as patch:
        assert model[0].ms_deformable_attn_core.func is rtdetr.deformable_attention_core_func_v2
        assert model[0].ms_deformable_attn_core.keywords == {"method": name}
        assert model[0].first_version is decoder.deformable_attention_core_func is not original
        out = model[0](*arguments)
        built_later = decoder.MSDeformableAttention(name)
        assert built_later.ms_deformable_attn_core.func is rtdetr.deformable_attention_core_func_v2
        assert_oracle(four(model[0].first_version))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert "in 2 modules and 1 nn.Module that had captured it" in str(patch)
    assert "left alone: held by 1 functools.partial outside of any nn.Module" in str(patch)
    assert elsewhere.func is original and model[0].ms_deformable_attn_core is captured
    assert built_later.ms_deformable_attn_core.func is captured.func and built_later.first_version is original
    assert_same_snapshot(before)


@pytest.mark.entry_point("D-FINE: values by levels")
@pytest.mark.entry_point("DEIM: value_shape")
def test_d_fine_and_deim(install):
    install(shim_packages.RT_DETR, shim_packages.D_FINE)
    fine, deim = (importlib.import_module(f"{name}.utils") for name in ("src.zoo.dfine", "engine.deim"))
    value, locations, weights = inputs()
    levels = value.permute(0, 2, 3, 1).split([15, 6], -1)
    rest = SHAPES, locations.flatten(3, 4)[:, :, :, :3], weights.flatten(3)[..., :3], [2, 1]
    for method in ("default", "discrete"):
        expected = fine.deformable_attention_core_func_v2(levels, *rest, method)
        with msda_triton.patch("src.zoo.dfine"), msda_triton.patch("engine") as patch:
            assert replaced(patch) == {"engine.deim.utils.deformable_attention_core_func_v2"}
            for got in (
                fine.deformable_attention_core_func_v2(levels, *rest, method),
                deim.deformable_attention_core_func_v2(levels, *rest, method),
                deim.deformable_attention_core_func_v2(value, *rest, method, value_shape="reshape"),
            ):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.entry_point("rfdetr.models.ops.functions.ms_deform_attn_func.ms_deform_attn_core_pytorch")
@pytest.mark.entry_point("torch_ms_deform_attn.ms_deform_attn")
@pytest.mark.entry_point("DCNv4.functions.flash_deform_attn_func.FlashDeformAttnFunction")
def test_rfdetr_tmda_and_dcnv4(install):
    install(shim_packages.RFDETR, shim_packages.TMDA, shim_packages.DCNV4)
    with msda_triton.patch("rfdetr", "torch_ms_deform_attn", "DCNv4") as patch:
        core = sys.modules["rfdetr.models.ops.modules.ms_deform_attn"].ms_deform_attn_core_pytorch
        assert_oracle(lambda v, x, a: core(v.permute(0, 2, 3, 1).contiguous(), shapes, x, a.flatten(3)))
        tmda = sys.modules["torch_ms_deform_attn"]
        assert_oracle(lambda v, x, a: tmda.ms_deform_attn(v, shapes, starts, x, a))
        flash = sys.modules["DCNv4.functions.flash_deform_attn_func"].FlashDeformAttnFunction
        value, locations, logits = inputs()
        out = flash.apply(value, shapes, starts, torch.cat([locations.flatten(3), logits.flatten(3)], -1), 64, 2)
        want = oracle(value, SHAPES, locations, logits.flatten(3).softmax(-1).view_as(logits))
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert replaced(patch) == {
        "rfdetr.models.ops.functions.ms_deform_attn_func.ms_deform_attn_core_pytorch",
        "torch_ms_deform_attn.ms_deform_attn",
        "DCNv4.functions.flash_deform_attn_func.FlashDeformAttnFunction",
    }
    why = {row.entry_point: row.why for row in patch.rows if not row.replaced}
    assert why == {"torch_ms_deform_attn.MSDeformAttnFunction": "is no torch.autograd.Function"}


OTHERS = {
    "other arguments": (
        "def ms_deform_attn_core_pytorch(value, value_spatial_shapes, depth, sampling_locations, attention_weights):\n"
        "    pass",
        r"its arguments are \(value, value_spatial_shapes, depth, .*\), expected \(value, value_spatial_shapes, samp",
    ),
    "other numbers": (
        "from attention import oracle\n"
        "def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):\n"
        "    return oracle(value, value_spatial_shapes, sampling_locations + 0.01, attention_weights)",
        r"a small call gave other numbers \(tokens_first\)",
    ),
    "an error": (
        "def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):\n"
        "    raise RuntimeError('needs a GPU')",
        "a small call raised RuntimeError: needs a GPU",
    ),
    "a function with other arguments": (
        "import torch\n"
        "class MSDeformAttnFunction(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, weights): pass",
        r"its arguments are \(value, .*, weights\), expected \(value, .*, attention_weights, im2col_step\)",
    ),
}


@pytest.mark.parametrize(("source", "why"), OTHERS.values(), ids=OTHERS)
def test_another_version_is_named_and_left_alone(install, source, why):
    install({"standin_fork/ops.py": f"{source}\n"})
    fork = importlib.import_module("standin_fork.ops")
    sys.modules["standin_fork"].__version__ = "7.1"
    before = dict(vars(fork))
    with msda_triton.patch("standin_fork") as patch:
        assert dict(vars(fork)) == before
    [row] = patch.rows
    assert not row.replaced and row.entry_point.startswith("standin_fork.ops.")
    assert re.match(rf"standin_fork 7\.1: {why}", row.why), row.why


def test_an_import_that_fails_is_reported(install):
    install({"detrex/layers/multi_scale_deform_attn.py": "import a_package_that_is_not_there"})
    patch = msda_triton.patch("detrex")
    assert "detrex.layers.multi_scale_deform_attn  left alone: its import failed: ModuleNotFoundError" in str(patch)


def test_names_that_are_not_there_are_errors_and_change_nothing(install):
    install(shim_packages.DEFORMABLE_DETR, {"standin_empty/__init__.py": ""})
    importlib.import_module("standin_empty")
    before = snapshot()
    with pytest.raises(ValueError, match="names: expected an installed package or an imported module, got 'no_such'"):
        msda_triton.patch("c_extension", "no_such")
    with pytest.raises(ValueError, match="'standin_empty' is there, but nothing imported from it has a known"):
        msda_triton.patch("c_extension", "standin_empty")
    assert EXTENSION not in sys.modules
    assert_same_snapshot(before)


def test_patches_nest_and_errors_undo_them(install):
    install(shim_packages.RT_DETR)
    utils = importlib.import_module("src.zoo.rtdetr.utils")
    original = utils.deformable_attention_core_func
    outer = msda_triton.patch("src.zoo.rtdetr")
    with pytest.raises(KeyError), msda_triton.patch("src.zoo.rtdetr") as inner:
        assert not replaced(inner) and "an earlier patch() replaced it" in str(inner)
        raise KeyError
    assert utils.deformable_attention_core_func is rtdetr.deformable_attention_core_func
    assert len(replaced(outer)) == 2
    msda_triton.unpatch()
    assert utils.deformable_attention_core_func is original
    msda_triton.unpatch()  # nothing to do


def test_somebody_elses_replacement_stays(install):
    install(shim_packages.RT_DETR)
    utils = importlib.import_module("src.zoo.rtdetr.utils")
    msda_triton.patch("src.zoo.rtdetr")
    utils.deformable_attention_core_func = "theirs"
    msda_triton.unpatch()
    assert utils.deformable_attention_core_func == "theirs"


def test_our_own_names_are_never_replaced(install):
    install(shim_packages.DEFORMABLE_DETR, {"standin_user.py": "from msda_triton import MSDeformAttnFunction"})
    user = importlib.import_module("standin_user")
    with msda_triton.patch() as patch:
        assert user.MSDeformAttnFunction is msda_triton.MSDeformAttnFunction
    assert user.MSDeformAttnFunction is msda_triton.MSDeformAttnFunction
    assert not any("msda_triton" in row.entry_point or "standin_user" in row.entry_point for row in patch.rows)


def test_the_table_of_what_can_be_patched(install, capsys):
    install(shim_packages.TMDA)
    assert __main__.main() == 0
    lines = capsys.readouterr().out.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines if line.startswith("  ") and "torch." not in line)
    assert table["torch_ms_deform_attn"].endswith("can be patched") and table["mmcv"] == "not installed"
    assert table[EXTENSION] == "not compiled, can be stood in for"
    assert {"transformers", "mmcv", "detrex", "groundingdino", "rfdetr", "DCNv4"} < table.keys()
    assert "torch_ms_deform_attn" not in sys.modules


def test_every_line_of_the_docs(install):
    root = Path(__file__).parent.parent
    text = (root / "docs" / "drop-in.md").read_text() + (root / "README.md").read_text()
    names = set(re.findall(r'patch\("([^"]+)"\)', text))
    assert len(names) >= 12
    if importlib.util.find_spec("transformers") is None:  # from Python 3.11 on
        names.remove("transformers")
    packages = ("DEFORMABLE_DETR", "GROUNDINGDINO", "DETREX", "MMCV", "RT_DETR", "D_FINE", "RFDETR", "TMDA", "DCNV4")
    install(*(getattr(shim_packages, name) for name in packages))
    with msda_triton.patch("c_extension", "mmcv"):  # what is imported here was never compiled
        for name in (
            "models.ops.functions",
            "projects.mmdet3d_plugin.modules",
            "src.zoo.dfine.utils",
            "engine.deim.utils",
        ):
            importlib.import_module(name)
    for name in sorted(names):
        with msda_triton.patch(name) as patch:
            assert replaced(patch), name
