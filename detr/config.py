"""One frozen dataclass that says everything about a model and its training, and the presets of the paper's tables."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

RECIPES = ("official", "finetune", "tiny")
BACKENDS = ("auto", "triton", "torch", "inductor")
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


def short(value: Any) -> str:
    """A value for a message, in a few characters of one line: a number, a text, or else what kind of thing it is."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return repr(value)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 60 else repr(value[:57]) + "..."
    return "an integer beyond 64 bits" if isinstance(value, int) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class Config:
    """Model, loss, data and training of one run. The defaults are Deformable DETR's (arXiv 2010.04159, section 5)."""

    name: str = "deformable_detr_r50"  # preset it came from; for people and file names only

    # model
    backbone: str = "resnet50"  # one of BACKBONES: torchvision's, or "tiny", a small one to train from scratch
    dilation: bool = False  # DC5: the last backbone stage keeps stride 16 and dilates instead
    pretrained_backbone: bool = True  # start from torchvision's ImageNet weights (ignored by "tiny")
    attention: str = "deformable"  # "deformable" samples points; "global" attends to every pixel: plain DETR
    d_model: int = 256  # channels of queries and tokens; a multiple of 32 (the groups of GroupNorm) and of n_heads
    n_heads: int = 8  # attention heads M
    ffn_dim: int = 1024  # hidden channels of the feed-forward blocks
    enc_layers: int = 6  # encoder layers
    dec_layers: int = 6  # decoder layers, each with a loss of its own if aux_loss
    n_levels: int = 4  # feature levels L; 1 takes the last stage only, more than 3 adds stride-2 convolutions
    enc_points: int = 4  # points K per head and level that an encoder query samples
    dec_points: int = 4  # the same for a decoder query
    n_queries: int = 300  # most objects that can be found in an image
    dropout: float = 0.1  # probability, in every transformer layer
    refine: bool = False  # iterative box refinement: each decoder layer corrects the boxes of the one before
    two_stage: bool = False  # queries start from the encoder's best proposals; needs refine
    aux_loss: bool = True  # losses on every decoder layer, not only the last
    own_level_only: bool = False  # ablation (Table 2): encoder queries sample their own level only
    backend: str = "auto"  # of the deformable attention, see msda_triton.ms_deform_attn; of this run only

    # loss
    # "focal" (a sigmoid per class), "varifocal" (the same, which learns the IoU of its box, arXiv 2008.13367) or
    # "softmax" with one extra class for "no object"
    class_loss: str = "focal"
    cost_class: float = 2.0  # weights of the matching cost
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    loss_ce: float = 2.0  # weights of the losses
    loss_bbox: float = 5.0
    loss_giou: float = 2.0
    focal_alpha: float = 0.25  # weight of the positives in the focal loss
    eos_weight: float = 0.1  # weight of "no object" in the softmax loss

    # data
    image_size: int = 800  # pixels; the shortest side at evaluation, and with augment "tiny" the resize target
    max_size: int = 1333  # pixels; the longest side stays below this
    augment: str = "official"  # "official": flip, multi-scale resize, crop; "tiny": flip at one size

    # training
    recipe: str = "official"  # one of RECIPES, which the fields below come from; for people
    lr: float = 2e-4  # AdamW learning rate of everything that has no rate of its own
    lr_backbone: float = 2e-5  # of the backbone; 0 freezes it
    lr_offsets_mult: float = 0.1  # factor on lr for sampling offsets and reference points
    beta2: float = 0.999  # AdamW's decay of the squared gradients
    weight_decay: float = 1e-4  # AdamW, on every parameter as the original does
    clip_norm: float = 0.1  # global gradient norm is clipped to this; 0 does not clip
    batch_size: int = 32  # images per optimiser step, over all processes and accumulated batches
    # batches that a process computes one after the other for each optimiser step; 0 chooses it so that a process holds
    # at most 2 images at a time, as in the original runs
    accumulate: int = 0
    epochs: int = 50  # passes over the training images
    steps: int | None = None  # optimiser steps; if set, they decide and not epochs
    warmup_steps: int = 0  # linear warm-up from 0 to lr
    schedule: str = "step"  # "step": x0.1 at 80 % of the run; "cosine": down to 0
    eval_every: int = 1  # epochs between evaluations
    eval_steps: int | None = None  # optimiser steps between evaluations; if set, they decide and not eval_every
    patience: int = 0  # evaluations without a better AP after which the run ends; 0 never ends it
    ema: float = 0.0  # decay of the averaged weights, which are then evaluated and kept in best.pt; 0 averages nothing
    amp: str = "none"  # "bf16" or "fp16": autocast of the model; boxes, scores, matching and losses stay float32
    grad_checkpointing: bool = False  # recompute the transformer's layers in the backward: less memory, more time
    compile: bool = False  # torch.compile of the model while training
    max_nonfinite: int = 10  # steps in a row whose loss or gradient is not finite, and skipped, before the run ends
    max_unreadable: int = 10  # image files that cannot be read, and are replaced by others, before the run ends
    seed: int = 42

    def __post_init__(self) -> None:
        choices = {
            "backbone": BACKBONES,
            "attention": ("deformable", "global"),
            "class_loss": ("focal", "varifocal", "softmax"),
            "augment": ("tiny", "official"),
            "schedule": ("step", "cosine"),
            "recipe": RECIPES,
            "amp": ("none", "bf16", "fp16"),
            "backend": BACKENDS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in (
            *("d_model", "n_heads", "ffn_dim", "dec_layers", "n_levels", "enc_points", "dec_points", "n_queries"),
            *("image_size", "max_size", "batch_size", "epochs", "eval_every", "max_nonfinite"),
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("steps", "eval_steps"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("seed", "patience", "max_unreadable", "accumulate"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        for field in ("beta2", "ema"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}: expected a number from 0 to below 1, got {getattr(self, field)}")
        if self.accumulate and self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch_size = {self.batch_size}, got {self.accumulate}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {self.dropout}")
        if self.d_model % 32 or self.d_model % self.n_heads:
            raise ValueError(f"d_model: expected a multiple of 32 and of n_heads = {self.n_heads}, got {self.d_model}")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage: needs refine = True, got False")
        if self.dilation and self.backbone not in ("resnet50", "resnet101"):
            raise ValueError(f"dilation: needs backbone resnet50 or resnet101, got {self.backbone}")
        if self.attention == "global" and (self.n_levels > 1 or self.refine or self.own_level_only):
            raise ValueError('attention: "global" needs n_levels = 1, refine = False and own_level_only = False')
        if self.class_loss == "softmax" and self.two_stage:
            raise ValueError('class_loss: two_stage needs "focal" or "varifocal", got "softmax"')

    def accumulated_batches(self, processes: int) -> int:
        """Batches of each process in an optimiser step: `accumulate`, or if it is 0 enough for 2 images at most."""
        share = max(1, self.batch_size // processes)
        return self.accumulate or next(n for n in range(1, share + 1) if share % n == 0 and share // n <= 2)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dict of json types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`. Fields that are absent take their default.

        Raises:
            ValueError: unknown field, or a value of the wrong type; the message names the field.
        """
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                raise ValueError(f"config: unknown field {short(name)}; known: {', '.join(fields)}")
            allowed = {float: (float, int), int | None: (int, type(None))}.get(fields[name], (fields[name],))
            # a bool is an int to isinstance
            wrong = not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
            if wrong or (isinstance(value, int) and abs(value) >= 2**63):
                expected = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"config: {name}: expected {expected}, got {short(value)}")
        return cls(**values)


# Without a pre-trained backbone large rates, that of the backbone above all, warm-up and a decay to 0 learn fastest;
# what each choice is worth is in benchmarks/NOTES.md.
_TINY = Config(
    name="tiny",
    backbone="tiny",
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
    class_loss="varifocal",
    loss_ce=1.0,
    image_size=160,
    max_size=320,
    recipe="tiny",
    augment="tiny",
    lr=2e-3,
    lr_backbone=4e-3,
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
        replace(_TINY, name="tiny_refine", two_stage=False),
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
    *("augment", "lr", "lr_backbone", "lr_offsets_mult", "beta2", "weight_decay", "clip_norm", "batch_size"),
    *("epochs", "steps", "warmup_steps", "schedule", "eval_every", "eval_steps", "ema"),
)


def recipe_fields(recipe: str, preset_name: str) -> dict[str, Any]:
    """The fields that a recipe sets for a preset.

    "official" is what the preset's row of the paper was trained with (for a tiny preset, what Deformable DETR was),
    from an ImageNet backbone; "finetune" is for weights that were trained on other boxes before; "tiny" is for small
    models and images, from random weights.

    Raises:
        ValueError: unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
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


def preset(name: str, recipe: str | None = None, **overrides: Any) -> Config:
    """The named preset with some fields replaced.

    Args:
        recipe: one of RECIPES; None leaves the preset's own.

    Raises:
        ValueError: unknown preset, recipe or field, or values that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    fields = recipe_fields(recipe, name) if recipe else {}
    return Config.from_dict(PRESETS[name].to_dict() | fields | overrides)
