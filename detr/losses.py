"""The set loss: classification, L1 and generalised IoU, on every decoder layer and proposal."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from detr.boxes import cxcywh_to_xyxy, iou_and_generalized_iou
from detr.config import Config
from detr.matcher import Match, Matcher, matching_cost

NAMES = ("loss_ce", "loss_bbox", "loss_giou")
VARIFOCAL_ALPHA = 0.75  # weight of the negatives (arXiv 2008.13367, section 3.2)


class Criterion:
    """Loss of a model's outputs. Every decoder layer, and the first stage, is matched to the objects on its own.

    Shapes as in `detr.matcher`. Computed in float32 whatever the autocast state.

    `names` are its terms, which follow from the config alone: loss_ce, loss_bbox and loss_giou of the last layer; with
    a suffix _0, _1, ... those of the layers before, with _enc those of the proposals, and with _dn the sums over all
    layers of loss_bbox and loss_giou of noised boxes, which have no loss_ce.
    """

    def __init__(self, config: Config, num_classes: int):
        self.config, self.num_classes = config, num_classes
        self.matcher = Matcher()
        self.denoising = config.two_stage and config.denoising > 0
        layers = [f"_{l}" for l in range(config.dec_layers - 1)] if config.aux_loss else []
        suffixes = [*layers, "", *(["_enc"] if config.two_stage else [])]
        self.names = [name + suffix for name in NAMES for suffix in suffixes]
        self.names += ["loss_bbox_dn", "loss_giou_dn"] if self.denoising else []

    def counts(self, targets: list[dict], n_queries: int) -> Tensor:
        """What the losses of a batch are divided by, [2] on the CPU: its objects, and the class weights of its queries.

        Counts of several batches can be added up. The second is for the softmax loss, a weighted mean over queries.
        """
        sizes = [len(target["labels"]) for target in targets]
        matched = sum(min(size, n_queries) for size in sizes)
        unmatched = len(sizes) * n_queries - matched
        return torch.tensor([float(sum(sizes)), matched + self.config.eos_weight * unmatched])

    def __call__(
        self, outputs: dict, targets: list[dict], counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its weighted terms.

        Args:
            outputs: of the model.
            targets: a dict for each image, on the same device: labels [T] int64 in 0 .. K - 1, and boxes [T, 4] as
                (cx, cy, w, h) in [0, 1]; T may be 0. "noised" too if the model was given `noised_boxes` of them.
            counts: divides the sums over boxes, and for softmax those over queries. None takes `counts` of this batch;
                where gradients are added up over batches or averaged over processes, give the sum or mean of theirs.
        Returns:
            The total, and its terms without gradient, in the order of `names`; those of noised boxes are zero where the
            model was given none.
        """
        if counts is None:
            counts = at_least_one(self.counts(targets, outputs["boxes"].shape[1]))
        counts = counts.to(outputs["boxes"].device)
        sizes = [len(target["labels"]) for target in targets]
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
        # padding never matches; boxes of ones keep its costs finite
        boxes = pad_sequence([target["boxes"].float() for target in targets], batch_first=True, padding_value=1.0)

        groups = [(_stack([*outputs["aux"], outputs]), labels)]
        if self.config.two_stage:
            groups.append((_stack([outputs["proposals"]]), torch.zeros_like(labels)))  # the first stage has one class

        with torch.autocast(outputs["boxes"].device.type, enabled=False):
            with torch.no_grad():
                costs = [matching_cost(*prediction, labels, boxes, self.config) for prediction, labels in groups]
            matches = self.matcher(costs, sizes)
            terms = [
                self._terms(*prediction, labels, boxes, match, counts)
                for (prediction, labels), match in zip(groups, matches, strict=True)
            ]
            terms = torch.cat(terms, 1).flatten()  # [3 * R of all groups]
            if self.denoising:
                given = "denoised" in outputs
                more = self._denoising_terms(outputs["denoised"], targets, counts) if given else terms.new_zeros(2)
                terms = torch.cat([terms, more])
        return terms.sum(), dict(zip(self.names, terms.detach().unbind(), strict=True))

    def _terms(
        self,
        logits: Tensor,
        boxes: Tensor,
        labels: Tensor,
        target_boxes: Tensor,
        match: Match,
        counts: Tensor,
    ) -> Tensor:
        """Weighted loss_ce, loss_bbox and loss_giou [3, R] of matched predictions [R, B, N, ...]."""
        R = logits.shape[0]
        r = torch.arange(R, device=logits.device)[:, None]
        # the class of each box, the one past the last where nothing is matched
        classes = labels.new_full(logits.shape[:3], self.num_classes)
        classes[r, match.image, match.query] = labels[match.image, match.target]
        predicted, wanted = boxes[r, match.image, match.query].float(), target_boxes[match.image, match.target]
        iou, of_boxes = self._box_terms(predicted, wanted, counts)
        if self.config.class_loss == "softmax":
            weight = logits.new_ones(self.num_classes + 1)
            weight[-1] = self.config.eos_weight
            entropy = F.cross_entropy(logits.float().movedim(-1, 1), classes, weight, reduction="none")
            loss_ce = entropy.flatten(1).sum(1) / counts[1]
        else:
            one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].float()
            if self.config.class_loss == "varifocal":
                quality = logits.new_zeros(logits.shape[:3], dtype=torch.float32)
                quality[r, match.image, match.query] = iou.detach()
                loss_ce = varifocal_loss(logits.float(), one_hot, quality[..., None])
            else:
                loss_ce = sigmoid_focal_loss(logits.float(), one_hot, self.config.focal_alpha, gamma=2)
            loss_ce = loss_ce.flatten(1).sum(1) / counts[0]
        return torch.cat([self.config.loss_ce * loss_ce[None], of_boxes])

    def _box_terms(
        self, predicted: Tensor, wanted: Tensor, counts: Tensor, weight: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """IoU [R, n] of boxes [R, n, 4] to those wanted, and weighted loss_bbox and loss_giou [2, R]."""
        iou, giou = iou_and_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        loss_bbox = (weight * (predicted - wanted).abs().sum(2)).sum(1) / counts[0]
        loss_giou = (weight * (1 - giou)).sum(1) / counts[0]
        return iou, torch.stack([self.config.loss_bbox * loss_bbox, self.config.loss_giou * loss_giou])

    def _denoising_terms(self, boxes: Tensor, targets: list[dict], counts: Tensor) -> Tensor:
        """Weighted loss_bbox and loss_giou [2], sums over R layers, of what became of noised boxes, [R, B, D, 4].

        Each belongs to the object that it was made from. All copies of an object together weigh as much as a query.
        """
        copies = [len(target["noised"]) // max(1, len(target["boxes"])) for target in targets]
        wanted = [target["boxes"].float().repeat(n, 1) for target, n in zip(targets, copies, strict=True)]
        weight = [each.new_full(each.shape[:1], 1 / max(1, n)) for each, n in zip(wanted, copies, strict=True)]
        predicted = [boxes[:, b, : len(each)] for b, each in enumerate(wanted)]
        predicted, wanted, weight = torch.cat(predicted, 1).float(), torch.cat(wanted)[None], torch.cat(weight)
        return self._box_terms(predicted, wanted, counts, weight)[1].sum(1)


def noised_boxes(targets: list[dict]) -> Tensor | None:
    """What the model takes as `noised`, [B, D, 4]: of all targets, padded; None if they have none."""
    if "noised" not in targets[0]:
        return None
    return pad_sequence([target["noised"] for target in targets], batch_first=True, padding_value=0.5)


def at_least_one(counts: Tensor) -> Tensor:
    """`Criterion.counts` of a whole batch with one object if it has none: what can be divided by."""
    return torch.maximum(counts, counts.new_tensor([1.0, 1e-6]))


def varifocal_loss(logits: Tensor, one_hot: Tensor, quality: Tensor) -> Tensor:
    """Varifocal loss (arXiv 2008.13367, equation 2): the score of a matched box learns its IoU, `quality`.

    logits and one_hot: [..., K]; quality: [..., 1], used where one_hot is 1. The result has the shape of logits.
    """
    negative = VARIFOCAL_ALPHA * logits.detach().sigmoid() ** 2
    target = quality * one_hot
    weight = torch.where(one_hot > 0, target, negative)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")


def _stack(predictions: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [R, B, N, K] and boxes [R, B, N, 4] of R predictions."""
    return torch.stack([p["logits"] for p in predictions]), torch.stack([p["boxes"] for p in predictions])
