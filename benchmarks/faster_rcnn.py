"""torchvision's Faster R-CNN with a feature pyramid, from random weights: the peer that the small detector is beside.

It sees what `detr train` gives its models: the same images, sizes, augmentation, batches, evaluation and minutes.

    python -m benchmarks.faster_rcnn --data FOLDER --minutes 4 --seed 0
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from benchmarks.learning import CSV, after_nms, best_thresholds, detections_of_each_object, duplicates, write_row
from detr.backbone import build_backbone
from detr.boxes import cxcywh_to_xyxy
from detr.config import Config
from detr.data import DetectionDataset, TrainingStream, make_loader, validation_loader
from detr.evaluate import coco_metrics
from detr.presets import preset
from detr.splits import load_split
from detr.transforms import early, training_transform

LR, MOMENTUM, DECAY = 0.02, 0.9, 1e-4
WARMUP = 100
CHANNELS, FEATURES = 128, 256
BODIES = ("resnet18", "small")


class Pyramid(nn.Module):
    """A feature pyramid on one of BODIES: torchvision's ResNet-18, or the small backbone of our own preset `tiny`."""

    out_channels = CHANNELS

    def __init__(self, body: str, config: Config):
        super().__init__()
        if body == "resnet18":
            stages = {f"layer{i}": str(i) for i in range(1, 5)}
            self.body, channels = create_feature_extractor(resnet18(weights=None), stages), [64, 128, 256, 512]
        else:
            self.body = build_backbone(config)
            channels = self.body.channels
        self.fpn = FeaturePyramidNetwork(channels, CHANNELS, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        features = features.values() if isinstance(features, dict) else features
        return self.fpn({str(i): feature for i, feature in enumerate(features)})


def build(num_classes: int, config: Config, body: str) -> FasterRCNN:
    """The model, made for small images and a CPU: with torchvision's own numbers a step takes several times as long.

    Its anchors are of 0.1 to 1.6 times the shorter side (body "small": 0.15 to 1.5); a pyramid of 128 channels instead
    of 256; 64 boxes of an image in a step instead of 512, and 256 features of each instead of 1024; 300 proposals
    instead of 1000 and more.
    """
    parts = (0.1, 0.2, 0.4, 0.8, 1.6) if body == "resnet18" else (0.15, 0.35, 0.75, 1.5)
    sizes = tuple((config.image_size * part,) for part in parts)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return FasterRCNN(
        Pyramid(body, config),
        min_size=config.image_size,
        max_size=config.max_size,
        # images arrive normalised and resized
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_test=300,
        box_head=TwoMLPHead(CHANNELS * 7**2, FEATURES),
        box_predictor=FastRCNNPredictor(FEATURES, num_classes + 1),
        box_batch_size_per_image=64,
        box_detections_per_img=100,
        box_score_thresh=0.001,
    )


def unpadded(images: Tensor, mask: Tensor) -> list[Tensor]:
    """The images of a batch, each at its own size."""
    sizes = zip((~mask[:, :, 0]).sum(1).tolist(), (~mask[:, 0]).sum(1).tolist(), strict=True)
    return [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]


def wanted(images: list[Tensor], targets: list[dict]) -> list[dict]:
    """Targets as torchvision's: corners in pixels, and classes from 1."""
    found = []
    for image, target in zip(images, targets, strict=True):
        scale = torch.tensor([image.shape[2], image.shape[1]] * 2)
        found.append({"boxes": cxcywh_to_xyxy(target["boxes"]) * scale, "labels": target["labels"] + 1})
    return found


def evaluated(model: FasterRCNN, loader: torch.utils.data.DataLoader) -> dict[str, float]:
    """What `benchmarks.learning` says of our own models, except `AP_train`."""
    model.eval()
    detections = {}
    with torch.inference_mode():
        for images, mask, targets in loader:
            images = unpadded(images, mask)
            for image, target, found in zip(images, targets, model(images), strict=True):
                height, width = target["orig_size"].tolist()
                scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
                detections[target["image_id"]] = {
                    "boxes": found["boxes"] * scale,
                    "scores": found["scores"],
                    "labels": found["labels"] - 1,
                }
    model.train()
    split = loader.dataset.split
    metrics = coco_metrics(split, detections)[0]
    return {name: metrics[name] for name in ("AP", "AP50", "AP75")} | {
        "AP_nms": coco_metrics(split, after_nms(detections))[0]["AP"],
        "duplicates": duplicates(detections, best_thresholds(metrics)),
        "detections_of_an_object": detections_of_each_object(detections, split),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="training with its evaluation (%(default)s)")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--body", choices=BODIES, default=BODIES[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    config = preset("tiny", image_size=options.image_size, max_size=2 * options.image_size, seed=options.seed)
    train, val = (load_split(options.data, name) for name in ("train", "val"))
    device = torch.device("cpu")
    torch.manual_seed(options.seed)
    model = build(len(train.class_names), config, options.body)
    dataset = DetectionDataset(train, training_transform(config), (config.image_size, config.max_size))
    loader = validation_loader(val, config, device)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    start = time.perf_counter()
    evaluated(model, loader)
    of_evaluation = time.perf_counter() - start
    B = config.batch_size
    stream = TrainingStream(dataset, options.seed, B, group=B, early=early(config))
    start, end = time.perf_counter(), 60 * options.minutes - of_evaluation
    step = 0
    for images, mask, targets in make_loader(stream, (range(i * B, (i + 1) * B) for i in range(10**6)), device):
        # the schedule follows the clock, or the steps
        done = step / options.steps if options.steps else (time.perf_counter() - start) / end
        if done >= 1:
            break
        rate = LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = unpadded(images, mask)
        loss = sum(model(images, wanted(images, targets)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        step += 1
    of_step = (time.perf_counter() - start) / step
    row = {"data": options.data.name, "model": f"faster_rcnn {options.body}", "seed": options.seed}
    row |= {"threads": options.threads, "minutes": "" if options.steps else options.minutes}
    write_row(options.csv, row | {"steps": step, "seconds_per_step": of_step} | evaluated(model, loader))


if __name__ == "__main__":
    main()
