"""Weights from and for other code: parity with transformers, official names, class heads of other label sets."""

import argparse
import copy
import json
import os
import re

import pytest
import torch
import torchvision
import transformers
from torch import nn
from transformers.models.deformable_detr import modeling_deformable_detr
from transformers.models.detr import modeling_detr

from benchmarks.detector_step import ResNetLikeTimm
from detr.config import Config
from detr.model import PRIOR_BIAS, build_model
from detr.presets import preset
from detr.weights import convert_weights, export_weights, load_weights

SMALL = {"pretrained_backbone": False, "d_model": 64, "n_heads": 4, "ffn_dim": 96, "enc_layers": 2, "dec_layers": 3}
VARIANTS = {
    "single_scale": preset("deformable_detr_r50_single_scale", backbone="resnet18", **SMALL),
    "dc5": preset("deformable_detr_r50_single_scale_dc5", **SMALL),
    "base": preset("deformable_detr_r50", backbone="resnet18", **SMALL, n_queries=9),
    "refine": preset("deformable_detr_r50_refine", backbone="resnet18", **SMALL, n_queries=9),
    "two_stage": preset("deformable_detr_r50_two_stage", backbone="resnet18", **SMALL, n_queries=9),
    "detr": preset("detr_r50", backbone="resnet18", **SMALL, n_queries=9),
    "detr_dc5": preset("detr_r50_dc5", **SMALL, n_queries=9),
}
NAMES = ["cat", "łódź", "owl", "\ud800", "elk"]  # a name may be any text that json can hold
TINY = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "dec_layers": 2, "n_queries": 8}


@pytest.fixture
def without_timm(monkeypatch):
    """transformers wants timm for its backbone, which the project does not need."""
    for module in (modeling_deformable_detr, modeling_detr):
        monkeypatch.setattr(module, "load_backbone", ResNetLikeTimm)


def make_model(config: Config, num_classes: int = len(NAMES), seed: int = 0) -> nn.Module:
    """A model in evaluation mode with every tensor random, those of the frozen norms too."""
    torch.manual_seed(seed)
    model = build_model(config, num_classes).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.rand(tensor.shape, generator=generator) - 0.5
            tensor += 0.2 * (noise + 0.5) if "running_var" in name else 0.1 * noise
    return model


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of different size, so that both are padded."""
    generator = torch.Generator().manual_seed(3)
    images, mask = torch.zeros(2, 3, 120, 160), torch.ones(2, 120, 160, dtype=torch.bool)
    for b, (height, width) in enumerate([(120, 95), (64, 160)]):
        images[b, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[b, :height, :width] = False
    return images, mask


def hf_class(config: Config) -> type:
    deformable = config.attention == "deformable"
    return transformers.DeformableDetrForObjectDetection if deformable else transformers.DetrForObjectDetection


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("name", VARIANTS)
def test_parity_with_transformers(name, without_timm, tmp_path):
    config = VARIANTS[name]
    model = make_model(config)
    images, mask = make_batch()
    with torch.no_grad():
        expected = model(images, mask)
    export_weights(model, tmp_path / "ours", "hf", NAMES)
    hf = hf_class(config).from_pretrained(tmp_path / "ours").eval()
    assert [hf.config.id2label[row] for row in range(len(NAMES))] == NAMES
    with torch.no_grad():
        outputs = hf(pixel_values=images, pixel_mask=(~mask).long())
    errors = [(outputs[a] - expected[b]).abs().max().item() for a, b in (("logits", "logits"), ("pred_boxes", "boxes"))]
    print(f"{name}: largest difference of logits {errors[0]:.1e}, of boxes {errors[1]:.1e}")
    assert max(errors) < 1e-4
    # the result depends on the image and the query, or equality would say little
    assert expected["logits"].std(1).mean() > 1e-2 and (expected["boxes"][0] - expected["boxes"][1]).abs().mean() > 1e-3

    # and back, from each of the three layouts of the same model
    hf.save_pretrained(tmp_path / "theirs")
    torch.save(hf.state_dict(), tmp_path / "memory.bin")
    state = convert_weights(model, "hf")
    drop = (
        r"(class|bbox)_embed\.\d+\."
        if config.two_stage
        else r"bbox_embed\.\d+\."
        if config.refine
        else r"\w+_embed\.[1-9]"
    )
    torch.save({key: value for key, value in state.items() if not re.match(drop, key)}, tmp_path / "deduplicated.bin")
    for path in ("ours", "theirs", "memory.bin", "deduplicated.bin"):
        again = build_model(config, len(NAMES))
        report = load_weights(again, tmp_path / path, NAMES)
        assert (report.reshaped, report.missing, report.skipped) == ([], [], []), path
        assert_same_weights(again, model)


# tensors of the official code, aliases counted, by variant (d 256, 91 classes)
@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        (
            "deformable_detr_r50",
            561,
            {
                "backbone.0.body.layer1.0.downsample.1.running_var": (256,),
                "input_proj.2.0.weight": (256, 2048, 1, 1),
                "input_proj.3.0.weight": (256, 2048, 3, 3),
                "input_proj.3.1.bias": (256,),
                "query_embed.weight": (300, 512),
                "transformer.level_embed": (4, 256),
                "transformer.reference_points.weight": (2, 256),
                "transformer.encoder.layers.5.self_attn.sampling_offsets.weight": (256, 256),
                "transformer.encoder.layers.0.self_attn.attention_weights.weight": (128, 256),
                "transformer.encoder.layers.0.norm2.weight": (256,),
                "transformer.encoder.layers.0.linear1.weight": (1024, 256),
                "transformer.decoder.layers.5.cross_attn.output_proj.weight": (256, 256),
                "transformer.decoder.layers.0.self_attn.in_proj_weight": (768, 256),
                "transformer.decoder.layers.0.self_attn.out_proj.bias": (256,),
                "transformer.decoder.layers.0.norm3.weight": (256,),
                "class_embed.5.weight": (91, 256),
                "bbox_embed.5.layers.2.weight": (4, 256),
            },
        ),
        (
            "deformable_detr_r50_single_scale",
            549,
            {
                "transformer.encoder.layers.5.self_attn.sampling_offsets.weight": (64, 256),
                "input_proj.0.0.weight": (256, 2048, 1, 1),
            },
        ),
        ("deformable_detr_r50_refine", 597, {"transformer.decoder.bbox_embed.5.layers.0.weight": (256, 256)}),
        (
            "deformable_detr_r50_two_stage",
            630,
            {
                "transformer.decoder.class_embed.6.weight": (91, 256),
                "transformer.decoder.bbox_embed.6.layers.2.bias": (4,),
                "transformer.enc_output_norm.weight": (256,),
                "transformer.pos_trans.weight": (512, 512),
            },
        ),
        (
            "detr_r50",
            458,
            {
                "class_embed.weight": (92, 256),
                "bbox_embed.layers.1.weight": (256, 256),
                "query_embed.weight": (100, 256),
                "input_proj.weight": (256, 2048, 1, 1),
                "transformer.decoder.layers.0.multihead_attn.in_proj_weight": (768, 256),
                "transformer.decoder.norm.weight": (256,),
            },
        ),
    ],
)
def test_official_names_and_shapes(name, count, some):
    with torch.device("meta"):
        weights = convert_weights(build_model(preset(name, pretrained_backbone=False), 91), "official")
    assert len(weights) == count
    assert {key: tuple(weights[key].shape) for key in some} == some


def test_norms_of_a_plain_decoder_layer_follow_their_use():
    model = make_model(VARIANTS["detr"])
    weights = convert_weights(model, "official")
    layer = model.transformer.decoder.layers[1]
    for number, norm in ((1, layer.norm2), (2, layer.norm1), (3, layer.norm3)):  # self-attention, cross-attention, ffn
        assert torch.equal(weights[f"transformer.decoder.layers.1.norm{number}.weight"], norm.weight)


@pytest.mark.parametrize("name", ["base", "two_stage", "detr"])
def test_official_file_with_the_command_line_of_its_training(name, tmp_path):
    config = VARIANTS[name]
    model = make_model(config)
    path = export_weights(model, tmp_path / "exported.pth", "official", NAMES)
    weights = torch.load(path, weights_only=True)["model"]
    weights |= {"transformer.total_ops": torch.zeros(1), "backbone.0.body.total_params": torch.zeros(1)}
    args = argparse.Namespace(lr=2e-4, masks=False)
    torch.save({"model": weights, "args": args, "epoch": 49}, tmp_path / "official.pth")
    again = build_model(config, len(NAMES))
    report = load_weights(again, tmp_path / "official.pth")
    assert (report.reshaped, report.missing, report.skipped) == ([], [], [])
    assert len(report.loaded) == len(model.state_dict())
    assert_same_weights(again, model)


def test_own_checkpoint_with_other_classes(tmp_path):
    config = preset("tiny", **TINY)
    model = make_model(config)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "class_names": NAMES, "config": config.to_dict()}, path)
    wanted = ["Owl", "ant", "cat"]
    again = build_model(config, 3)
    before = copy.deepcopy(again.state_dict())
    report = load_weights(again, path, wanted)
    heads = [f"class_embed.{l}.{kind}" for l in range(3) for kind in ("weight", "bias")]
    assert report.reshaped == heads and not report.missing and not report.skipped
    assert len(report.loaded) == len(before) - len(heads)
    state, source = again.state_dict(), model.state_dict()
    for key in heads[:4]:
        assert torch.equal(state[key][[0, 2]], source[key][[2, 0]])  # owl and cat
        assert torch.equal(state[key][1], before[key][1])  # ant
    assert state["class_embed.0.bias"][1].item() == pytest.approx(PRIOR_BIAS)
    for key in heads[4:]:
        # the head of the first stage says "object" in row 0, not "cat"
        assert torch.equal(state[key][0], source[key][0]) and torch.equal(state[key][1:], before[key][1:])
    text = str(report)
    assert f"{path}: {len(report.loaded)} tensors loaded" in text and "reshaped 6: class_embed.0.weight" in text


def test_coco_heads_are_matched_by_coco_names(tmp_path):
    config = preset("tiny", two_stage=False, **TINY, class_loss="softmax")
    model = make_model(config, 91)
    torch.save(model.state_dict(), tmp_path / "coco.pth")
    again = build_model(config, 3)
    load_weights(again, tmp_path / "coco.pth", ["zebra", "person", "platelet"])
    state, source = again.state_dict(), model.state_dict()
    # raw ids of COCO: person 1, zebra 24; the last row is "no object"
    assert torch.equal(state["class_embed.1.weight"][[0, 1, 3]], source["class_embed.1.weight"][[24, 1, 91]])


def test_same_classes_in_another_order(tmp_path):
    config = preset("tiny", two_stage=False, **TINY)
    model = make_model(config)
    torch.save({"model": model.state_dict(), "class_names": NAMES}, tmp_path / "checkpoint.pt")
    again = build_model(config, 5)
    load_weights(again, tmp_path / "checkpoint.pt", NAMES[::-1])
    assert torch.equal(again.class_embed[0].weight, model.class_embed[0].weight.flip(0))


@pytest.mark.parametrize("num_classes", [5, 4])
def test_unknown_classes_are_taken_if_as_many(num_classes, tmp_path):
    config = preset("tiny", two_stage=False, **TINY)
    model = make_model(config)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = build_model(config, num_classes)
    report = load_weights(again, tmp_path / "weights.pth", [f"class {i}" for i in range(num_classes)])
    if num_classes == 5:
        assert_same_weights(again, model)
    else:
        heads = [f"class_embed.{l}.{kind}" for l in range(2) for kind in ("weight", "bias")]
        assert report.missing == heads and report.skipped == [f"{key} (other classes)" for key in heads]
        assert (again.class_embed[1].bias == PRIOR_BIAS).all()


def test_other_numbers_of_queries_and_levels(tmp_path):
    config = preset("tiny", two_stage=False, **TINY)
    model = make_model(config)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = build_model(preset("tiny", two_stage=False, **TINY | {"n_queries": 12}, n_levels=4), 5)
    before = again.query_embed.weight.clone()
    report = load_weights(again, tmp_path / "weights.pth")
    assert report.reshaped == ["query_embed.weight"]
    assert torch.equal(again.query_embed.weight[:8], model.query_embed.weight)
    assert torch.equal(again.query_embed.weight[8:], before[8:])
    assert "transformer.level_embed ([3, 32], expected [4, 32])" in report.skipped
    assert "input_proj.3.0.weight" in report.missing


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_where_the_weights_of_a_file_are(key, tmp_path):
    source, target = (build_model(preset("tiny", two_stage=False, **TINY), 2) for _ in range(2))
    torch.save({key: source.state_dict(), "epoch": 3} if key else source.state_dict(), tmp_path / "file.pth")
    assert not load_weights(target, tmp_path / "file.pth").missing
    assert_same_weights(target, source)


def test_torchvision_backbone(tmp_path):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    model = build_model(VARIANTS["base"], 5)
    heads = copy.deepcopy(model.class_embed[0].state_dict())
    report = load_weights(model, tmp_path / "resnet18.pth", NAMES)
    assert len(report.loaded) == 100 and report.skipped == ["fc.weight", "fc.bias"]
    assert all(key.startswith("backbone.body.") for key in report.loaded)
    for key, tensor in model.backbone.body.state_dict().items():
        assert torch.equal(tensor, resnet.state_dict()[key]), key
    assert torch.equal(model.class_embed[0].weight, heads["weight"])


def test_names_of_a_hugging_face_folder(tmp_path):
    config = VARIANTS["base"]
    model = make_model(config)
    export_weights(model, tmp_path / "folder", "hf", NAMES)
    saved = json.loads((tmp_path / "folder/config.json").read_text())
    assert saved["id2label"] == {str(row): name for row, name in enumerate(NAMES)}
    again = build_model(config, 2)
    load_weights(again, tmp_path / "folder", ["elk", "newt"])
    assert torch.equal(again.class_embed[2].weight[0], model.class_embed[2].weight[4])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-done",)


def write_nothing(path):
    pass


def write_text(path):
    path.write_text("no weights")


def write_code(path):
    torch.save({"model": Harmful()}, path)


def write_truncated(path):
    torch.save({"model": {"backbone.body.conv1.weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_other_model(path):
    torch.save({"encoder.weight": torch.zeros(3)}, path)


def write_nested(path):
    torch.save({"ema": {"module": {"encoder.weight": torch.zeros(3)}}, "epoch": 3}, path)


def write_foreign_head(path):
    torch.save({"backbone.stem.9.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.pth", write_nothing, "absent.pth: the file is missing"),
        ("text.pth", write_text, "text.pth: refused: damaged, or of another program"),
        ("text.safetensors", write_text, "text.safetensors: not readable: "),
        ("code.pth", write_code, "code.pth: refused: holds more than tensors and plain values"),
        ("cut.pth", write_truncated, "cut.pth: not readable: "),
        (
            "other.pth",
            write_other_model,
            "other.pth: expected weights of DETR, Deformable DETR or a ResNet, got ['encoder",
        ),
        (
            "nested.pth",
            write_nested,
            "nested.pth: expected tensors by name, or below model or state_dict, got ema, epoch",
        ),
        ("foreign.pth", write_foreign_head, "foreign.pth: nothing in it is for this model: expected "),
        ("", write_nothing, ": expected model.safetensors or pytorch_model.bin in this folder, got neither"),
    ],
)
def test_bad_files(name, write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    model = build_model(preset("tiny", two_stage=False, **TINY), 2)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError) as error:
        load_weights(model, tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{message.removeprefix(name)}")
    assert not (tmp_path / "harm-done").exists()
    assert_same_weights(model, before)


def test_bad_arguments(tmp_path):
    model = build_model(preset("tiny", two_stage=False, **TINY), 2)
    with pytest.raises(ValueError, match="class_names: expected 2 of them, got 1"):
        load_weights(model, tmp_path, ["cat"])
    with pytest.raises(ValueError, match="to: expected official or hf, got 'mmdet'"):
        convert_weights(model, "mmdet")
    # what other code would run in another way
    resnet = {"backbone": "resnet18", "pretrained_backbone": False, "query_selection": "pure", "proposal_nms": 1.0}
    for changes, what in (
        ({"backbone": "tiny"}, "backbone tiny"),
        ({"backbone": "small"}, "backbone small"),
        ({"own_level_only": True}, "own_level_only"),
        ({"query_selection": "mixed"}, "query_selection mixed"),
        ({"proposal_nms": 0.7}, "proposal_nms 0.7"),
    ):
        model = build_model(preset("tiny", **TINY | resnet | changes), 2)
        with pytest.raises(ValueError, match=f"to: hf has no model with {what}; onnx"):
            convert_weights(model, "hf")
    for changes in ({}, {"two_stage": False, "query_selection": "mixed", "proposal_nms": 0.7}):
        assert convert_weights(build_model(preset("tiny", **TINY | resnet | changes), 2), "hf")
