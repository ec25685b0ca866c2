"""ONNX and AOTInductor: what leaves PyTorch consists of plain operators and gives the same numbers."""

import json
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from attention import oracle

from detr import checkpoint
from detr.cli import main
from detr.model import build_model
from detr.presets import preset
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


SMALL = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 6, "enc_layers": 1, "dec_layers": 1}
CONFIGS = {
    # encoder and decoder attend around points
    "one_stage": preset("tiny", **SMALL, two_stage=False, refine=False, n_levels=2),
    # the decoder attends in boxes, queries have a content of their own, proposals are thinned
    "two_stage": preset("tiny", **SMALL, backbone="small", query_selection="mixed", proposal_nms=0.3),
    # for a C++ compiler, which takes its time
    "smallest": preset("tiny", **SMALL | {"enc_layers": 0}, two_stage=False, refine=False, n_levels=1, dec_points=1),
    "decoder": preset("tiny", **SMALL | {"enc_layers": 0}, query_selection="pure", proposal_nms=1.0, n_levels=2),
}
SIZE = (32, 48)
NAMES = ["cat", "猫", "\ud800"]  # a name may be any text that json can hold


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """By name of the config: a checkpoint with random weights, three images of different padding, and the outputs."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = build_model(config, len(NAMES)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        path = tmp_path_factory.mktemp("export") / "best.pt"
        content = {"config": config.to_dict(), "class_names": NAMES, "category_ids": [3, 5, 9]}
        checkpoint.save(path, content | {"model": model.state_dict()})
        images, mask = torch.randn(3, 3, *SIZE), torch.zeros(3, *SIZE, dtype=torch.bool)
        mask[0, 20:], mask[1, :, 30:] = True, True
        with torch.no_grad():
            outputs = model(images, mask)
        assert outputs["logits"].std() > 0.1 and outputs["boxes"].std() > 0.05
        made[name] = path, (images, mask), (outputs["logits"], outputs["boxes"])
    return made


def export(checkpoint_path, out, to, *more):
    size = [str(n) for n in SIZE]
    assert (
        main(["export", "--checkpoint", str(checkpoint_path), "--to", to, "--out", str(out), "--size", *size, *more])
        == 0
    )
    return out


def assert_outputs(run, inputs, expected):
    """`run` gives the model's outputs for every number of images."""
    for count in (1, 2, 3):
        for got, want in zip(run(*(x[:count] for x in inputs)), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(got), want[:count], rtol=1e-4, atol=1e-4)


# what two stages add is traced in the quick tests for onnxruntime
@pytest.mark.parametrize("name", ["one_stage", pytest.param("two_stage", marks=pytest.mark.long)])
def test_a_detector_as_an_exported_program(name, detectors, tmp_path):
    path, inputs, expected = detectors[name]
    extra = {"detector.json": ""}
    program = torch.export.load(export(path, tmp_path / "model.pt2", "torch-export"), extra_files=extra)
    assert json.loads(extra["detector.json"]) == {"classes": NAMES, "height": 32, "width": 48}
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("msda" in name or "detr" in name for name in operators)
    assert_outputs(program.module(), inputs, expected)


def test_a_detector_in_onnxruntime(detectors, tmp_path, monkeypatch, capfd):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the test extra only")
    path, inputs, expected = detectors["two_stage"]
    said = []
    # where Python shows what is logged and nobody asked for
    monkeypatch.setattr("logging.lastResort", type("Handler", (), {"level": 30, "handle": said.append}))
    session = onnxruntime.InferenceSession(export(path, tmp_path / "model.onnx", "onnx"))
    assert said == [] and capfd.readouterr() == (f"{tmp_path / 'model.onnx'}: written\n", "")
    assert json.loads(session.get_modelmeta().custom_metadata_map["detector"])["classes"] == NAMES
    assert [x.name for x in session.get_outputs()] == ["logits", "boxes"]

    def run(images, mask):
        return session.run(None, {"images": images.numpy(), "mask": mask.numpy()})

    assert_outputs(run, inputs, expected)


@pytest.mark.parametrize(
    ("plugin", "domain", "name", "config", "count"),
    [
        ("tensorrt", "trt.plugins", "MultiscaleDeformableAttnPlugin_TRT", "decoder", 1),
        ("mmdeploy", "mmdeploy", "MMCVMultiScaleDeformableAttention", "smallest", 1),
        pytest.param(
            *("mmdeploy", "mmdeploy", "MMCVMultiScaleDeformableAttention", "one_stage", 2), marks=pytest.mark.long
        ),
    ],
    ids=["tensorrt", "mmdeploy", "mmdeploy in the encoder too"],
)
def test_a_detector_with_the_nodes_of_an_inference_engine(detectors, tmp_path, plugin, domain, name, config, count):
    """The engine is not here: the reference evaluator runs the graph, with the oracle in the plugin's place."""
    onnx = pytest.importorskip("onnx", reason="onnx is in the test extra only")
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    seen = []

    def run_node(self, value, shapes, starts, locations, weights, **attributes):
        seen.append(attributes)
        assert (shapes.dtype, starts.dtype) == ("int32", "int32")
        tensors = [torch.from_numpy(x.copy()) for x in (value, locations, weights)]
        assert starts.tolist() == [sum(H * W for H, W in shapes[:l].tolist()) for l in range(len(shapes))]
        out = oracle(tensors[0], shapes.tolist(), *tensors[1:]).float()
        return ((out.unflatten(-1, tensors[0].shape[2:]) if plugin == "tensorrt" else out).numpy().copy(),)

    path, inputs, expected = detectors[config]
    file = export(path, tmp_path / "model.onnx", "onnx", "--attention", plugin)
    model = onnx.load(file)
    assert [n.op_type for n in model.graph.node if n.domain == domain] == [name] * count
    assert b"/work" not in file.read_bytes() and b"python" not in file.read_bytes()
    node = type(name, (OpRun,), {"op_domain": domain, "_run": run_node})
    session = ReferenceEvaluator(model, new_ops=[node])
    got = session.run(None, {"images": inputs[0][:2].numpy(), "mask": inputs[1][:2].numpy()})
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(x), y[:2], rtol=1e-4, atol=1e-4)
    assert len(seen) == count and set(seen[0]) == {"plugin_version" if plugin == "tensorrt" else "im2col_step"}


@pytest.mark.long
@pytest.mark.parametrize("name", ["smallest", "two_stage"])
def test_a_detector_compiled_by_aotinductor_runs_without_this_package(name, detectors, tmp_path):
    path, inputs, expected = detectors[name]
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # unoptimised
        package = export(path, tmp_path / "model.pt2", "aoti")
    torch.save((inputs, expected), tmp_path / "data.pt")
    code = """
import json, sys
sys.modules["msda_triton"] = sys.modules["detr"] = None  # an import of them would raise
import torch
import torch._inductor.config
model = torch._inductor.aoti_load_package(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
for count in (1, 2, 3):
    got = model(*(x[:count].contiguous() for x in inputs))
    print(max((x - y[:count]).abs().max().item() for x, y in zip(got, expected, strict=True)))
print(model.get_metadata()["detector.json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, package, tmp_path / "data.pt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *errors, about = done.stdout.strip().splitlines()
    assert len(errors) == 3 and all(float(error) < 1e-4 for error in errors), errors
    assert json.loads(about)["classes"] == NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "aoti", "--attention", "tensorrt", "--out", "x.pt2"], "attention: 'tensorrt' is for ONNX only"),
        (["--to", "onnx", "--out", "x.pt"], "path: expected a name that ends in .onnx for to='onnx', got x.pt"),
    ],
)
def test_what_cannot_be_exported(detectors, arguments, message, capsys):
    assert main(["export", "--checkpoint", str(detectors["decoder"][0]), *arguments]) == 1
    assert message in capsys.readouterr().err
