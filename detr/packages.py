"""The packages that the detector needs beside the operator: the extra `detr` of pyproject.toml."""

import importlib.util

from detr.errors import MissingPackageError

# as they are imported
PACKAGES = (
    *("torchvision", "numpy", "scipy", "pycocotools", "PIL", "matplotlib", "tqdm", "tensorboard", "safetensors"),
    *("filelock", "yaml", "defusedxml"),
)


def check_packages() -> None:
    """Make sure that they are installed; none is imported.

    Raises:
        MissingPackageError: names those that are not, and how to install them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"not installed: {', '.join(missing)}: pip install '.[detr]'")
