"""The models of the paper's tables, a small one, and how each is trained: presets and recipes."""

from dataclasses import replace
from typing import Any

from detr.config import RECIPES, Config, short
from detr.errors import ArgumentError

# For few photographs and some minutes on a CPU, from nothing; docs/learning.md and benchmarks/NOTES.md have what was
# measured.
_TINY = Config(
    name="tiny",
    backbone="small",
    pretrained_backbone=False,
    d_model=64,
    n_heads=4,
    ffn_dim=128,
    enc_layers=1,
    dec_layers=3,
    n_levels=3,
    enc_points=2,
    dec_points=2,
    n_queries=50,
    dropout=0.0,
    refine=True,
    two_stage=True,
    proposal_nms=0.4,
    denoising=24,
    class_loss="varifocal",
    loss_ce=3.0,
    image_size=160,
    max_size=320,
    recipe="tiny",
    augment="window",
    shape_groups=True,
    lr=1e-3,
    lr_backbone=2e-3,
    beta2=0.98,
    batch_size=8,
    accumulate=1,
    steps=2000,
    eval_steps=500,
    warmup_steps=100,
    schedule="cosine",
)
_DEFORMABLE = Config(name="deformable_detr_r50")
_PLAIN = Config(
    name="detr_r50",
    attention="global",
    n_levels=1,
    ffn_dim=2048,
    n_queries=100,
    class_loss="softmax",
    cost_class=1.0,
    loss_ce=1.0,
    lr=1e-4,
    lr_backbone=1e-5,
    batch_size=16,
    epochs=500,
)
# "DETR-DC5+" of Table 1: focal loss, its weights and 300 queries
_PLUS = {"n_queries": 300, "class_loss": "focal", "cost_class": 2.0, "loss_ce": 2.0, "epochs": 50}

PRESETS: dict[str, Config] = {
    config.name: config
    for config in (
        _TINY,
        _DEFORMABLE,
        replace(_DEFORMABLE, name="deformable_detr_r50_refine", refine=True),
        replace(_DEFORMABLE, name="deformable_detr_r50_two_stage", refine=True, two_stage=True),
        replace(_DEFORMABLE, name="deformable_detr_r50_single_scale", n_levels=1),
        replace(_DEFORMABLE, name="deformable_detr_r50_single_scale_dc5", n_levels=1, dilation=True),
        _PLAIN,
        replace(_PLAIN, name="detr_r50_dc5", dilation=True),
        replace(_PLAIN, name="detr_r50_dc5_plus", dilation=True, **_PLUS),
    )
}


# what a recipe decides
RECIPE_FIELDS = (
    *("augment", "shape_groups", "lr", "lr_backbone", "lr_offsets_mult", "beta2", "weight_decay", "clip_norm"),
    *("batch_size", "epochs", "steps", "warmup_steps", "schedule", "eval_every", "eval_steps", "ema"),
)


def recipe_fields(recipe: str, preset_name: str) -> dict[str, Any]:
    """The fields that a recipe sets for a preset.

    "official" is what the preset's row of the paper was trained with (for `tiny`, what Deformable DETR was),
    from an ImageNet backbone; "finetune" is for weights that were trained on other boxes before; "tiny" is for small
    models and images, from random weights.

    Raises:
        ArgumentError: unknown recipe.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ArgumentError(f"recipe: expected one of {', '.join(RECIPES)}, got {short(recipe)}")
    source = PRESETS[preset_name]
    if (source.recipe == "tiny") != (recipe == "tiny"):
        source = _TINY if recipe == "tiny" else _DEFORMABLE
    fields = {name: getattr(source, name) for name in RECIPE_FIELDS}
    if recipe == "finetune":
        fields |= {"lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 16, "epochs": 24, "steps": None, "ema": 0.999}
    return fields | {"recipe": recipe}


def departures(config: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which a config is not as its recipe says, the length of the run apart: name -> (recipe's, config's)."""
    fields = recipe_fields(config.recipe, config.name) if config.name in PRESETS else {}
    of_length = ("epochs", "steps", "eval_every", "eval_steps")
    pairs = {name: (value, getattr(config, name)) for name, value in fields.items() if name not in of_length}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def preset(name: str, recipe: str | None = None, /, **overrides: Any) -> Config:
    """The named preset with some fields replaced.

    Args:
        recipe: one of RECIPES, also by its name; None leaves the preset's own.

    Raises:
        ArgumentError: unknown preset, recipe or field, or values that do not fit together.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(PRESETS)}, got {short(name)}")
    recipe = overrides.pop("recipe", recipe)
    fields = {} if recipe is None else recipe_fields(recipe, name)
    return Config.from_dict(PRESETS[name].to_dict() | fields | overrides)


def scaled_preset(name: str, recipe: str | None = None, /, **overrides: Any) -> Config:
    """`preset`, where the backbone's rate follows lr, max_size follows image_size, and epochs replace steps."""
    if "epochs" in overrides:
        overrides.setdefault("steps", None)
    recipe = overrides.pop("recipe", recipe)  # a recipe is more than its name, however it is chosen
    base, config = preset(name, recipe), preset(name, recipe, **overrides)
    follow = {}
    if "lr" in overrides and "lr_backbone" not in overrides:
        follow["lr_backbone"] = base.lr_backbone * config.lr / base.lr
    if "image_size" in overrides and "max_size" not in overrides:
        follow["max_size"] = round(base.max_size * config.image_size / base.image_size)
    return replace(config, **follow)
