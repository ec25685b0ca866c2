"""Config and presets: json round trip, the figures of the paper, and one clear error for each bad field."""

import dataclasses
import json

import pytest

from detr.config import Config
from detr.presets import PRESETS, departures, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    assert config.name == name
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_override_replaces_only_the_named_fields():
    changed = preset("tiny", two_stage=False, n_queries=7, lr=1)
    assert dataclasses.asdict(changed) == dataclasses.asdict(preset("tiny", two_stage=False)) | {
        "n_queries": 7,
        "lr": 1,
    }


def test_presets_hold_the_published_recipes():
    base = preset("deformable_detr_r50")
    assert (base.d_model, base.n_heads, base.ffn_dim, base.enc_layers, base.dec_layers) == (256, 8, 1024, 6, 6)
    assert (base.n_levels, base.enc_points, base.n_queries, base.dropout) == (4, 4, 300, 0.1)
    assert (base.lr, base.lr_backbone, base.weight_decay, base.clip_norm) == (2e-4, 2e-5, 1e-4, 0.1)
    assert (base.loss_ce, base.loss_bbox, base.loss_giou, base.focal_alpha) == (2, 5, 2, 0.25)
    assert (base.cost_class, base.cost_bbox, base.cost_giou, base.batch_size, base.epochs) == (2, 5, 2, 32, 50)
    plain = preset("detr_r50")
    assert (plain.ffn_dim, plain.n_queries, plain.class_loss, plain.eos_weight) == (2048, 100, "softmax", 0.1)
    assert (plain.lr, plain.lr_backbone, plain.cost_class, plain.loss_ce) == (1e-4, 1e-5, 1, 1)
    plus = preset("detr_r50_dc5_plus")
    assert (plus.dilation, plus.n_queries, plus.class_loss, plus.loss_ce, plus.epochs) == (True, 300, "focal", 2, 50)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_quries": 5}, "config: unknown field 'n_quries'"),
        ({"lr": "fast"}, "config: lr: expected a number from 0 to 1, got 'fast'"),
        ({"lr": float("nan")}, "config: lr: expected a number from 0 to 1, got nan"),
        ({"refine": 1}, "config: refine: expected true or false, got 1"),
        ({"n_levels": True}, "config: n_levels: expected an integer from 1 to 10, got True"),
        (
            {"backbone": "vgg"},
            "config: backbone: expected one of tiny, small, resnet18, resnet34, resnet50, resnet101, got 'vgg'",
        ),
        ({"n_levels": 0}, "config: n_levels: expected an integer from 1 to 10, got 0"),
        ({"steps": 0}, "config: steps: expected an integer from 1 to 1000000000, or null, got 0"),
        ({"ema": 1.0}, "config: ema: expected a number from 0 to below 1, got 1.0"),
        ({"amp": "fp8"}, "config: amp: expected one of none, bf16, fp16, got 'fp8'"),
        ({"patience": -1}, "config: patience: expected an integer from 0 to 1000000000, got -1"),
        ({"name": "a\nb"}, "config: name: expected a text of 1 to 100 printable characters, got 'a\\nb'"),
        ({"recipe": "fast"}, "recipe: expected one of official, finetune, tiny, got 'fast'"),
        ({"accumulate": 3}, "config: accumulate: expected a divisor of batch_size = 8, got 3"),
        ({"dropout": 1.0}, "config: dropout: expected a number from 0 to below 1, got 1.0"),
        ({"d_model": 48}, "config: d_model: expected a multiple of 32 and of n_heads = 4, got 48"),
        ({"refine": False, "two_stage": True}, "config: two_stage: needs refine = True"),
        ({"dilation": True}, "config: dilation: needs backbone resnet50 or resnet101, got small"),
        ({"attention": "global"}, 'config: attention: "global" needs n_levels = 1'),
        (
            {"class_loss": "softmax", "two_stage": True},
            'config: class_loss: two_stage needs "focal" or "varifocal", got "softmax"',
        ),
    ],
)
def test_bad_fields(overrides, message):
    with pytest.raises(ValueError) as error:
        preset("tiny", **{"two_stage": False} | overrides)
    assert str(error.value).startswith(message)


def test_recipes():
    fields = ("lr", "lr_backbone", "batch_size", "epochs", "steps", "schedule", "augment", "ema")

    def of(*arguments, **overrides):
        config = preset(*arguments, **overrides)
        return tuple(getattr(config, name) for name in fields)

    paper = (2e-4, 2e-5, 32, 50, None, "step", "official", 0.0)
    tuned = (1e-4, 1e-5, 16, 24, None, "step", "official", 0.999)
    assert of("deformable_detr_r50") == of("deformable_detr_r50", "official") == of("tiny", "official") == paper
    assert of("deformable_detr_r50", "finetune") == of("detr_r50_dc5", "finetune") == of("tiny", "finetune") == tuned
    assert of("detr_r50") == of("detr_r50", "official") == (1e-4, 1e-5, 16, 500, None, "step", "official", 0.0)
    assert of("deformable_detr_r50_refine", "tiny") == of("tiny")
    assert preset("deformable_detr_r50", "finetune").recipe == "finetune"
    # the model is not the recipe's, and overrides win
    assert preset("tiny", "official").d_model == 64 and preset("tiny", "finetune", ema=0.0).ema == 0
    with pytest.raises(ValueError, match="recipe: expected one of official, finetune, tiny, got 'fast'"):
        preset("tiny", "fast")


@pytest.mark.parametrize("name", PRESETS)
def test_departures_from_the_recipe(name):
    assert departures(preset(name)) == {}
    changed = preset(name, batch_size=2, lr=1e-5, epochs=3, image_size=64)
    assert departures(changed) == {
        "lr": (PRESETS[name].lr, 1e-5),
        "batch_size": (PRESETS[name].batch_size, 2),
    }


def test_a_run_of_a_preset_that_is_gone():
    config = Config.from_dict(preset("tiny").to_dict() | {"name": "tiny_refine", "two_stage": False, "lr": 0.5})
    assert departures(config) == {}


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"preset: expected one of tiny, .*detr_r50_dc5_plus, got 'huge'"):
        preset("huge")


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "expected"),
    [
        (32, 0, 1, 16),
        (32, 0, 8, 2),
        (32, 0, 16, 1),
        (32, 0, 32, 1),
        (9, 0, 1, 9),
        (1, 0, 1, 1),
        (2, 0, 4, 1),
        (32, 4, 2, 4),
    ],
)
def test_batches_are_accumulated_where_a_process_would_have_many_images(batch_size, accumulate, processes, expected):
    config = preset("deformable_detr_r50", batch_size=batch_size, accumulate=accumulate)
    assert config.accumulated_batches(processes) == expected
    assert preset("tiny").accumulated_batches(1) == 1
