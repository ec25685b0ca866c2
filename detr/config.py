"""Two frozen dataclasses: what a model is, and all of a run; each field with its range or its choices."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any

from detr.errors import ArgumentError

RECIPES = ("official", "finetune", "tiny")
BACKENDS = ("auto", "triton", "torch", "inductor")
SMALL_BACKBONES = ("tiny", "small")  # to train from scratch
BACKBONES = (*SMALL_BACKBONES, "resnet18", "resnet34", "resnet50", "resnet101")
DATA_FORMATS = ("coco", "roboflow", "yolo", "voc")  # of datasets: the keys of detr.formats.FORMATS
VAL_FRACTION = 0.2  # of the training images, held out where there is no split val
FORMATS = ("onnx", "torch-export", "aoti")  # files of a whole model
# how attention appears in an ONNX file: as plain operators, or as the node that an inference engine has a plugin for
NODES = ("plain", "tensorrt", "mmdeploy")

COUNT = 10**9  # the largest number of steps and other things that are only counted
BATCH = 2**14  # the most images at once
PIXELS = 10_000  # the longest that the shorter side of an image may be in the model
SEED = 2**63 - 1  # the largest seed
MAX_DETS = 100  # COCO counts the best 100 detections of an image
MAX_PIXELS = 89_478_485  # of an image file: Pillow's limit against decompression bombs


def short(value: Any) -> str:
    """A value for a message, in a few characters of one line: a number, a text, or else what kind of thing it is."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return repr(value)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 60 else repr(value[:57]) + "..."
    return "an integer beyond 64 bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _in(default: float | None, low: int, high: int) -> Any:
    """A field that is a number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high})


def _fraction(default: float) -> Any:
    """A field that is a number from 0 to 1, but not 1."""
    return field(default=default, metadata={"low": 0, "high": 1, "below": True})


def _one_of(default: str, choices: tuple[str, ...]) -> Any:
    """A field that is one of some texts."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """What a model is, and nothing of how it is trained. Defaults are Deformable DETR's (arXiv 2010.04159, section 5).

    Each field declares what it may be: its type, and its range or its choices. A number is never NaN or infinite.

    Raises:
        ArgumentError: a field is of another type or out of its range, or some do not fit together; names the field.
    """

    # one of BACKBONES: torchvision's, or a small one to train from scratch
    backbone: str = _one_of("resnet50", BACKBONES)
    dilation: bool = False  # DC5: the last backbone stage keeps stride 16 and dilates instead
    # "deformable" samples points; "global" attends to every pixel: plain DETR
    attention: str = _one_of("deformable", ("deformable", "global"))
    # channels of queries and tokens; a multiple of 32 (the groups of GroupNorm) and of n_heads
    d_model: int = _in(256, 32, 4096)
    n_heads: int = _in(8, 1, 512)  # attention heads M
    ffn_dim: int = _in(1024, 1, 65_536)  # hidden channels of the feed-forward blocks
    enc_layers: int = _in(6, 0, 100)  # encoder layers
    dec_layers: int = _in(6, 1, 100)  # decoder layers, each with a loss of its own if aux_loss
    # feature levels L; 1 takes the last stage only, more than 3 adds stride-2 convolutions
    n_levels: int = _in(4, 1, 10)
    enc_points: int = _in(4, 1, 64)  # points K per head and level that an encoder query samples
    dec_points: int = _in(4, 1, 64)  # the same for a decoder query
    n_queries: int = _in(300, 1, 10_000)  # most objects that can be found in an image
    dropout: float = _fraction(0.1)  # probability, in every transformer layer
    refine: bool = False  # iterative box refinement: each decoder layer corrects the boxes of the one before
    two_stage: bool = False  # queries start from the encoder's best proposals; needs refine
    # with two stages: "pure" makes position and content of a query from its proposal (appendix A.4), "mixed" learns the
    # content (arXiv 2203.03605, section 3.4)
    query_selection: str = _one_of("pure", ("pure", "mixed"))
    # with two stages: of the best 4 * n_queries proposals, those that a better and kept one overlaps by more than this
    # IoU come after the others; 1 moves none
    proposal_nms: float = _in(1.0, 0, 1)
    aux_loss: bool = True  # losses on every decoder layer, not only the last; those of noised boxes are on all anyway
    own_level_only: bool = False  # ablation (Table 2): encoder queries sample their own level only
    # of its outputs: "focal" (a sigmoid per class), "varifocal" (the same, which learns the IoU of its box, arXiv
    # 2008.13367) or "softmax" with one extra class for "no object"
    class_loss: str = _one_of("focal", ("focal", "varifocal", "softmax"))
    # how it is computed, on this machine: of the deformable attention, see msda_triton.ms_deform_attn
    backend: str = _one_of("auto", BACKENDS)
    grad_checkpointing: bool = False  # recompute the transformer's layers in the backward: less memory, more time

    def __post_init__(self) -> None:
        values = {declared.name: getattr(self, declared.name) for declared in dataclasses.fields(self)}
        fault = self.fault(values)
        if fault:
            raise ArgumentError(f"config: {fault}")
        for declared in dataclasses.fields(self):
            kind = int if declared.type == int | None else declared.type
            # PyTorch's optimisers tell integers from floats, and a checkpoint holds no numbers of NumPy
            if values[declared.name] is not None and type(values[declared.name]) is not kind:
                object.__setattr__(self, declared.name, kind(values[declared.name]))

    @classmethod
    def fault(cls, values: dict[str, Any]) -> str | None:
        """What is wrong with the fields of a config, where absent ones have their default; None if nothing is."""
        known = {declared.name: declared for declared in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f" (is {near[0]} meant?)" if near else ""
                return f"unknown field {short(name)}{hint}; known: {', '.join(known)}"
            if not _fits(known[name], value):
                return f"{name}: expected {_words(known[name])}, got {short(value)}"
        return cls._misfit(SimpleNamespace(**{name: each.default for name, each in known.items()} | values))

    @classmethod
    def _misfit(cls, c: Any) -> str | None:
        """Where fields, each of which is right by itself, do not fit together."""
        if c.d_model % 32 or c.d_model % c.n_heads:
            return f"d_model: expected a multiple of 32 and of n_heads = {c.n_heads}, got {c.d_model}"
        if c.two_stage and not c.refine:
            return "two_stage: needs refine = True, got False"
        if c.dilation and c.backbone not in ("resnet50", "resnet101"):
            return f"dilation: needs backbone resnet50 or resnet101, got {c.backbone}"
        if c.attention == "global" and (c.n_levels > 1 or c.refine or c.own_level_only):
            return 'attention: "global" needs n_levels = 1, refine = False and own_level_only = False'
        if c.class_loss == "softmax" and c.two_stage:
            return 'class_loss: two_stage needs "focal" or "varifocal", got "softmax"'
        return None

    @property
    def model(self) -> "ModelConfig":
        """The fields that say what the model is, alone."""
        return ModelConfig(**{each.name: getattr(self, each.name) for each in dataclasses.fields(ModelConfig)})

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dict of json types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Fields that are absent take their default.

        Raises:
            ArgumentError: unknown field, or as the constructor; the message names the field.
        """
        fault = cls.fault(values)
        if fault:
            raise ArgumentError(f"config: {fault}")
        return cls(**values)


@dataclass(frozen=True)
class Config(ModelConfig):
    """All of a run: its model, loss, data and training. `detr/config.py` explains each field beside it."""

    name: str = "deformable_detr_r50"  # the preset it came from, which `departures` compares it with
    pretrained_backbone: bool = True  # start from torchvision's ImageNet weights (ignored by the small backbones)

    # loss
    cost_class: float = _in(2.0, 0, 10_000)  # weights of the matching cost
    cost_bbox: float = _in(5.0, 0, 10_000)
    cost_giou: float = _in(2.0, 0, 10_000)
    loss_ce: float = _in(2.0, 0, 10_000)  # weights of the losses
    loss_bbox: float = _in(5.0, 0, 10_000)
    loss_giou: float = _in(2.0, 0, 10_000)
    focal_alpha: float = _in(0.25, 0, 1)  # weight of the positives in the focal loss
    eos_weight: float = _in(0.1, 0, 10_000)  # weight of "no object" in the softmax loss
    # two stages, training only: the decoder also corrects noised copies of an image's boxes, as many of all of them as
    # fit into this number, but one at least: with 24 and 5 objects 4 copies, 20 boxes; 0: none (arXiv 2203.01305)
    denoising: int = _in(0, 0, 10_000)

    # data
    # pixels; the shortest side at evaluation, and if augment is not "official" the resize target
    image_size: int = _in(800, 32, PIXELS)
    max_size: int = _in(1333, 32, 1_000_000)  # pixels; the longest side is this at most
    # "official": flip, multi-scale resize, crop; "tiny": flip at one size; "window": the same, and with probability 1/2
    # a random part of the image or the image within a margin, but not in the first eight passes over the images
    augment: str = _one_of("official", ("official", "tiny", "window"))
    # the images of a step are all tall or all not, and are padded less; those that are left over in an epoch are mixed
    shape_groups: bool = False

    # training
    recipe: str = _one_of("official", RECIPES)  # where RECIPE_FIELDS come from; `departures` compares them
    lr: float = _in(2e-4, 0, 1)  # AdamW learning rate of everything that has no rate of its own
    lr_backbone: float = _in(2e-5, 0, 10)  # of the backbone; 0 freezes it
    lr_offsets_mult: float = _in(0.1, 0, 100)  # factor on lr for sampling offsets and reference points
    beta2: float = _fraction(0.999)  # AdamW's decay of the squared gradients
    weight_decay: float = _in(1e-4, 0, 10)  # AdamW, on every parameter as the original does
    clip_norm: float = _in(0.1, 0, 10**12)  # global gradient norm is clipped to this; 0 does not clip
    batch_size: int = _in(32, 1, BATCH)  # images per optimiser step, over all processes and accumulated batches
    # batches that a process computes one after the other for each optimiser step; 0 chooses it so that a process holds
    # at most 2 images at a time, as in the original runs
    accumulate: int = _in(0, 0, BATCH)
    epochs: int = _in(50, 1, COUNT)  # passes over the training images
    steps: int | None = _in(None, 1, COUNT)  # optimiser steps; if set, they decide and not epochs
    warmup_steps: int = _in(0, 0, COUNT)  # linear warm-up from 0 to lr
    schedule: str = _one_of("step", ("step", "cosine"))  # "step": x0.1 at 80 % of the run; "cosine": down to 0
    eval_every: int = _in(1, 1, COUNT)  # epochs between evaluations
    # optimiser steps between evaluations; if set, they decide and not eval_every
    eval_steps: int | None = _in(None, 1, COUNT)
    patience: int = _in(0, 0, COUNT)  # evaluations without a better AP after which the run ends; 0 never ends it
    # decay of the averaged weights, which are then evaluated and kept in best.pt; 0 averages nothing
    ema: float = _fraction(0.0)
    # "bf16" or "fp16": autocast of the model; boxes, scores, matching and losses stay float32
    amp: str = _one_of("none", ("none", "bf16", "fp16"))
    compile: bool = False  # torch.compile of the model while training
    # steps in a row whose loss or gradient is not finite, and skipped, before the run ends
    max_nonfinite: int = _in(10, 1, COUNT)
    # image files that cannot be read, and are replaced by others, before the run ends
    max_unreadable: int = _in(10, 0, COUNT)
    seed: int = _in(42, 0, SEED)

    @classmethod
    def _misfit(cls, c: Any) -> str | None:
        if c.accumulate and c.batch_size % c.accumulate:
            return f"accumulate: expected a divisor of batch_size = {c.batch_size}, got {c.accumulate}"
        return super()._misfit(c)

    def accumulated_batches(self, processes: int) -> int:
        """Batches of each process in an optimiser step: `accumulate`, or if it is 0 enough for 2 images at most."""
        share = max(1, self.batch_size // processes)
        return self.accumulate or next(n for n in range(1, share + 1) if share % n == 0 and share // n <= 2)


def _fits(declared: dataclasses.Field, value: Any) -> bool:
    kind, rule = declared.type, declared.metadata
    if isinstance(value, bool) or kind is bool:  # a bool is an int to isinstance
        return isinstance(value, bool) and kind is bool
    if kind is str:
        text = isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100
        return text and value in rule.get("choices", (value,))
    if value is None:
        return kind == int | None
    if not isinstance(value, Real if kind is float else Integral):
        return False
    # NaN is neither
    return bool(rule["low"] <= value < rule["high"] or (value == rule["high"] and "below" not in rule))


def _words(declared: dataclasses.Field) -> str:
    """What `_fits` accepts."""
    kind, rule = declared.type, declared.metadata
    if kind is bool:
        return "true or false"
    if kind is str:
        return f"one of {', '.join(rule['choices'])}" if rule else "a text of 1 to 100 printable characters"
    number = "a number" if kind is float else "an integer"
    span = f"from {rule['low']} to {'below ' if 'below' in rule else ''}{rule['high']}"
    return f"{number} {span}{'' if kind in (int, float) else ', or null'}"
