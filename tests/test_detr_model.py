"""The model: published sizes, the original's initialisation, and the properties that its parts must have."""

import math

import pytest
import torch

from detr.boxes import inverse_sigmoid
from detr.learner import Learner, param_groups
from detr.losses import Criterion
from detr.model import GroupNorm, build_model
from detr.presets import PRESETS, preset
from detr.transformer import Transformer

VARIANTS = {
    "plain_references": {"refine": False},
    "refine": {},
    "two_stage": {"two_stage": True},
    "mixed": {"two_stage": True, "query_selection": "mixed", "proposal_nms": 0.6, "backbone": "small"},
    "five_levels": {"n_levels": 5},
    "single_scale": {"n_levels": 1, "refine": False},
    "own_level_only": {"own_level_only": True},
    "one_point": {"enc_points": 1, "dec_points": 1},
    "plain_detr": {"attention": "global", "n_levels": 1, "refine": False, "class_loss": "softmax"},
    "plain_detr_focal": {"attention": "global", "n_levels": 1, "refine": False},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return preset("tiny", **{"two_stage": False} | VARIANTS[request.param])


def make_batch(*sizes: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of these (height, width), padded as the collate function does."""
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    images = torch.zeros(len(sizes), 3, height, width)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for b, (h, w) in enumerate(sizes):
        images[b, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[b, :h, :w] = False
    return images, mask


def perturb(model: torch.nn.Module) -> None:
    """Move every tensor off its initial value, zeros and shared biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# millions of parameters, as the original's code has them; DETR-DC5+ was not released: 200 queries and no "no object"
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deformable_detr_r50_single_scale", 34.07),
        ("deformable_detr_r50_single_scale_dc5", 34.07),
        ("deformable_detr_r50", 40.07),
        ("deformable_detr_r50_refine", 40.85),
        ("deformable_detr_r50_two_stage", 41.18),
        ("detr_r50", 41.52),
        ("detr_r50_dc5", 41.52),
        ("detr_r50_dc5_plus", 41.58),
    ],
)
def test_parameter_counts_and_frozen_layers(name, millions):
    config = preset(name, pretrained_backbone=False)
    with torch.device("meta"):
        model = build_model(config, num_classes=91)
    counts = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert round(sum(counts.values()) / 1e6, 2) == millions
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(key.startswith(("backbone.body.conv1", "backbone.body.layer1")) for key in frozen)
    assert (len(frozen), sum(counts[key] for key in frozen)) == (11, 222_400)
    buffers = {key: buffer.numel() for key, buffer in model.named_buffers()}
    assert all(".bn" in key or ".downsample.1." in key for key in buffers)
    assert sum(buffers.values()) == 106_240


def test_tiny_is_tiny():
    assert (
        sum(parameter.numel() for parameter in build_model(preset("tiny", two_stage=False), 3).backbone.parameters())
        == 457_872
    )


@pytest.mark.parametrize("two_stage", [False, True])
def test_param_groups_have_the_rates_of_the_original(two_stage):
    name = "deformable_detr_r50_two_stage" if two_stage else "deformable_detr_r50"
    config = preset(name, pretrained_backbone=False)
    with torch.device("meta"):
        model = build_model(config, 91)
    groups = {group["name"]: group for group in param_groups(model, config)}
    assert {key: group["lr"] for key, group in groups.items()} == pytest.approx(
        {"rest": 2e-4, "backbone": 2e-5, "offsets": 2e-5}
    )
    assert len(groups["offsets"]["params"]) == (24 if two_stage else 26)
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(listed) == sorted(trainable)
    backbone = {id(parameter) for parameter in model.backbone.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in groups["backbone"]["params"]} == backbone


def test_rate_zero_freezes_the_backbone():
    config = preset("tiny", two_stage=False, lr_backbone=0)
    model = build_model(config, 3)
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    Learner(model, config)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert [group["name"] for group in param_groups(model, config)] == ["rest", "offsets"]


@pytest.mark.parametrize("name", ["refine", "plain_references", "two_stage"])
def test_initialisation_of_the_original(name):
    config = preset("tiny", **{"two_stage": False} | VARIANTS[name], d_model=128, enc_layers=2)
    model = build_model(config, num_classes=4)
    prior = -math.log(0.99 / 0.01)
    n_heads = config.dec_layers + config.two_stage
    assert len(model.class_embed) == len(model.bbox_embed) == n_heads
    assert len(set(model.class_embed)) == len(set(model.bbox_embed)) == (n_heads if config.refine else 1)
    for l, (class_head, bbox_head) in enumerate(zip(model.class_embed, model.bbox_embed, strict=True)):
        assert (class_head.bias == torch.tensor(prior)).all()
        assert (bbox_head.layers[-1].weight == 0).all()
        size = -2.0 if not config.two_stage and (l == 0 or not config.refine) else 0.0
        assert bbox_head.layers[-1].bias.tolist() == [0, 0, size, size]

    transformer = model.transformer
    ring = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # four heads
    ring = ring[:, None, None] * torch.arange(1.0, 3)[:, None]
    for attention in (transformer.encoder.layers[0].self_attn, transformer.decoder.layers[1].cross_attn):
        bias = attention.sampling_offsets.bias.view(4, config.n_levels, 2, 2)
        torch.testing.assert_close(bias, ring.expand_as(bias), atol=1e-6, rtol=0)
        for parameter in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()):
            assert (parameter == 0).all()
        assert (attention.value_proj.bias == 0).all() and (attention.output_proj.bias == 0).all()

    assert transformer.level_embed.std().item() == pytest.approx(1, abs=0.15)
    if not config.two_stage:
        assert model.query_embed.weight.std().item() == pytest.approx(1, abs=0.05)
        assert (transformer.reference_points.bias == 0).all()
    # xavier: uniform with variance 2 / (fan in + fan out)
    matrices = {
        "linear1": transformer.encoder.layers[0].linear1.weight,
        "linear2": transformer.decoder.layers[0].linear2.weight,
        "in_proj": transformer.decoder.layers[0].self_attn.in_proj_weight,
        "value_proj": transformer.encoder.layers[1].self_attn.value_proj.weight,
        "projection": model.input_proj[0][0].weight.flatten(1),
    }
    for key, matrix in matrices.items():
        bound = math.sqrt(6 / sum(matrix.shape))
        assert matrix.abs().max().item() == pytest.approx(bound, rel=0.01), key
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), key
    assert all((projection[0].bias == 0).all() for projection in model.input_proj)


def test_first_boxes_lie_on_the_reference_points():
    model = build_model(preset("tiny", two_stage=False, refine=False), 3)
    outputs = model(*make_batch((64, 64)))
    _, _, reference = model.transformer.learned_queries(model.query_embed.weight, 1)
    for prediction in (outputs, *outputs["aux"]):
        torch.testing.assert_close(prediction["boxes"][..., :2], reference)
        torch.testing.assert_close(prediction["boxes"][..., 2:], torch.full((1, 50, 2), 0.1192), atol=1e-4, rtol=0)


def test_outputs_and_gradients(variant):
    model = build_model(variant, num_classes=3).train()
    perturb(model)
    outputs = model(*make_batch((96, 128), (128, 64)))
    columns = 3 + (variant.class_loss == "softmax")
    predictions = [outputs, *outputs["aux"]]
    assert len(predictions) == variant.dec_layers and outputs["softmax"] == (columns == 4)
    assert ("proposals" in outputs) == variant.two_stage
    for prediction in predictions:
        assert prediction["logits"].shape == (2, 50, columns) and prediction["boxes"].shape == (2, 50, 4)
        assert ((prediction["boxes"] > 0) & (prediction["boxes"] < 1)).all()
    if variant.two_stage:
        assert outputs["proposals"]["boxes"].shape == (2, 16 * 16 + 8 * 8 + 4 * 4, 4)
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2], [0.2, 0.3, 0.1, 0.2]])},
        {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    total, _ = Criterion(variant, 3)(outputs, targets)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_without_auxiliary_losses_only_the_last_layer_is_returned():
    with_aux, without = (
        build_model(preset("tiny", two_stage=False, aux_loss=flag), 3).eval() for flag in (True, False)
    )
    without.load_state_dict(with_aux.state_dict())
    batch = make_batch((64, 96))
    expected, outputs = with_aux(*batch), without(*batch)
    assert outputs["aux"] == [] and len(expected["aux"]) == 2
    assert torch.equal(outputs["boxes"], expected["boxes"]) and torch.equal(outputs["logits"], expected["logits"])


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_of_the_feature_maps_changes_nothing(name):
    """A transformer may not see what stands in the padding, nor how much of it there is."""
    config = preset("tiny", **{"two_stage": False} | VARIANTS[name], d_model=64)
    torch.manual_seed(0)
    model = build_model(config, 3).eval()
    perturb(model)
    # the pyramid of a 256 x 128 image, alone and in a batch of 384 x 256
    strides = [2 ** (3 + l) for l in range(config.n_levels)] if config.n_levels > 1 else [8]
    alone = [torch.randn(1, 64, 256 // s, 128 // s) for s in strides]
    padded = [torch.full((1, 64, 384 // s, 256 // s), 30.0) for s in strides]
    for small, large in zip(alone, padded, strict=True):
        large[:, :, : small.shape[2], : small.shape[3]] = small
    results = []
    for features, (H, W) in ((alone, (256, 128)), (padded, (384, 256))):
        mask = torch.ones(1, H, W, dtype=torch.bool)
        mask[:, :256, :128] = False
        model._pyramid = lambda images, features=features: features
        results.append(model(torch.zeros(1, 3, H, W), mask))
    for key in ("logits", "boxes"):
        torch.testing.assert_close(results[0][key], results[1][key], atol=2e-5, rtol=1e-4)


def test_two_stage_starts_from_the_best_proposals():
    config = preset("tiny", d_model=32, n_queries=6)
    model = build_model(config, 3).eval()
    perturb(model)
    with torch.no_grad():  # score highest what stands in the place of tokens that are not usable
        blank = model.transformer.enc_output_norm(model.transformer.enc_output.bias)
        model.class_embed[-1].weight[0] = blank
    seen = {}
    model.transformer.decoder.register_forward_pre_hook(lambda module, args: seen.update(reference=args[2]))
    images, mask = make_batch((64, 96), (96, 48))
    proposals = model(images, mask)["proposals"]
    for b, (height, width) in enumerate([(64, 96), (96, 48)]):
        score, anchors = [], []
        for l, stride in enumerate((8, 16, 32)):
            for y in range(96 // stride):
                for x in range(96 // stride):
                    anchor = [(x + 0.5) * stride / width, (y + 0.5) * stride / height, 0.05 * 2**l, 0.05 * 2**l]
                    if l == 2 and width == 48:  # a map of 3 pixels holds 1.5 valid ones, rounded up to 2
                        anchor[0] = (x + 0.5) / 2
                    anchors.append(anchor)
                    usable = all(0.01 < number < 0.99 for number in anchor)
                    score.append(proposals["logits"][b, len(score), 0].item() if usable else -math.inf)
        best = torch.tensor(score).topk(6).indices
        torch.testing.assert_close(seen["reference"][b], proposals["boxes"][b][best])
        assert not seen["reference"].requires_grad
        # what is not usable is a box of the whole image, as in the original
        unusable = torch.tensor(score).isinf()
        assert proposals["logits"][b, :, 0].argmax() in unusable.nonzero()
        assert unusable.any() and (proposals["boxes"][b][unusable] == 1).all()
        # an untrained head adds nothing to the anchors
    model.bbox_embed[-1].layers[-1].weight.data.zero_()
    model.bbox_embed[-1].layers[-1].bias.data.zero_()
    boxes = model(images, mask)["proposals"]["boxes"][1]
    torch.testing.assert_close(boxes[~unusable], torch.tensor(anchors)[~unusable])


def test_the_best_proposals_are_thinned_and_filled_up():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.38], [0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.38, 0.4]])
    boxes = torch.stack([boxes, boxes.flip(0)])
    score = torch.tensor([[4.0, 3.0, 1.0, 2.0], [-1.0, -2.0, -3.0, -torch.inf]])

    def best(n_queries, nms):
        transformer = Transformer(preset("tiny", n_queries=n_queries, proposal_nms=nms))
        found = transformer._best(boxes, score)
        return [[boxes[b].tolist().index(box) for box in found[b].tolist()] for b in range(2)]

    assert best(3, 1.0) == [[0, 1, 3], [0, 1, 2]]
    # of the three that overlap the best one, then the other, then the rest of them, best first
    assert best(3, 0.7) == [[0, 2, 1], [0, 1, 2]]
    assert best(4, 0.7) == [[0, 2, 1, 3], [0, 1, 2, 3]]
    # padding overlaps nothing, and comes last all the same
    score[0, 2] = -torch.inf
    assert best(4, 0.7)[0] == [0, 1, 3, 2] and best(2, 0.7)[0] == [0, 1]
    # four candidates for each query: what stands behind seven equal boxes is still found
    boxes = torch.cat([boxes[:1, :1].expand(-1, 7, -1), boxes[:1, 2:3]], 1).expand(2, -1, -1)
    score = torch.arange(8.0, 0.0, -1).expand(2, -1)
    transformer = Transformer(preset("tiny", n_queries=2, proposal_nms=0.7))
    assert torch.equal(transformer._best(boxes, score), boxes[:, [0, 7]])


def test_mixed_queries_have_a_content_of_their_own():
    config = preset("tiny", query_selection="mixed", n_queries=30, d_model=32)
    model = build_model(config, 3).eval()
    perturb(model)
    seen = {}
    model.transformer.decoder.register_forward_pre_hook(lambda module, args: seen.update(target=args[0], pos=args[1]))
    model(*make_batch((64, 96), (96, 48)))
    assert torch.equal(seen["target"], model.query_embed.weight.expand(2, -1, -1))
    assert not torch.equal(seen["pos"][0], seen["pos"][1])
    model(*make_batch((32, 32)))  # fewer tokens than queries: 16 + 4 + 1
    assert torch.equal(seen["target"], model.query_embed.weight[None, :21])


def test_two_stage_with_fewer_tokens_than_queries():
    config = preset("tiny", n_queries=300)
    outputs = build_model(config, 3)(*make_batch((64, 64)))
    assert outputs["boxes"].shape == (1, 8 * 8 + 4 * 4 + 2 * 2, 4)
    assert outputs["boxes"].isfinite().all()
    total, _ = Criterion(config, 3)(outputs, [{"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}])
    total.backward()


def test_refinement_corrects_the_boxes_of_the_layer_before_without_a_gradient():
    model = build_model(preset("tiny", two_stage=False, dec_layers=3), 3).eval()
    perturb(model)
    decoder, states = model.transformer.decoder, []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, args, output: states.append((args[2], output)))
    outputs = model(*make_batch((64, 64)))
    boxes = [prediction["boxes"] for prediction in (*outputs["aux"], outputs)]
    assert states[0][0].shape[-1] == 2 and states[0][0].requires_grad
    for l in range(3):
        reference, hidden = states[l]
        delta = model.bbox_embed[l](hidden)
        start = inverse_sigmoid(reference)
        expected = delta + start if l else torch.cat([delta[..., :2] + start, delta[..., 2:]], -1)
        torch.testing.assert_close(boxes[l], expected.sigmoid())
        if l:
            assert torch.equal(reference, boxes[l - 1]) and not reference.requires_grad
    gradients = torch.autograd.grad(boxes[2].sum(), list(model.bbox_embed[1].parameters()), allow_unused=True)
    assert gradients == (None,) * 6


def test_own_level_only_ignores_the_other_levels():
    config = preset("tiny", two_stage=False, own_level_only=True, enc_layers=1)
    torch.manual_seed(0)
    transformer = Transformer(config).eval()
    perturb(transformer)
    mask = make_batch((64, 64), (64, 32))[1]
    features = [torch.randn(2, 64, 64 // s, 64 // s) for s in (8, 16, 32)]
    before = transformer.encode(features, mask).tokens
    features[1] = torch.randn_like(features[1])
    changed = (transformer.encode(features, mask).tokens != before).any(-1)
    sizes = [64, 16, 4]
    fine, middle, coarse = changed.split(sizes, 1)
    assert middle.all() and not fine.any() and not coarse.any()
    # and one level alone gives the same, as the attention has no parameter of a level
    single = Transformer(preset("tiny", two_stage=False, own_level_only=True, enc_layers=1, n_levels=1)).eval()
    state = transformer.state_dict()
    state["level_embed"] = state["level_embed"][:1]
    keys = [key for key in state if "cross_attn" in key]
    single.load_state_dict({key: value for key, value in state.items() if key not in keys}, strict=False)
    alone = single.encode(features[:1], mask).tokens
    torch.testing.assert_close(alone, before[:, :64])


def test_extra_levels_halve_the_last():
    model = build_model(preset("tiny", two_stage=False, n_levels=5), 3)
    levels = model._pyramid(torch.randn(2, 3, 128, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, 64, *size) for size in ((16, 12), (8, 6), (4, 3), (2, 2), (1, 1))
    ]
    assert [project[0].in_channels for project in model.input_proj] == [64, 96, 128, 128, 64]


def test_autocast_keeps_boxes_and_logits_in_float32():
    model = build_model(preset("tiny"), 3).eval()
    perturb(model)
    batch = make_batch((64, 96))
    references = []
    for layer in model.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: references.append(args[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(*batch)
    for prediction in (outputs, outputs["aux"][0], outputs["proposals"]):
        assert prediction["boxes"].dtype == prediction["logits"].dtype == torch.float32
    assert all(reference.dtype == torch.float32 for reference in references)


def test_number_of_classes_is_checked():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        build_model(PRESETS["tiny"], 0)


def test_heads_and_references_are_float32_under_autocast():
    model = build_model(preset("tiny", two_stage=False, refine=False), 3).eval()
    perturb(model)
    batch = make_batch((64, 96))
    exact = model(*batch)
    heads = [model.class_embed[0], model.bbox_embed[0], model.transformer.reference_points]
    dtypes = []
    for head in heads:
        head.register_forward_hook(lambda module, args, output: dtypes.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*batch)
    assert dtypes and set(dtypes) == {(torch.float32, torch.float32)}
    torch.testing.assert_close(rounded["boxes"], exact["boxes"], rtol=0, atol=0.02)


def test_a_map_of_one_pixel_has_a_norm():
    """With 32 channels a group has one value, which PyTorch's own module refuses."""
    x, norm, reference = torch.randn(3, 32, 2, 2), GroupNorm(32, 32), torch.nn.GroupNorm(32, 32)
    torch.nn.init.normal_(norm.bias)
    reference.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), reference(x), rtol=0, atol=0)
    torch.testing.assert_close(norm(x[:1, :, :1, :1]), norm.bias[None, :, None, None], rtol=0, atol=1e-4)
