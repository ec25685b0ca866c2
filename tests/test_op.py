"""The registered operators as PyTorch 2 sees them: opcheck, compile, export, functorch-free autograd, imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention import gradients, make_inputs, reference

import msda_triton
from msda_triton import MSDeformAttn, ms_deform_attn

ROOT = Path(__file__).parent.parent
SHAPES = [(5, 7), (3, 4)]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_inputs(device, fused):
    value, locations, weights = make_inputs(SHAPES, Q=5, D=8, P=2, device=device)
    points = torch.rand(2, 5, 2, 4, device=device) if fused else None
    mask = torch.zeros(2, 47, dtype=torch.bool, device=device) if fused else None
    tensors = (value.detach(), torch.tensor(SHAPES, device=device), None, locations.detach().flatten(3, 4))
    return (*tensors, weights.detach().flatten(3, 4), [2, 2], points, mask, [])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_opcheck(fused, device):
    inputs = op_inputs(device, fused)
    torch.library.opcheck(torch.ops.msda_triton.forward.default, inputs, test_utils=CHECKS)
    grad_out = torch.randn(2, 5, 16, device=device)
    for needs in ([True, True, True, fused], [False, True, False, False], [True, False, False, False]):
        torch.library.opcheck(torch.ops.msda_triton.backward.default, (grad_out, *inputs, needs), test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compile_fullgraph_with_dynamic_sizes(backend, device):
    """One compilation serves every image size, forward and backward, without a graph break."""
    compilations = []

    def count(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    function = torch.compile(
        lambda v, s, x, a: ms_deform_attn(v, s, x, a, backend=backend), fullgraph=True, dynamic=True, backend=count
    )
    for shapes, Q in ([(5, 7), (3, 4)], 5), ([(6, 4), (2, 2)], 9), ([(9, 9), (5, 5)], 17):
        inputs = make_inputs(shapes, Q=Q, D=8, device=device)
        sizes = torch.tensor(shapes, device=device)
        got = gradients(lambda v, x, a, s=sizes: function(v, s, x, a), inputs, torch.ones(2, Q, 16, device=device))
        want = gradients(lambda v, x, a, s=shapes: reference(v, s, x, a), inputs, torch.ones(2, Q, 16, device=device))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert len(compilations) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_the_module(backend, device):
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=2).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    query, source = torch.randn(2, 5, 16, device=device), torch.randn(2, 47, 16, device=device, requires_grad=True)
    points, shapes = torch.rand(2, 5, 2, 2, device=device), torch.tensor(SHAPES, device=device)
    grads = []
    for run in (module, compiled):
        out = run(query, points, source, shapes)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [source, *module.parameters()])))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_export(device):
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=2).to(device).eval()
    arguments = (
        torch.randn(2, 5, 16, device=device),
        torch.rand(2, 5, 2, 2, device=device),
        torch.randn(2, 47, 16, device=device),
        torch.tensor(SHAPES, device=device),
    )
    program = torch.export.export(module, arguments)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments), rtol=1e-5, atol=1e-6)


def test_no_graph_waits_for_the_device(device):
    """Traced with fake tensors: anything that reads a tensor's content would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = (2, 47, 2, 8), (2, 5, 2, 2, 2, 2), (2, 5, 2, 2, 2)
    with FakeTensorMode():
        value, locations, weights = (torch.empty(size, device=device) for size in sizes)
        shapes = torch.empty(2, 2, dtype=torch.long, device=device)
        torch.ops.msda_triton.forward(
            value, shapes, None, locations.flatten(3, 4), weights.flatten(3, 4), [2, 2], None, None, []
        )


def test_import_needs_neither_triton_nor_the_detector_libraries():
    code = (
        "import sys; sys.modules['triton'] = None; import msda_triton, torch;"
        "heavy = {'torchvision', 'scipy', 'matplotlib', 'pycocotools', 'transformers', 'detr'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "x = torch.rand(1, 3, 1, 1, 1, 2);"
        "print(msda_triton.ms_deform_attn(torch.ones(1, 4, 1, 2), [(2, 2)], x, torch.ones(1, 3, 1, 1, 1)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 3, 2])", done.stderr


ARROWS = {
    "constants": set(),
    "reference": {"constants"},
    "bilinear": set(),
    "tuning": set(),
    "launch": {"constants"},
    "bags": set(),
    "fallback": {"bags", "reference"},
    "inductor": {"bags", "fallback"},
    "forward": {"bilinear", "launch", "tuning"},
    "backward": {"bilinear", "launch", "reference", "tuning"},
    "op": {"constants", "reference", "fallback", "inductor", "forward", "backward", "launch", "tuning"},
    "checks": {"constants"},
    "functional": {"checks", "constants", "op", "reference"},
    "module": {"checks", "functional"},
}
TRITON_ONLY = ("bilinear", "tuning", "launch", "forward", "backward")
SHIMS = sorted(path.stem for path in (ROOT / "msda_triton" / "shims").glob("*.py"))


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        top = node in tree.body
        for name in names:
            yield name, top


@pytest.mark.parametrize("name", ARROWS)
def test_arrows_of_the_house(name):
    for imported, top in imports(ROOT / "msda_triton" / f"{name}.py"):
        package, *rest = imported.split(".")
        assert package not in ("detr", "benchmarks", "tests"), imported
        if package == "msda_triton" and rest:
            assert rest[0] in ARROWS[name], imported
            assert not (name == "op" and top and rest[0] in ("forward", "backward", "launch", "tuning")), (
                f"{imported} at import"
            )
        assert not (name not in TRITON_ONLY and package == "triton"), imported


@pytest.mark.parametrize("name", SHIMS)
def test_arrows_of_the_shims(name):
    """They see the public functions and each other, and nothing of the packages that they stand in for."""
    for imported, _ in imports(ROOT / "msda_triton" / "shims" / f"{name}.py"):
        package, *rest = imported.split(".")
        if package == "msda_triton":
            assert not rest or rest[0] in ("functional", "module", "shims"), imported
        else:
            assert package == "torch" or package in sys.stdlib_module_names, imported


def test_the_detector_uses_public_names_only():
    for path in (ROOT / "detr").glob("*.py"):
        for imported, _ in imports(path):
            if imported.startswith("msda_triton"):
                assert imported.removeprefix("msda_triton").removeprefix(".") in ("", *msda_triton.__all__), (
                    f"{path}: {imported}"
                )
