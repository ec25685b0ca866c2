"""`python -m msda_triton`: versions, devices, the backend of each and why, an accuracy check, what can be patched."""

import importlib.metadata
import platform
import sys

import torch

import msda_triton
from msda_triton.functional import TRITON_DEVICES
from msda_triton.shims.patching import installed_packages

SHAPES = [(12, 9), (6, 5)]
# largest error allowed against float64, relative to the largest result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU and every GPU that PyTorch sees."""
    found = [torch.device("cpu")]
    for kind in (*TRITON_DEVICES, "mps"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            found += [torch.device(kind, i) for i in range(backend.device_count())]
    return found


def device_name(device: torch.device) -> str:
    if device.type in TRITON_DEVICES:
        return getattr(torch, device.type).get_device_name(device)
    return platform.processor() or platform.machine()


def backend_of(device: torch.device) -> tuple[str, str]:
    """The backend that "auto" takes for tensors on the device, and why."""
    if device.type not in TRITON_DEVICES:
        return "torch", f"Triton compiles for {' and '.join(TRITON_DEVICES)} devices only"
    if version("triton") == "not installed":
        return "torch", "triton is not installed (pip install triton)"
    return "triton", "Triton compiles for it"


def attention_errors(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest error of the output and of the gradients against float64, each relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    S = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, S, 2, 32, generator=generator).to(dtype)
    locations = torch.rand(2, 40, 2, 2, 4, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 40, 2, 2, 4, generator=generator).to(dtype)
    results = []
    for place, kind, backend in ((device, None, "auto"), (torch.device("cpu"), torch.float64, "torch")):
        inputs = [x.to(place, kind or x.dtype).requires_grad_() for x in (value, locations, weights)]
        out = msda_triton.ms_deform_attn(inputs[0], SHAPES, *inputs[1:], backend=backend)
        grads = torch.autograd.grad(out.sum(), inputs)
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(*results, strict=True)]
    return errors[0], max(errors[1:])


def main() -> int:
    """Print the report; 0 if every device passed, else 1."""
    print(f"msda_triton {msda_triton.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "triton", "numpy", "torchvision")))
    failed = []
    for device in devices():
        backend, why = backend_of(device)
        print(f"{device} ({device_name(device)}): backend {backend!r}, because {why}")
        for dtype, tolerance in TOLERANCE.items():
            forward, backward = attention_errors(device, dtype)
            good = max(forward, backward) <= tolerance
            failed += [] if good else [f"{device} {dtype}"]
            errors = f"error forward {forward:.1e}, backward {backward:.1e} (at most {tolerance:.0e})"
            print(f"  {dtype!s:15} {errors}: {'ok' if good else 'WRONG'}")
    print("packages that msda_triton.patch() can run on these backends:")
    for package, there in installed_packages():
        print(f"  {package:30} {there}")
    if failed:
        print(f"Something is wrong on {', '.join(failed)}: use backend='torch' there, and report this output.")
        return 1
    print("All is well.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
