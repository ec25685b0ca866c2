"""Weights from and for other code: official and Hugging Face checkpoints, our own, and torchvision backbones."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detr import checkpoint
from detr.config import SMALL_BACKBONES, ModelConfig, short
from detr.errors import ArgumentError, CheckpointError
from detr.model import DeformableDETR, first_not_finite
from detr.output import WRITTEN_BY, Folder, claim_file, make_parent, whole
from detr.terminal import one_line

BY = "detr export"
_HF_FILES = ("model.safetensors", "pytorch_model.bin")

# A tensor's name in another layout is found by applying these, in order, to its name in ours.
_OFFICIAL = [(r"^backbone\.", "backbone.0.")]
_OFFICIAL_PLAIN = [
    *_OFFICIAL,
    (r"^input_proj\.0\.0\.", "input_proj."),
    (r"^(class_embed|bbox_embed)\.\d+\.", r"\1."),
    (r"\.cross_attn\.", ".multihead_attn."),
    # plain DETR counts the norms of a decoder layer in the order of their use
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.cross_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.norm1."),
    (r"\.cross_norm\.", ".norm2."),
]
_HF = [
    (r"^backbone\.body\.", "model.backbone.conv_encoder.model."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^input_proj\.", "model.input_proj."),
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.cross_attn\.", ".encoder_attn."),
]
_HF_PLAIN = [
    *_HF,
    (r"^model\.input_proj\.0\.0\.", "model.input_projection."),
    (r"^class_embed\.\d+\.", "class_labels_classifier."),
    (r"^bbox_embed\.\d+\.", "bbox_predictor."),
    (r"\.decoder\.norm\.", ".decoder.layernorm."),
]
_TORCHVISION = [(r"^backbone\.body\.", "")]
_RULES = {  # for Deformable DETR, and for plain DETR
    "own": ([], []),
    "official": (_OFFICIAL, _OFFICIAL_PLAIN),
    "hf": (_HF, _HF_PLAIN),
    "torchvision": (_TORCHVISION, _TORCHVISION),
}
# transformers 5 renames these when it loads a file, and back when it saves one
_HF_IN_MEMORY = [
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc", ".fc"),
]


@dataclass
class Report:
    """What `load_weights` did, as lists of tensor names; `print` it for a summary."""

    path: Path
    loaded: list[str] = field(default_factory=list)  # of the model: copied as they are
    reshaped: list[str] = field(default_factory=list)  # of the model: some rows copied, the others as they were
    missing: list[str] = field(default_factory=list)  # of the model: as they were
    skipped: list[str] = field(default_factory=list)  # of the file: not used, with the reason if there is one

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded"]
        for what in ("reshaped", "missing", "skipped"):
            names = getattr(self, what)
            if names:
                more = f", and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {what} {len(names)}: {', '.join(map(one_line, names[:6]))}{more}")
        return "\n".join(lines)


def load_weights(model: DeformableDETR, path: str | Path, class_names: list[str] | None = None) -> Report:
    """Copy into `model` what a file of weights has for it.

    The file may be an official checkpoint of Deformable DETR or DETR, one of `detr train`, a Hugging Face file
    (`model.safetensors`, `pytorch_model.bin`, or their folder) or a torchvision ResNet. Where its classes are not those
    of the model, the rows of the class heads are copied by class name, and classes that it does not know keep the
    values that they have in `model`: after `build_model` that is the prior bias. Where its classes are not known, heads
    are copied if their number is the same. Nothing in the file is executed.

    Args:
        class_names: the model's classes in the order of labels. None takes them to be those of the file if as many.
    Raises:
        CheckpointError: the file is missing, damaged, holds code or NaN, or has nothing for this model; names the file.
    """
    path = Path(path)
    if class_names is not None and len(class_names) != model.num_classes:
        raise ArgumentError(f"class_names: expected {model.num_classes} of them, got {len(class_names)}")
    weights, source_names = _read(path)
    layout = _layout_of(weights, path)
    if layout == "hf":
        weights = {_rename(key, _HF_IN_MEMORY): tensor for key, tensor in weights.items()}
    report, used, state = Report(path), set(), {}
    for key, current in model.state_dict().items():
        candidates = [_names(name, layout, model.config) for name in (key, *_stand_ins(key, model.config))]
        present = [names for names in candidates if all(name in weights for name in names)]
        used.update(name for names in present for name in names)
        if not present:
            report.missing.append(key)
            continue
        parts = [weights[name] for name in present[0]]
        if any(part.dim() == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
            report.missing.append(key)
            report.skipped.append(f"{present[0][0]} ({list(parts[0].shape)}, expected {list(current.shape)})")
            continue
        tensor = torch.cat(parts)
        if key.startswith("class_embed."):
            pairs = _class_pairs(key, len(tensor), source_names, class_names, model)
        elif key == "query_embed.weight":
            pairs = [(row, row) for row in range(min(len(tensor), len(current)))]
        else:
            pairs = None
        if tensor.shape == current.shape and (pairs is None or pairs == [(row, row) for row in range(len(current))]):
            state[key] = tensor
            report.loaded.append(key)
        elif pairs and tensor.shape[1:] == current.shape[1:]:
            rows, source_rows = (list(column) for column in zip(*pairs, strict=True))
            state[key] = current.clone()
            state[key][rows] = tensor[source_rows].to(current)
            report.reshaped.append(key)
        else:
            reason = "other classes" if pairs == [] else f"{list(tensor.shape)}, expected {list(current.shape)}"
            report.missing.append(key)
            report.skipped.append(f"{present[0][0]} ({reason})")
    report.skipped += [key for key in weights if key not in used]
    if not state:
        raise CheckpointError(
            f"{path}: nothing in it is for this model: expected {report.missing[0]}, got {next(iter(weights))}"
        )
    fault = first_not_finite(state)
    if fault:
        raise CheckpointError(f"{path}: {fault}")
    model.load_state_dict(state, strict=False)
    return report


def convert_weights(model: DeformableDETR, to: str) -> dict[str, Tensor]:
    """The model's weights by the names of another layout, "official" or "hf" (Hugging Face).

    Raises:
        ArgumentError: unknown layout, or one that has no names for this model.
    """
    config = model.config
    if to not in ("official", "hf"):
        raise ArgumentError(f"to: expected official or hf, got {to!r}")
    ours = {
        f"backbone {config.backbone}": config.backbone in SMALL_BACKBONES,
        "own_level_only": config.own_level_only,
        "query_selection mixed": config.two_stage and config.query_selection == "mixed",
        f"proposal_nms {config.proposal_nms:g}": config.two_stage and config.proposal_nms < 1,
    }
    what = next((what for what, is_so in ours.items() if is_so), None)
    if what:
        raise ArgumentError(f"to: {to} has no model with {what}; onnx, torch-export and aoti take any")
    converted = {}
    for key, tensor in model.state_dict().items():
        keys = [key]
        # the decoder of the original has these heads too, where it uses them
        doubled = {"bbox_embed.": config.refine, "class_embed.": config.two_stage}
        if any(flag and key.startswith(head) for head, flag in doubled.items()):
            keys.append(f"transformer.decoder.{key}")
        for key in keys:
            names = _names(key, to, config)
            converted.update(zip(names, tensor.chunk(len(names)), strict=True))
    return converted


def export_weights(model: DeformableDETR, path: str | Path, to: str, class_names: list[str]) -> Path:
    """Write weights for other code: an official checkpoint file, or a Hugging Face folder for `from_pretrained`.

    Args:
        path: of the file (official) or folder (hf). class_names: in the order of labels.
    Returns:
        The path of the file with the weights.
    Raises:
        ArgumentError: as `convert_weights`. OutputError: a file is in the way that `detr export` did not write.
    """
    path = Path(path)
    weights = convert_weights(model, to)
    if to == "official":
        claim_file(path, BY, checkpoint.written_by)
        make_parent(path)
        with whole(path) as file:
            torch.save({"model": weights, WRITTEN_BY: BY}, file)
        return path
    folder = Folder(path, BY)
    folder.claim(("config.json", "model.safetensors"))
    # clones: the format refuses tensors that share memory
    tensors = {key: tensor.clone().contiguous() for key, tensor in weights.items()}
    config = json.dumps(_hf_config(model.config, class_names), indent=2) + "\n"
    folder.write("config.json", config.encode())
    folder.write("model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return path / "model.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Tensors of a file, and the names of its classes if they stand in it or beside it."""
    if path.is_dir():
        files = [path / name for name in _HF_FILES if (path / name).is_file()]
        if not files:
            raise CheckpointError(f"{path}: expected {' or '.join(_HF_FILES)} in this folder, got neither")
        path = files[0]
    content = _safetensors(path) if path.suffix == ".safetensors" else checkpoint.read(path)
    content = content if isinstance(content, dict) else {}
    names = content.get("class_names")
    # of our own checkpoints the averaged weights, if the run averaged them
    key = "ema" if names is not None and "ema" in content else "model"
    key = key if key in content or "state_dict" not in content else "state_dict"
    weights = content.get(key, content)
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: class_names: expected a list of names, got {short(names)}")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: {key}: expected a dict of tensors, got {short(weights)}")
    weights = {str(name).removeprefix("module."): value for name, value in weights.items()}
    # what a FLOP counter left in the official files, and a counter that frozen norms do not have
    ignored = ("total_ops", "total_params", "num_batches_tracked")
    wanted = (k for k, v in weights.items() if checkpoint.is_plain(v) and v.is_floating_point())
    tensors = {key: weights[key] for key in wanted if not key.endswith(ignored)}
    if not tensors:
        held = ", ".join(list(weights)[:6]) or "nothing"
        raise CheckpointError(f"{path}: expected tensors by name, or below model or state_dict, got {held}")
    return tensors, names or (_hf_class_names(path.with_name("config.json")) if path.name in _HF_FILES else None)


def _safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError, LookupError, safetensors.SafetensorError) as error:
        first = (str(error) or "damaged").split("\n")[0]
        raise CheckpointError(f"{path}: not readable: {first}") from None


def _hf_class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_bytes()).get("id2label", {})
        names = [labels[str(row)] for row in range(len(labels))]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: id2label: expected an object with a name for each of 0, 1, ...")
    return names or None


def _layout_of(weights: dict[str, Tensor], path: Path) -> str:
    starts = {"official": "backbone.0.", "own": "backbone.", "hf": "model.", "torchvision": "layer1."}
    for layout, start in starts.items():
        if any(key.startswith(start) for key in weights):
            return layout
    raise CheckpointError(f"{path}: expected weights of DETR, Deformable DETR or a ResNet, got {list(weights)[:3]}")


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _names(key: str, layout: str, config: ModelConfig) -> tuple[str, ...]:
    """The tensors of another layout that, one below the other, are our tensor `key`."""
    name = _rename(key, _RULES[layout][config.attention == "global"])
    if layout == "hf" and ".in_proj_" in name:
        return tuple(name.replace(".in_proj_", f".{part}_proj.") for part in "qkv")
    return (name,)


def _stand_ins(key: str, config: ModelConfig) -> list[str]:
    """What may stand for a head's tensor `key` in a file: the decoder's copy, or the first layer's if all share it."""
    head = re.match(r"(class_embed|bbox_embed)\.(\d+)(\..*)", key)
    if not head:
        return []
    first = [f"{head[1]}.0{head[3]}"] if int(head[2]) < config.dec_layers else []
    return [f"transformer.decoder.{name}" if decoder else name for name in (key, *first) for decoder in (False, True)]


def _class_pairs(
    key: str, n_rows: int, source_names: list[str] | None, class_names: list[str] | None, model: DeformableDETR
) -> list[tuple[int, int]]:
    """(row in the model, row in the file) of each class that both have, for a class head of `n_rows` in the file."""
    background = int(model.config.class_loss == "softmax")
    n_source = n_rows - background
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if source_names is None and n_source == len(coco):
        source_names = coco  # raw ids of COCO as labels, as the official models have them
    if source_names is None or class_names is None or len(source_names) != n_source:
        same = n_source == model.num_classes
        return [(row, row) for row in range(n_rows)] if same else []
    if key.startswith(f"class_embed.{model.config.dec_layers}.") and source_names != class_names:
        return [(0, 0)]  # of the first stage: row 0 says "object", whatever the classes
    known = {name.casefold(): row for row, name in enumerate(source_names)}
    pairs = [(row, known[name.casefold()]) for row, name in enumerate(class_names) if name.casefold() in known]
    return pairs + [(model.num_classes, n_source)] * background


def _hf_config(config: ModelConfig, class_names: list[str]) -> dict:
    """Hugging Face's config.json for a model of `config`, its training apart."""
    deformable = config.attention == "deformable"
    common = {
        "architectures": ["DeformableDetrForObjectDetection" if deformable else "DetrForObjectDetection"],
        "model_type": "deformable_detr" if deformable else "detr",
        "backbone": config.backbone,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "dilation": config.dilation,
        "d_model": config.d_model,
        "encoder_layers": config.enc_layers,
        "decoder_layers": config.dec_layers,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.n_heads,
        "encoder_ffn_dim": config.ffn_dim,
        "decoder_ffn_dim": config.ffn_dim,
        "dropout": config.dropout,
        "num_queries": config.n_queries,
        "id2label": {str(row): name for row, name in enumerate(class_names)},
        "label2id": {name: row for row, name in enumerate(class_names)},
    }
    if not deformable:
        return common
    return common | {
        "num_feature_levels": config.n_levels,
        "encoder_n_points": config.enc_points,
        "decoder_n_points": config.dec_points,
        "with_box_refine": config.refine,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.n_queries,
    }
