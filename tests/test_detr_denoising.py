"""Noised boxes that the decoder corrects beside its queries: where they lie, who sees them, and what they cost."""

import math

import pytest
import torch

from detr.boxes import cxcywh_to_xyxy, iou_and_generalized_iou
from detr.data import DetectionDataset, TrainingStream
from detr.losses import Criterion, noised_boxes
from detr.model import build_model
from detr.presets import preset
from detr.run import Run
from detr.splits import load_split
from detr.synth import write_dataset
from detr.transformer import unseen_by_each_other
from detr.transforms import noised, training_transform

torch.set_num_threads(1)  # test processes share the cores
CPU = torch.device("cpu")
SMALL = {"d_model": 32, "n_heads": 2, "ffn_dim": 32, "n_queries": 8, "image_size": 64, "max_size": 64, "batch_size": 2}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_dataset(root, 9, 1, 64, 0)
    return load_split(root, "train")


@pytest.mark.parametrize(("objects", "most", "count"), [(3, 24, 24), (5, 24, 20), (30, 24, 30), (1, 1, 1), (0, 24, 0)])
def test_copies_of_all_objects_near_them(objects, most, count):
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(objects, 2), torch.rand(objects, 2) * 0.5 + 0.1], 1)
    near = noised(boxes, most)
    assert near.shape == (count, 4) and near.dtype == boxes.dtype
    for i, box in enumerate(near):
        of = boxes[i % objects]
        inside = (box > 0.005) & (box < 0.995)
        off, factor = (box - of)[:2] / of[2:], (box / of)[2:]
        assert (off.abs() <= 0.25 + 1e-6)[inside[:2]].all()
        assert (factor.log().abs() <= 0.5 + 1e-6)[inside[2:]].all()


def test_noise_stays_within_what_a_sigmoid_can_move():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1e-6, 1e-6], [0.5, 0.5, 1.0, 1.0], [0.99, 0.01, 0.02, 0.02]])
    near = noised(boxes, 400)
    assert near.min() == pytest.approx(0.005) and near.max() == pytest.approx(0.995)


def test_the_noise_is_even():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.2]])
    near = noised(boxes, 4000)
    iou = iou_and_generalized_iou(cxcywh_to_xyxy(near), cxcywh_to_xyxy(boxes))[0]
    assert 0.53 < iou.mean() < 0.545 and iou.min() > 0.29  # 0.537 and 0.293 of 4 million
    log = (near[:, 2:] / boxes[:, 2:]).log()
    torch.testing.assert_close(near[:, :2].mean(0), boxes[0, :2], rtol=0, atol=0.005)
    torch.testing.assert_close(log.mean(0), torch.zeros(2), rtol=0, atol=0.02)
    torch.testing.assert_close(log.std(0), torch.full((2,), 1 / math.sqrt(12)), rtol=0.05, atol=0)


@pytest.mark.parametrize("selection", ["pure", "mixed"])
def test_queries_do_not_see_noised_boxes_nor_these_each_other(selection):
    torch.manual_seed(0)
    model = build_model(preset("tiny", **SMALL, query_selection=selection), 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    near = torch.rand(2, 5, 4) * 0.5 + 0.2
    given, layers = {}, []
    decoder = model.transformer.decoder
    decoder.register_forward_pre_hook(lambda module, args: given.update(target=args[0]))
    decoder.register_forward_hook(lambda module, args, output: layers.append(output[1]))
    alone, beside = model(images, mask), model(images, mask, near)
    if selection == "mixed":  # the content of the best proposal
        assert torch.equal(given["target"][:, -5:], model.query_embed.weight[0].expand(2, 5, -1))
    assert torch.equal(beside["denoised"], torch.stack([boxes[:, -5:] for boxes in layers[1]]))
    for one, other in zip([alone, *alone["aux"]], [beside, *beside["aux"]], strict=True):
        for name in ("logits", "boxes"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
    assert beside["denoised"].shape == (3, 2, 5, 4) and "denoised" not in alone
    assert (beside["denoised"][0] - near).abs().max() > 0.01  # they are corrected, if by random weights
    for n in (1, 0):
        fewer = model(images, mask, near[:, :n])["denoised"]
        torch.testing.assert_close(fewer, beside["denoised"][:, :, :n], rtol=1e-5, atol=1e-5)


def test_who_is_unseen():
    query, first, second = [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]
    assert unseen_by_each_other(2, 2, CPU).int().tolist() == [query, query, first, second]


def slow_loss(denoised, targets, objects):
    """Box by box, in float64."""
    l1 = giou = 0.0
    for boxes in denoised.double():
        for b, target in enumerate(targets):
            T, N = len(target["boxes"]), len(target["noised"])
            for j in range(N):
                box, wanted = boxes[b, j], target["boxes"][j % T].double()
                l1 += (box - wanted).abs().sum() / (N // T)
                corners = cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted)
                giou += (1 - iou_and_generalized_iou(*corners)[1]) / (N // T)
    return 5 * l1 / objects, 2 * giou / objects


def test_the_loss_of_noised_boxes():
    torch.manual_seed(0)
    config = preset("tiny", **SMALL, denoising=6)
    model = build_model(config, 3)
    targets = []
    for T in (2, 0, 7, 1):
        boxes = torch.cat([torch.rand(T, 2), torch.rand(T, 2) * 0.5 + 0.1], 1)
        targets.append({"labels": torch.randint(3, (T,)), "boxes": boxes, "noised": noised(boxes, config.denoising)})
    near = noised_boxes(targets)
    assert near.shape == (4, 7, 4)
    for b, target in enumerate(targets):
        assert torch.equal(near[b, : len(target["noised"])], target["noised"])
    outputs = model(torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.bool), near)
    criterion = Criterion(config, 3)
    total, terms = criterion(outputs, targets)
    for name, wanted in zip(("loss_bbox_dn", "loss_giou_dn"), slow_loss(outputs["denoised"], targets, 10), strict=True):
        torch.testing.assert_close(terms[name].double(), wanted.detach(), rtol=1e-5, atol=0)
    without, others = criterion({name: x for name, x in outputs.items() if name != "denoised"}, targets)
    torch.testing.assert_close(total, without + terms["loss_bbox_dn"] + terms["loss_giou_dn"])
    assert others == terms | {"loss_bbox_dn": 0, "loss_giou_dn": 0} and list(others) == list(terms) == criterion.names
    # what stands for padding gets no gradient
    gradient = torch.autograd.grad(total, outputs["denoised"])[0]
    real = torch.arange(7) < torch.tensor([len(target["noised"]) for target in targets])[:, None]
    assert (gradient[:, ~real] == 0).all() and (gradient[:, real] != 0).any(-1).all()


def test_steps_with_and_without_objects_have_the_same_terms(split):
    run = Run(preset("tiny", **SMALL, steps=3), split, CPU)
    batches = next(run.batches())
    assert all("noised" in target for _, _, targets in batches for target in targets)
    assert math.isfinite(run.step(batches).loss)
    names = set(run.sums)
    assert {"loss_bbox_dn", "loss_giou_dn"} < names
    [(images, mask, targets)] = batches
    empty = [target | {name: target[name][:0] for name in ("labels", "boxes", "noised")} for target in targets]
    run.sums.clear()
    assert math.isfinite(run.step([(images, mask, empty)]).loss)
    assert set(run.sums) == names and run.sums["loss_bbox_dn"] == 0


def test_one_stage_has_none(split):
    run = Run(preset("tiny", two_stage=False, **SMALL, steps=3), split, CPU)
    batches = next(run.batches())
    assert run.config.denoising and not any("noised" in target for _, _, targets in batches for target in targets)
    run.step(batches)
    assert not any(name.endswith("_dn") for name in run.sums)


def test_noise_is_a_function_of_seed_and_sample(split):
    config = preset("tiny", **SMALL)
    dataset = DetectionDataset(split, training_transform(config), (64, 64))
    plain, stream = (TrainingStream(dataset, 3, denoising=n) for n in (0, 5))
    ranks = [TrainingStream(dataset, 3, batch=2, rank=rank, world=2, denoising=5) for rank in range(2)]
    seen = set()
    for n in range(18, 26):
        image, target = stream[n]
        assert torch.equal(image, plain[n][0]) and torch.equal(target["boxes"], plain[n][1]["boxes"])
        of_rank = ranks[n // 2 % 2][n // 4 * 2 + n % 2][1]
        assert torch.equal(target["noised"], of_rank["noised"])
        seen.add(target["noised"].flatten().tolist()[0])
    assert len(seen) == 8
