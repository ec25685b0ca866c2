"""Deformable DETR: train on your own boxes, and use what was trained.

    import detr

    detector = detr.train("my_data", minutes=10, out="runs/first")  # or detr.load("runs/first")
    found = detector.predict("photo.jpg")
    print(found)

The names below are all that is public; what is in the modules may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

from detr.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DetrError,
    DownloadError,
    MissingPackageError,
    NotFiniteError,
    OutputError,
    TrainingError,
)

if TYPE_CHECKING:
    from detr.config import Config
    from detr.detections import Detection, Detections
    from detr.detector import Detector, Metrics, load
    from detr.presets import PRESETS
    from detr.training import train

# public name -> its module, imported when the name is first asked for: with PyTorch `detr --help` would take seconds
_HOMES = {
    "Config": "detr.config",
    "Detection": "detr.detections",
    "Detections": "detr.detections",
    "Detector": "detr.detector",
    "Metrics": "detr.detector",
    "PRESETS": "detr.presets",
    "load": "detr.detector",
    "train": "detr.training",
}

__all__ = [
    "PRESETS",
    "ArgumentError",
    "CheckpointError",
    "Config",
    "DataError",
    "Detection",
    "Detections",
    "Detector",
    "DetrError",
    "DownloadError",
    "Metrics",
    "MissingPackageError",
    "NotFiniteError",
    "OutputError",
    "TrainingError",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detr' has no attribute {name!r}")
    from detr.packages import check_packages

    check_packages()
    globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
