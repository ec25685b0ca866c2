"""A detector as a file that runs without this package: ONNX, `torch.export`, or compiled by AOTInductor."""

import contextlib
import copy
import io
import json
import logging
import lzma
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from detr.config import FORMATS, NODES
from detr.devices import find_compiler
from detr.errors import ArgumentError, MissingPackageError
from detr.model import DeformableDETR
from detr.output import WRITTEN_BY, claim_file, write_file
from msda_triton import MSDeformAttn

BY = "detr export"
_ABOUT = "detector.json"


class Exported(nn.Module):
    """The last predictions of a model: logits [B, N, K] and boxes [B, N, 4] (cx, cy, w, h) of the unpadded image."""

    def __init__(self, model: DeformableDETR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images, mask)
        return outputs["logits"], outputs["boxes"]


def export_model(
    model: DeformableDETR,
    path: str | Path,
    to: str,
    size: tuple[int, int],
    class_names: list[str],
    attention: str = "plain",
) -> Path:
    """Write the model for images of one size and any number of them.

    Its inputs are `images` [B, 3, H, W] and `mask` [B, H, W] bool as in `DeformableDETR.forward`, its outputs `logits`
    and `boxes` as in `Exported`. The class names and the size travel in the file as json: metadata `detector` of ONNX,
    extra file or metadata `detector.json` of the others.

    Args:
        path: of the file, ending in .onnx or .pt2. to: "onnx", "torch-export" (for `torch.export.load`) or "aoti" (for
            `torch._inductor.aoti_load_package`; compiled for this machine's CPU).
        size: (H, W) of the padded images, pixels. class_names: in the order of labels.
        attention: of ONNX only, see `detr.config.NODES`.
    Returns:
        The path.
    Raises:
        ArgumentError: an argument that does not fit; the message names it. MissingPackageError: names the package.
        OutputError: a file is in the way that `detr export` did not write.
    """
    path = Path(path)
    if to not in FORMATS:
        raise ArgumentError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if attention not in NODES:
        raise ArgumentError(f"attention: expected one of {', '.join(NODES)}, got {attention!r}")
    if attention != "plain" and to != "onnx":
        raise ArgumentError(f"attention: {attention!r} is for ONNX only, got to={to!r}")
    if attention != "plain" and model.config.attention != "deformable":
        raise ArgumentError(f"attention: {attention!r} needs deformable attention, which plain DETR does not have")
    if attention != "plain" and not hasattr(torch.onnx, "ops"):
        raise ArgumentError(f"attention: {attention!r} needs torch 2.8 or newer, got {torch.__version__}")
    suffix = ".onnx" if to == "onnx" else ".pt2"
    if path.suffix != suffix:
        raise ArgumentError(f"path: expected a name that ends in {suffix} for to={to!r}, got {path}")
    if min(size) < 32:
        raise ArgumentError(f"size: expected at least 32 x 32 pixels, got {size[0]} x {size[1]}")
    claim_file(path, BY, _writer)
    about = json.dumps({"classes": class_names, "height": size[0], "width": size[1]})
    exported = Exported(model).eval()
    images, mask = torch.zeros(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool)
    mask[1, :, size[1] // 2 :] = True
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        if to == "onnx":
            content = _onnx(exported, (images, mask), batch, about, attention)
        else:
            if to == "aoti":
                find_compiler("to: 'aoti'")
            program = torch.export.export(exported, (images, mask), dynamic_shapes=(batch, batch))
            content = (_saved if to == "torch-export" else _compiled)(program, {_ABOUT: about, WRITTEN_BY: BY})
    write_file(path, content, BY, _writer)
    return path


def _saved(program: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    # to memory, because a full disk would end the process
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=about)
    return buffer.getvalue()


def _compiled(program: torch.export.ExportedProgram, about: dict[str, str]) -> bytes:
    from torch._inductor.exc import InductorError

    buffer = io.BytesIO()
    options = {"aot_inductor.metadata": about}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=buffer, inductor_configs=options)
    except InductorError as error:  # its message goes on with advice for developers of PyTorch
        first = str(error).split("\n")[0]
        raise ArgumentError(f"to: 'aoti': not compiled: {first}") from error
    return buffer.getvalue()


def _writer(path: Path) -> str | None:
    """The command that an exported model says wrote it; None for every other file."""
    if path.suffix == ".onnx":
        return _onnx_writer(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(f"/{WRITTEN_BY}"):  # of torch.export
                    return archive.read(name).decode()
                if name.endswith(".wrapper_metadata.json"):  # of AOTInductor
                    return json.loads(archive.read(name)).get(WRITTEN_BY)
    except (OSError, ValueError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError):
        pass
    return None


def _onnx_writer(path: Path) -> str | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        return None
    try:
        properties = onnx.load(path, load_external_data=False).metadata_props
    except (OSError, ValueError, DecodeError):
        return None
    return next((entry.value for entry in properties if entry.key == WRITTEN_BY), None)


def _onnx(exported, inputs, batch, about: str, attention: str) -> bytes:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "to: 'onnx' needs the packages onnx and onnxscript (pip install onnx onnxscript)"
        ) from None
    if attention != "plain":
        exported = copy.deepcopy(exported)
        for module in exported.modules():
            if type(module) is MSDeformAttn:
                module.__class__ = {"tensorrt": _TensorRTAttention, "mmdeploy": _MMDeployAttention}[attention]
    with _quiet():
        program = torch.onnx.export(
            exported,
            inputs,
            input_names=["images", "mask"],
            output_names=["logits", "boxes"],
            dynamic_shapes=(batch, batch),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update({"detector": about, WRITTEN_BY: BY})
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter and onnxscript's optimiser say about themselves."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _NodeAttention(MSDeformAttn):
    """`MSDeformAttn` with everything but the sampling in plain operators."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: list[tuple[int, int]],
        input_level_start_index: None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        B, Q, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        samples = self.locations_and_weights(query, reference_points, input_spatial_shapes)
        locations, weights = (x.to(value.dtype) for x in samples)
        shapes = torch.tensor(input_spatial_shapes, dtype=torch.int32)
        areas = [H * W for H, W in input_spatial_shapes]
        starts = torch.tensor([sum(areas[:l]) for l in range(len(areas))], dtype=torch.int32)
        value = value.view(B, input_flatten.shape[1], self.n_heads, self.d_model // self.n_heads)
        shape = (B, Q, *value.shape[2:]) if self.heads_apart else (B, Q, self.d_model)
        out = torch.onnx.ops.symbolic(
            self.node, (value, shapes, starts, locations, weights), self.attributes, dtype=value.dtype, shape=shape,
            version=1,
        )  # fmt: skip
        return self.output_proj(out.flatten(2) if self.heads_apart else out)


class _TensorRTAttention(_NodeAttention):
    node, attributes, heads_apart = "trt.plugins::MultiscaleDeformableAttnPlugin_TRT", {"plugin_version": "1"}, True


class _MMDeployAttention(_NodeAttention):
    node, attributes, heads_apart = "mmdeploy::MMCVMultiScaleDeformableAttention", {"im2col_step": 64}, False
