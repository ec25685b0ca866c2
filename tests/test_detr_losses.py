"""Matcher and criterion against the formulas in plain Python loops, with every assignment tried."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from detr.losses import Criterion
from detr.matcher import Matcher
from detr.presets import preset

WEIGHTS = {"cost_class": 1.5, "cost_bbox": 4.0, "cost_giou": 3.0, "loss_ce": 1.2, "loss_bbox": 6.0, "loss_giou": 0.7}
TWO_LAYERS = {"dec_layers": 2, "denoising": 0}
FOCAL = preset("tiny", two_stage=False, **TWO_LAYERS, **WEIGHTS)
TWO_STAGE = preset("tiny", focal_alpha=0.3, **TWO_LAYERS)
VARIFOCAL = preset("tiny", class_loss="varifocal", loss_ce=0.8, **TWO_LAYERS)
SOFTMAX = preset("tiny", two_stage=False, class_loss="softmax", eos_weight=0.2, **TWO_LAYERS)
K, N = 3, 5


def make_prediction(n_images: int, n_boxes: int, columns: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_images, n_boxes, columns, generator=generator)
    boxes = torch.rand(n_images, n_boxes, 4, generator=generator) * 0.5 + 0.1
    return {"logits": logits.requires_grad_(), "boxes": boxes.requires_grad_()}


def make_targets(*counts: int, seed: int = 7) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(K, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.5 + 0.1,
        }
        for n in counts
    ]


def make_outputs(n_images: int, config, seed: int = 0) -> dict:
    columns = K + (config.class_loss == "softmax")
    outputs = make_prediction(n_images, N, columns, seed)
    outputs["aux"] = [make_prediction(n_images, N, columns, seed + 1)]
    if config.two_stage:
        outputs["proposals"] = make_prediction(n_images, 2 * N, columns, seed + 2)
    return outputs


def giou(a: torch.Tensor, b: torch.Tensor, function=generalized_box_iou) -> float:
    corners = (box_convert(box[None], "cxcywh", "xyxy") for box in (a, b))
    return function(*corners).item()


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return giou(a, b, box_iou)


def pair_cost(logits, box, label, target_box, config) -> float:
    if config.class_loss == "softmax":
        class_cost = -logits.softmax(-1)[label].item()
    else:
        p = torch.sigmoid(logits[label]).item()
        alpha = config.focal_alpha
        class_cost = alpha * (1 - p) ** 2 * -math.log(p) - (1 - alpha) * p**2 * -math.log(1 - p)
    l1 = (box - target_box).abs().sum().item()
    return config.cost_class * class_cost + config.cost_bbox * l1 - config.cost_giou * giou(box, target_box)


def best_assignment(logits, boxes, target, config) -> dict[int, int]:
    """Object of each matched box, by trying every assignment."""
    n_boxes, n_objects = len(boxes), len(target["labels"])
    cost = np.array(
        [
            [pair_cost(logits[i], boxes[i], target["labels"][j], target["boxes"][j], config) for j in range(n_objects)]
            for i in range(n_boxes)
        ]
    )
    if n_objects <= n_boxes:
        choices = (
            list(zip(q, range(n_objects), strict=True)) for q in itertools.permutations(range(n_boxes), n_objects)
        )
    else:
        choices = (list(zip(range(n_boxes), t, strict=True)) for t in itertools.permutations(range(n_objects), n_boxes))
    return dict(min(choices, key=lambda pairs: sum(cost[i, j] for i, j in pairs)))


def expected_losses(prediction, targets, config, num_boxes) -> list[float]:
    """Weighted loss_ce, loss_bbox and loss_giou."""
    ce = ce_weight = bbox = giou_loss = 0.0
    for b, target in enumerate(targets):
        logits, boxes = prediction["logits"][b].detach(), prediction["boxes"][b].detach()
        objects = best_assignment(logits, boxes, target, config)
        for i in range(len(boxes)):
            label = int(target["labels"][objects[i]]) if i in objects else K
            if config.class_loss == "softmax":
                weight = config.eos_weight if label == K else 1.0
                ce += -weight * logits[i].log_softmax(-1)[label].item()
                ce_weight += weight
            else:
                for k in range(K):
                    p = torch.sigmoid(logits[i, k]).item()
                    if config.class_loss == "varifocal":
                        quality = iou(boxes[i], target["boxes"][objects[i]]) if k == label else 0.0
                        entropy = -quality * math.log(p) - (1 - quality) * math.log(1 - p)
                        ce += (quality if k == label else 0.75 * p**2) * entropy
                    elif k == label:
                        ce += config.focal_alpha * (1 - p) ** 2 * -math.log(p)
                    else:
                        ce += (1 - config.focal_alpha) * p**2 * -math.log(1 - p)
            if i in objects:
                target_box = target["boxes"][objects[i]]
                bbox += (boxes[i] - target_box).abs().sum().item()
                giou_loss += 1 - giou(boxes[i], target_box)
    ce /= ce_weight if config.class_loss == "softmax" else num_boxes
    return [config.loss_ce * ce, config.loss_bbox * bbox / num_boxes, config.loss_giou * giou_loss / num_boxes]


@pytest.mark.parametrize(
    "config", [FOCAL, TWO_STAGE, VARIFOCAL, SOFTMAX], ids=["focal", "two_stage", "varifocal", "softmax"]
)
def test_every_loss_by_the_formula(config):
    targets = make_targets(3, 0, 1, 6)  # none, and more objects than boxes
    outputs = make_outputs(4, config)
    total, losses = Criterion(config, K)(outputs, targets)
    expected = {"": (outputs, targets), "_0": (outputs["aux"][0], targets)}
    if config.two_stage:
        # the first stage has one class
        one_class = [{"labels": 0 * target["labels"], "boxes": target["boxes"]} for target in targets]
        expected["_enc"] = (outputs["proposals"], one_class)
    names = [f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in expected]
    assert sorted(losses) == sorted(names) and list(losses) == Criterion(config, K).names
    for suffix, (prediction, wanted) in expected.items():
        values = [losses[f"loss_{kind}{suffix}"].item() for kind in ("ce", "bbox", "giou")]
        assert values == pytest.approx(expected_losses(prediction, wanted, config, num_boxes=10), rel=1e-5)
    assert total.item() == pytest.approx(sum(value.item() for value in losses.values()), rel=1e-6)
    total.backward()
    for prediction, _ in expected.values():
        assert prediction["logits"].grad.abs().sum() > 0 and prediction["boxes"].grad.abs().sum() > 0
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize("config", [FOCAL, SOFTMAX], ids=["focal", "softmax"])
def test_images_share_nothing_but_the_counts(config):
    targets = make_targets(3, 2)
    outputs = make_outputs(2, config)
    criterion = Criterion(config, K)
    together = criterion(outputs, targets)[0]
    counts = sum(criterion.counts(targets[b : b + 1], N) for b in range(2))
    assert counts.tolist() == pytest.approx([5, 5 + 5 * config.eos_weight])
    parts = []
    for b in range(2):
        only = {key: outputs[key][b : b + 1] for key in ("logits", "boxes")}
        only["aux"] = [{key: value[b : b + 1] for key, value in outputs["aux"][0].items()}]
        parts.append(criterion(only, targets[b : b + 1], counts)[0])
    torch.testing.assert_close(together, sum(parts))
    torch.testing.assert_close(criterion(outputs, targets, 2 * counts)[0], together / 2)


@pytest.mark.parametrize(
    "config", [FOCAL, TWO_STAGE, VARIFOCAL, SOFTMAX], ids=["focal", "two_stage", "varifocal", "softmax"]
)
def test_batch_without_objects(config):
    outputs = make_outputs(2, config)
    total, losses = Criterion(config, K)(outputs, make_targets(0, 0))
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    assert losses["loss_ce"].item() == pytest.approx(
        expected_losses(outputs, make_targets(0, 0), config, 1)[0], rel=1e-5
    )
    total.backward()
    # connected to every output, or distributed training waits for gradients that never come
    assert outputs["boxes"].grad is not None and (outputs["boxes"].grad == 0).all()
    assert outputs["logits"].grad.abs().sum() > 0


def test_autocast_leaves_losses_in_float32():
    outputs, targets = make_outputs(2, FOCAL), make_targets(3, 1)
    expected = Criterion(FOCAL, K)(outputs, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = Criterion(FOCAL, K)(outputs, targets)
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_matcher_solves_every_layer_and_image():
    generator = np.random.default_rng(0)
    costs = [generator.random(shape, dtype=np.float32) for shape in ((3, 4, 5, 6), (1, 4, 8, 6))]
    sizes = [2, 0, 6, 4]
    matches = Matcher()([torch.from_numpy(cost) for cost in costs], sizes)
    for cost, match in zip(costs, matches, strict=True):
        R, B, N, _ = cost.shape
        assert match.query.shape == match.target.shape == (R, sum(min(size, N) for size in sizes))
        for r, b in itertools.product(range(R), range(B)):
            here = match.image == b
            query, target = match.query[r][here].numpy(), match.target[r][here].numpy()
            assert len(set(query)) == len(set(target)) == min(sizes[b], N)
            block = cost[r, b, :, : sizes[b]].T if sizes[b] <= N else cost[r, b, :, : sizes[b]]
            best = min(
                sum(block[i, j] for i, j in enumerate(columns))
                for columns in itertools.permutations(range(block.shape[1]), block.shape[0])
            )
            assert cost[r, b, query, target].sum() == pytest.approx(best, rel=1e-5)


def test_costs_that_are_not_finite_come_last_and_are_counted():
    cost = torch.tensor([[9.0, 1.0], [2.0, 8.0], [7.0, 7.0]]).expand(1, 2, 3, 2).clone()
    cost[0, 0, 0, 1] = torch.nan
    cost[0, 1, 1, 0] = -torch.inf
    matcher = Matcher()
    with pytest.warns(RuntimeWarning, match="matching cost: 2 entries not finite, 2 so far"):
        (match,) = matcher([cost], [2, 2])
    assert matcher.nonfinite == 2
    pairs = list(zip(match.image.tolist(), match.query[0].tolist(), match.target[0].tolist(), strict=True))
    # image 0: without (0, 1) the best is 2 + 7; image 1: without (1, 0) it is 1 + 7
    assert pairs == [(0, 1, 0), (0, 2, 1), (1, 0, 1), (1, 2, 0)]


def test_costs_that_are_all_nan_still_give_a_match():
    with pytest.warns(RuntimeWarning, match="matching cost: 6 entries"):
        (match,) = Matcher()([torch.full((1, 1, 3, 2), torch.nan)], [2])
    assert match.query.shape == (1, 2) and set(match.target[0].tolist()) == {0, 1}
