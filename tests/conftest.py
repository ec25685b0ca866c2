"""Without a GPU the kernels run in Triton's interpreter, chosen here before the first kernel is decorated."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

import pytest
from interpreter import patch_the_language_once_a_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_the_language_once_a_launch()

# transformers 5 needs Python 3.11; the rest of the suite does not
NEED_TRANSFORMERS = ["test_detr_weights.py", "test_shims_transformers.py"]
collect_ignore = [] if importlib.util.find_spec("transformers") else NEED_TRANSFORMERS


def pytest_report_header() -> list[str]:
    return [f"left out, for want of transformers: {name}" for name in collect_ignore]


def pytest_collection_modifyitems(config, items) -> None:
    """Without a GPU the tests marked `gpu` are left out."""
    if not torch.cuda.is_available():
        out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch) -> None:
    """Memory that a kernel forgets to write reads as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() and x.numel() else x

    monkeypatch.setattr(torch, "empty", poisoned)
