"""Hugging Face models before and after `patch("transformers")`: outputs, gradients, graphs."""

import functools
import re
from pathlib import Path

import hf_models
import pytest
import torch
from transformers import PreTrainedModel

import msda_triton
from msda_triton.shims import transformers as shim

ATTENTIONS = {  # the module around the attention in each model, by the name of its class
    "rt_detr": "RTDetrMultiscaleDeformableAttention",
    "rt_detr_v2": "RTDetrV2MultiscaleDeformableAttention",
    "d_fine": "DFineMultiscaleDeformableAttention",
    "deformable_detr": "DeformableDetrMultiscaleDeformableAttention",
    "mask2former": "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention",
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The shapes of value in every call that reaches our operator."""
    seen = []

    def counted(value, *args, **kwargs):
        seen.append(tuple(value.shape))
        return msda_triton.ms_deform_attn(value, *args, **kwargs)

    monkeypatch.setattr(shim, "ms_deform_attn", counted)
    return seen


def results(model: PreTrainedModel, name: str, images: int = 2) -> tuple[dict, dict]:
    """Every tensor that the model returns, and the gradient of every parameter for a weighted sum of them."""
    arguments = hf_models.inputs(name)
    out = model(**(arguments if images == 2 else {key: x[:images] for key, x in arguments.items()}))
    tensors = {key: x for key, x in out.items() if torch.is_tensor(x) and x.is_floating_point()}
    loss, finite = 0, torch.finfo(torch.float32).max / 2
    for x in tensors.values():
        if x.requires_grad:
            weights = torch.linspace(-1, 2, x.numel()).sin().view(x.shape)
            loss = loss + (torch.where(x.abs() < finite, x, 0) * weights).mean()
    model.zero_grad()
    loss.backward()
    for cache in (
        "language_cache_class",
        "language_cache_prompt",
    ):  # omdet_turbo's texts, with a graph that is gone now
        if hasattr(model, cache):
            getattr(model, cache).cache.clear()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {key: x.detach() for key, x in tensors.items()}, gradients


def assert_same(before: tuple[dict, dict], after: tuple[dict, dict]) -> None:
    for key, x in before[0].items():
        torch.testing.assert_close(after[0][key], x, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert before[1].keys() == after[1].keys() and len(before[1]) > 50
    largest = max(g.abs().max() for g in before[1].values())
    for key, g in before[1].items():
        error = (after[1][key] - g).abs().max()
        assert error <= 1e-4 * g.abs().max() + 1e-6 * largest, f"gradient of {key}: error {error:.1e}"


@pytest.mark.parametrize(
    "builder",
    [pytest.param(b, marks=pytest.mark.entry_point(f"transformers {b.__name__}")) for b in hf_models.BUILDERS],
    ids=lambda b: b.__name__,
)
def test_a_patched_model_computes_the_same(builder, calls):
    name = builder.__name__
    model = hf_models.build(builder)
    before = results(model, name)
    assert not calls
    with msda_triton.patch("transformers"):
        calls.clear()  # those by which patch() compared
        after = results(model, name)
        assert len(calls) in (1, 2, 3)  # a call for each layer
        built_later = results(hf_models.build(builder), name)
    assert_same(before, after)
    assert_same(before, built_later)
    # the attention matters to the result, or equality would say little
    assert any("sampling_offsets" in key and g.abs().max() > 0 for key, g in before[1].items()) or "discrete" in name
    count = len(calls)
    again = results(model, name)
    assert len(calls) == count
    for x, y in zip(before[0].values(), again[0].values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("rt_detr", {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_n_points": 2}),
        ("mask2former", {"encoder_layers": 1, "num_attention_heads": 1}),
    ],
    ids=["rt_detr", "mask2former"],
)
def test_a_patched_model_on_the_kernels(name, small, monkeypatch):
    model = hf_models.build(functools.partial(getattr(hf_models, name), **small))
    before = results(model, name, images=1)
    with msda_triton.patch("transformers"):
        kernels = functools.partial(msda_triton.ms_deform_attn, backend="triton")
        monkeypatch.setattr(shim, "ms_deform_attn", kernels)
        assert_same(before, results(model, name, images=1))


@pytest.fixture(scope="module")
def attention_calls() -> dict:
    """The module around the attention of some models, and the arguments of its first call, before any patch."""
    captured = {}

    def keep(name, module, args, kwargs):
        captured.setdefault(name, (module, args, kwargs))

    for name, class_name in ATTENTIONS.items():
        model = hf_models.build(getattr(hf_models, name))
        layers = [m for m in model.modules() if type(m).__name__ == class_name]
        layers[0].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: keep(name, module, args, kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(**hf_models.inputs(name))
        layers[0]._forward_pre_hooks.clear()
        layers[0]._forward_pre_hooks_with_kwargs.clear()
    return captured


@pytest.mark.parametrize("name", ATTENTIONS)
def test_compile_fullgraph_of_the_patched_attention(name, attention_calls):
    module, args, kwargs = attention_calls[name]
    before = module(*args, **kwargs)[0]
    wanted = torch.autograd.grad(before.square().sum(), module.parameters())
    with msda_triton.patch("transformers"):
        graphs = []

        def keep(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend=keep)
        after = compiled(*args, **kwargs)[0]
        gradients = torch.autograd.grad(after.square().sum(), module.parameters())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item() + 1e-6)
    [graph] = graphs
    assert "grid_sampler" not in graph.print_readable(print_output=False)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_export_of_the_patched_attention(name, attention_calls):
    module, args, kwargs = attention_calls[name]
    with torch.no_grad():
        before = module(*args, **kwargs)[0]
        with msda_triton.patch("transformers"):
            program = torch.export.export(module, args, kwargs)
    after = program.module()(*args, **kwargs)[0]  # without the patch
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not any("grid_sampler" in str(node.target) for node in program.graph.nodes)


@pytest.mark.entry_point("kernels: local layer repository of MultiScaleDeformableAttention")
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "TRAINING_AND_COMPILE"])
def test_the_layer_repository_of_package_kernels(mode, monkeypatch, calls):
    kernels = pytest.importorskip("kernels", reason="kernels is in the test extra, from Python 3.11 on")
    mode = {
        "INFERENCE": kernels.Mode.INFERENCE,
        "TRAINING": kernels.Mode.TRAINING,
        "TRAINING_AND_COMPILE": kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
    }[mode]
    model = hf_models.build(hf_models.rt_detr)
    before = results(model, "rt_detr")
    layer = type(model.model.decoder.layers[0].encoder_attn.attn)
    # what the decorator of transformers does, which is idle where it wants another version of kernels
    for name, value in vars(kernels.use_kernel_forward_from_hub("MultiScaleDeformableAttention")(
        type("MultiScaleDeformableAttention", (torch.nn.Module,), {"forward": layer.forward})
    )).items():  # fmt: skip
        if name.startswith("kernel_"):
            monkeypatch.setattr(layer, name, value, raising=False)
    repository = kernels.LocalLayerRepository(shim.KERNEL_REPOSITORY, layer_name="MultiScaleDeformableAttention")
    mapping = {"MultiScaleDeformableAttention": {"cpu": {mode: repository}}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE)
    assert_same(before, results(model, "rt_detr"))
    assert len(calls) == 2

    with msda_triton.patch("transformers") as patch:
        own = [row.why for row in patch.rows if not row.replaced and "rt_detr.modeling_rt_detr" in row.entry_point]
    assert len(own) == 1 and "has a forward of its own" in own[0]


def test_the_code_of_the_docs_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "drop-in.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and capsys.readouterr().out.count(" replaced: ") == 15
    path, layer = names["kernel_mapping"]["MultiScaleDeformableAttention"]["cuda"].split(":")
    assert (Path(path) / "build" / "torch-universal" / "metadata.json").is_file() and hasattr(shim, layer)


@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "mask2former"])
def test_a_patched_model_in_half_precision(name, calls):
    """Under autocast, and with its weights in bfloat16: as close to float32 as the unpatched model is, or closer."""
    model = hf_models.build(getattr(hf_models, name))
    arguments = hf_models.inputs(name)
    first = "logits" if "detr" in name or name == "d_fine" else "class_queries_logits"

    def error(convert, **inputs):
        with torch.no_grad(), convert:
            return (model(**inputs)[first].float() - exact).abs().max().item()

    with torch.no_grad():
        exact = model(**arguments)[first]
    autocast = torch.autocast("cpu", torch.bfloat16)
    unpatched = error(autocast, **arguments)
    with msda_triton.patch("transformers"):
        calls.clear()
        patched = error(autocast, **arguments)
        assert calls
        model.bfloat16()
        halved = {key: x.bfloat16() if x.is_floating_point() else x for key, x in arguments.items()}
        lowest = error(torch.autocast("cpu", enabled=False), **halved)
    print(f"{name}: autocast {unpatched:.1e} unpatched, {patched:.1e} patched; bfloat16 weights {lowest:.1e}")
    assert 0 < patched <= 2 * unpatched and lowest < 0.3 * exact.abs().max()
