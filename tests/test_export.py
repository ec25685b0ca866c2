"""ONNX and AOTInductor: what leaves PyTorch consists of plain operators and gives the same numbers."""

import pytest
import torch

from msda_triton import MSDeformAttn

SHAPES = [(5, 7), (3, 4)]


class Attention(torch.nn.Module):
    """The module with its level sizes as constants, as exported models have them."""

    def __init__(self, dim):
        super().__init__()
        self.attention = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)
        for parameter in self.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, query, points, source, mask):
        return self.attention(query, points, source, SHAPES, None, mask)


@pytest.fixture(params=[2, 4], ids=["points", "boxes"])
def model_and_inputs(request):
    inputs = (
        torch.randn(2, 9, 16),
        torch.rand(2, 9, 2, request.param) * 1.4 - 0.2,
        torch.randn(2, 47, 16),
        torch.rand(2, 47) < 0.3,
    )
    return Attention(request.param).eval(), inputs


@pytest.mark.filterwarnings("ignore")
def test_onnx(model_and_inputs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the test extra only")
    model, inputs = model_and_inputs
    path = tmp_path / "attention.onnx"
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    feed = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
    (got,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(got), model(*inputs).detach(), rtol=1e-4, atol=1e-4)


def test_exported_program_has_no_operator_of_ours(model_and_inputs):
    model, inputs = model_and_inputs
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, inputs, dynamic_shapes=[{0: batch}] * 4)
    assert not [node.target for node in program.graph.nodes if "msda" in str(node.target)]
    larger = tuple(torch.cat([x, x.flip(0)]) for x in inputs)
    torch.testing.assert_close(program.module()(*larger), model(*larger), rtol=1e-5, atol=1e-5)


def test_aotinductor(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    program = torch.export.export(model, inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    got = torch._inductor.aoti_load_package(package)(*inputs)
    torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-5)
