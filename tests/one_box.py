"""A detector whose answers are known, for tests of what comes after the model."""

from pathlib import Path

import torch
from torch import nn

from detr import Detector
from detr.presets import preset

CONFIG = preset("tiny", image_size=32, max_size=48)
CATEGORIES = {3: "ant", 90: "zebra"}


class OneBoxAQuarter(nn.Module):
    """Always sees an ant of score 0.8 in the middle and a zebra of score 0.3 in the upper left quarter."""

    def __init__(self):
        super().__init__()
        self.shapes, self.seen = [], []
        self.nothing = nn.Parameter(torch.zeros(()))  # on the CPU

    def forward(self, images, mask):
        assert not mask.any()
        self.shapes.append(tuple(images.shape))
        self.seen.append(images)
        scores = torch.tensor([[[0.8, 0.01], [0.02, 0.3]]]).repeat(len(images), 1, 1)
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]]).repeat(len(images), 1, 1)
        return {"logits": scores.logit(), "boxes": boxes}


def detector_of(model, config=CONFIG):
    return Detector(model, config, CATEGORIES, Path("a.pt"), {})
