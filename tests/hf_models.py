"""Small random models of Hugging Face transformers that use multi-scale deformable attention, and their inputs."""

import torch
import transformers as hf
from torch import Tensor, nn

STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
DETR = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 12,
}  # fmt: skip
RT_DETR = {
    "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 32], "encoder_ffn_dim": 32, "encoder_attention_heads": 2,
    "d_model": 32, "num_queries": 12, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 32, "decoder_layers": 2,
    "decoder_attention_heads": 4, "num_denoising": 0, "num_labels": 5, "hidden_expansion": 0.5,
}  # fmt: skip
BERT = {
    "vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
CLIP = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "projection_dim": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8,
}  # fmt: skip
MASKED = {
    "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 2, "num_attention_heads": 4,
    "dim_feedforward": 32, "num_queries": 12,
}  # fmt: skip


def _resnet() -> hf.PreTrainedConfig:
    return hf.ResNetConfig(**RESNET, out_features=STAGES[1:])


def _rt_detr_resnet(first: int = 2) -> hf.PreTrainedConfig:
    return hf.RTDetrResNetConfig(**RESNET, out_features=STAGES[first - 1 :])


def _swin(first: int = 2) -> hf.PreTrainedConfig:
    return hf.SwinConfig(**SWIN, out_features=STAGES[first - 1 :])


def deformable_detr() -> nn.Module:
    config = hf.DeformableDetrConfig(
        **DETR, backbone_config=_resnet(), two_stage=True, with_box_refine=True, two_stage_num_proposals=12
    )
    return hf.DeformableDetrForObjectDetection(config)


def grounding_dino() -> nn.Module:
    config = hf.GroundingDinoConfig(**DETR, backbone_config=_swin(), text_config=hf.BertConfig(**BERT))
    return hf.GroundingDinoForObjectDetection(config)


def mm_grounding_dino() -> nn.Module:
    config = hf.MMGroundingDinoConfig(**DETR, backbone_config=_swin(), text_config=hf.BertConfig(**BERT))
    return hf.MMGroundingDinoForObjectDetection(config)


def rt_detr(**changes) -> nn.Module:
    return hf.RTDetrForObjectDetection(hf.RTDetrConfig(**(RT_DETR | changes), backbone_config=_rt_detr_resnet()))


def rt_detr_v2(method: str = "default") -> nn.Module:
    config = hf.RTDetrV2Config(**RT_DETR, backbone_config=_rt_detr_resnet(), decoder_method=method)
    return hf.RTDetrV2ForObjectDetection(config)


def rt_detr_v2_discrete() -> nn.Module:
    return rt_detr_v2("discrete")


def d_fine() -> nn.Module:
    config = hf.DFineConfig(**RT_DETR, backbone_config=_rt_detr_resnet(), decoder_n_points=[3, 6, 3], max_num_bins=8)
    return hf.DFineForObjectDetection(config)


def deimv2() -> nn.Module:
    config = hf.Deimv2Config(**RT_DETR, backbone_config=_rt_detr_resnet(), decoder_n_points=[3, 6, 3], max_num_bins=8)
    return hf.Deimv2ForObjectDetection(config)


def lw_detr() -> nn.Module:
    backbone = hf.LwDetrViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64,
        patch_size=16, num_windows=4, out_indices=[1, 2], window_block_indices=[0],
    )  # fmt: skip
    config = hf.LwDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4, num_queries=12, group_detr=2, projector_scale_factors=[2.0, 0.5],
        c2f_num_blocks=1,
    )  # fmt: skip
    return hf.LwDetrForObjectDetection(config)


def rf_detr() -> nn.Module:
    backbone = hf.RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, num_windows=2,
        out_indices=[1, 2], window_block_indices=[0],
    )  # fmt: skip
    config = hf.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4, num_queries=12, group_detr=2, c2f_num_blocks=1,
    )  # fmt: skip
    return hf.RfDetrForObjectDetection(config)


def omdet_turbo() -> nn.Module:
    config = hf.OmDetTurboConfig(
        backbone_config=_swin(), text_config=hf.CLIPTextConfig(**CLIP), image_size=64, text_projection_in_dim=16,
        apply_layernorm_after_vision_backbone=False,
        text_projection_out_dim=16, task_encoder_hidden_dim=32, class_embed_dim=16, num_queries=12,
        encoder_hidden_dim=32, vision_features_channels=[32, 32, 32], encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=4, encoder_dim_feedforward=32, decoder_hidden_dim=32, decoder_num_heads=4,
        decoder_num_layers=2, decoder_dim_feedforward=32,
    )  # fmt: skip
    return hf.OmDetTurboForObjectDetection(config)


def mask2former(**changes) -> nn.Module:
    config = hf.Mask2FormerConfig(
        **(MASKED | changes), backbone_config=_swin(1), feature_size=32, mask_feature_size=32, decoder_layers=3
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def oneformer() -> nn.Module:
    config = hf.OneFormerConfig(
        **MASKED, backbone_config=_swin(1), conv_dim=32, mask_dim=32, decoder_layers=3, query_dec_layers=1,
        task_seq_len=8, text_encoder_width=32, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=60, text_encoder_n_ctx=4, dropout=0.0,
    )  # fmt: skip
    return hf.OneFormerForUniversalSegmentation(config)


def pp_doclayout_v2() -> nn.Module:
    reading_order = {
        "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1,
        "coordinate_size": 6, "shape_size": 4, "num_classes": 5, "global_pointer_head_size": 8,
        "max_position_embeddings": 40,
    }  # fmt: skip
    config = hf.PPDocLayoutV2Config(
        **RT_DETR, backbone_config=_rt_detr_resnet(), class_thresholds=[0.5] * 5, class_order=list(range(5)),
        reading_order_config=reading_order,
    )  # fmt: skip
    return hf.PPDocLayoutV2ForObjectDetection(config)


def pp_doclayout_v3() -> nn.Module:
    config = hf.PPDocLayoutV3Config(
        **RT_DETR, backbone_config=_rt_detr_resnet(1), mask_feature_channels=[16, 16], x4_feat_dim=8, num_prototypes=8
    )
    return hf.PPDocLayoutV3ForObjectDetection(config)


def pp_doclayout_v4() -> nn.Module:
    config = hf.PPDocLayoutV4Config(**RT_DETR, backbone_config=_rt_detr_resnet(), hidden_size=32)
    return hf.PPDocLayoutV4ForObjectDetection(config)


BUILDERS = (
    deformable_detr, grounding_dino, mm_grounding_dino, rt_detr, rt_detr_v2, rt_detr_v2_discrete, d_fine, deimv2,
    lw_detr, rf_detr, omdet_turbo, mask2former, oneformer, pp_doclayout_v2, pp_doclayout_v3, pp_doclayout_v4,
)  # fmt: skip


def build(builder) -> nn.Module:
    """The model in evaluation mode, every parameter random, so that offsets, queries and heads differ."""
    torch.manual_seed(0)
    model = builder().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Keyword arguments for the model of this name: two images of 64 x 96 or 64 x 64, and a text where it reads one."""
    generator = torch.Generator().manual_seed(2)
    width = 64 if name in ("lw_detr", "rf_detr") else 96
    image = {"pixel_values": torch.randn(2, 3, 64, width, generator=generator)}
    if name in ("deformable_detr", "grounding_dino", "mm_grounding_dino"):
        mask = torch.ones(2, 64, width, dtype=torch.long)
        mask[1, 48:], mask[1, :, 80:] = 0, 0  # the second image is padded
        image["pixel_mask"] = mask
    if "grounding_dino" in name:
        return image | {"input_ids": torch.tensor([[101, 50, 1012, 60, 1012, 102]] * 2)}
    if name == "omdet_turbo":
        words, mask = torch.tensor([[1, 7, 59], [1, 9, 59]]), torch.ones(4, 3, dtype=torch.long)
        return image | {
            "classes_input_ids": words.repeat(2, 1), "classes_attention_mask": mask, "tasks_input_ids": words,
            "tasks_attention_mask": mask[:2], "classes_structure": torch.tensor([2, 2]),
        }  # fmt: skip
    if name == "oneformer":
        return image | {"task_inputs": torch.randint(0, 60, (2, 8), generator=generator)}
    return image
