"""What a stand-in costs over the direct call, and patched Hugging Face models against themselves unpatched.

    python -m benchmarks.shim_speed [--image 320] [--rounds 7]

CPU time of one thread. The cost is that of a call whose operator returns at once, less the operator's own; models run
unpatched and patched in turn, and the median of the ratios is reported.
"""

import argparse
import statistics
import time
import timeit
from collections.abc import Callable

import torch

import msda_triton
from msda_triton.shims import c_extension, dcnv4, deformable_detr, mmcv, rtdetr, torch_ms_deform_attn
from msda_triton.shims import transformers as shim

SHAPES = [(4, 6), (2, 3)]


def overheads(number: int = 5000) -> dict[str, float]:
    """Microseconds that each stand-in adds to the operator, with the operator replaced by one that returns at once."""
    B, Q, M, D, L, P = 1, 10, 2, 4, 2, 2
    v, x, a = torch.rand(B, 30, M, D), torch.rand(B, Q, M, L, P, 2), torch.rand(B, Q, M, L, P)
    shapes, starts, out = torch.tensor(SHAPES), torch.tensor([0, 24]), torch.rand(B, Q, M * D)
    flat_x, flat_a = x.flatten(3, 4), a.flatten(3)
    packed = torch.cat([x.flatten(3), flat_a], -1)
    tokens_last = v.permute(0, 2, 3, 1).contiguous()
    layer = shim.MultiScaleDeformableAttention()
    calls = {
        "MSDeformAttnFunction.apply": (
            msda_triton.functional,
            lambda: msda_triton.MSDeformAttnFunction.apply(v, shapes, starts, x, a, 64),
        ),
        "C extension, forward": (
            msda_triton.functional,
            lambda: c_extension.ms_deform_attn_forward(v, shapes, starts, x, a, 64),
        ),
        "mmcv function": (mmcv, lambda: mmcv.multi_scale_deformable_attn_pytorch(v, shapes, x, a)),
        "BEVFormer _fp32": (
            mmcv,
            lambda: mmcv.MultiScaleDeformableAttnFunction_fp32.apply(v, shapes, starts, x, a, 64),
        ),
        "transformers layer, forward": (shim, lambda: layer.forward(v, shapes, SHAPES, starts, x, a, 64)),
        "transformers v2 function": (
            shim,
            lambda: shim.multi_scale_deformable_attention_v2(v, SHAPES, flat_x, flat_a, [P] * L),
        ),
        "RT-DETR function": (rtdetr, lambda: rtdetr.deformable_attention_core_func(v, SHAPES, x, a)),
        "RT-DETRv2 function": (
            rtdetr,
            lambda: rtdetr.deformable_attention_core_func_v2(v, SHAPES, flat_x, flat_a, [P] * L),
        ),
        "rf-detr core function": (
            deformable_detr,
            lambda: deformable_detr.ms_deform_attn_core_pytorch(tokens_last, shapes, x, flat_a),
        ),
        "torch-ms-deform-attn": (
            msda_triton.functional,
            lambda: torch_ms_deform_attn.ms_deform_attn(v, shapes, starts, x, a),
        ),
        "DCNv4, with its softmax": (
            dcnv4,
            lambda: dcnv4.FlashDeformAttnFunction.apply(v, shapes, starts, packed, 64, P),
        ),
    }

    def operator(*_args, **_kwargs):
        return out

    base = _microseconds(lambda: operator(v, shapes, x, a, level_start_index=starts), number)
    costs = {}
    for name, (module, call) in calls.items():
        original, module.ms_deform_attn = module.ms_deform_attn, operator
        try:
            costs[name] = _microseconds(call, number) - base
        finally:
            module.ms_deform_attn = original
    costs["(the operator itself, on the CPU)"] = _microseconds(
        lambda: msda_triton.ms_deform_attn(v, shapes, x, a, level_start_index=starts), max(1, number // 10)
    )
    return costs


def _microseconds(call: Callable, number: int) -> float:
    return min(timeit.repeat(call, number=number, repeat=7, timer=time.process_time)) / number * 1e6


def models() -> dict[str, torch.nn.Module]:
    """Models of the published widths and query counts, with a small ResNet and fewer layers."""
    import transformers as hf

    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    rt = {"encoder_in_channels": [32, 64, 128], "decoder_layers": 3, "num_denoising": 0}
    detr = {"encoder_layers": 3, "decoder_layers": 3}
    swin = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4]}

    def rt_resnet() -> hf.RTDetrResNetConfig:
        return hf.RTDetrResNetConfig(**resnet, out_features=stages[1:])

    made = {
        "deformable_detr": hf.DeformableDetrForObjectDetection(
            hf.DeformableDetrConfig(**detr, backbone_config=hf.ResNetConfig(**resnet, out_features=stages[1:]))
        ),
        "rt_detr": hf.RTDetrForObjectDetection(hf.RTDetrConfig(**rt, backbone_config=rt_resnet())),
        "rt_detr_v2": hf.RTDetrV2ForObjectDetection(hf.RTDetrV2Config(**rt, backbone_config=rt_resnet())),
        "d_fine": hf.DFineForObjectDetection(
            hf.DFineConfig(**rt, backbone_config=rt_resnet(), decoder_n_points=[3, 6, 3])
        ),
        "mask2former": hf.Mask2FormerForUniversalSegmentation(
            hf.Mask2FormerConfig(
                encoder_layers=3, decoder_layers=3, backbone_config=hf.SwinConfig(**swin, out_features=stages)
            )
        ),
    }
    return {name: model.eval() for name, model in made.items()}


def compare(model: torch.nn.Module, image: torch.Tensor, training: bool, rounds: int) -> tuple[float, float]:
    """Seconds unpatched, and the time patched over it: medians over the rounds."""

    def run() -> float:
        start = time.process_time()
        with torch.set_grad_enabled(training):
            out = model(pixel_values=image)
            if training:
                loss = sum(x.float().mean() for x in out.values() if torch.is_tensor(x) and x.requires_grad)
                loss.backward()
        return time.process_time() - start

    run()
    with msda_triton.patch("transformers"):
        run()
    before, ratios = [], []
    for _ in range(rounds):
        before.append(run())
        with msda_triton.patch("transformers"):
            ratios.append(run() / before[-1])
    return statistics.median(before), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=320, help="height and width, pixels (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| stand-in | us over the operator |\n|---|---|")
    for name, cost in overheads().items():
        print(f"| {name} | {cost:.1f} |")
    torch.manual_seed(0)
    image = torch.randn(1, 3, options.image, options.image)
    print(f"\n| model, {options.image} px, one image | mode | unpatched s | patched / unpatched |\n|---|---|---|---|")
    for name, model in models().items():
        for training in (False, True):
            seconds, ratio = compare(model, image, training, options.rounds)
            print(f"| {name} | {'fwd+bwd' if training else 'fwd'} | {seconds:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
