"""A GPU that Triton believes in: kernels are compiled for it and looked up as there, and launched nowhere.

Tensors live on the CPU. What is left of a call is what it costs the host, and which kernel it would have launched with
which arguments. For processes without TRITON_INTERPRET=1.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver


class Launch(NamedTuple):
    """What reached the driver."""

    kernel: str  # its name
    binary: int  # which of its compiled variants: a hash of the code
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple  # of the kernel, constants included


class FakeDriver:
    """Stands for `triton.runtime.driver.active`.

    Attributes:
        launches: the launches since `record` was set, oldest first. record: whether to keep them; off, as that takes
            time. device: the number of the device that is the current one.
    """

    def __init__(self, capability: int = 90):
        self.capability = capability
        self.launches: list[Launch] = []
        self.record = False
        self.device = 0
        self.binaries: dict[int, tuple[str, int]] = {}  # by what stands for their address
        self.utils = self

    # what Triton asks of a driver
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> ModuleType:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @staticmethod
    def is_active() -> bool:
        return True

    # and of its utilities
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        address = 16 * (1 + len(self.binaries))
        self.binaries[address] = name, hash((kernel, device))
        handles = 1, address, 64, 0, 1024  # module, function, registers, spills, threads
        # older versions of Triton do not ask for the last
        return handles if "n_max_threads" in CompiledKernel._init_handles.__code__.co_names else handles[:4]

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source, metadata):
        return self._launch

    def _launch(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        if self.record:
            self.launches.append(Launch(*self.binaries[function], (x, y, z), stream, arguments))


def _parsed(target: GPUTarget, options):
    return make_backend(target).parse_options(dict(options or {}))


class NotCompiled(CompiledKernel):
    """What Triton would have compiled, known by all that it would have compiled it from."""

    def __init__(self, fake: FakeDriver, source, options):
        self.src, self.name, self.hash = source, source.name, source.hash() + options.hash()
        self.metadata = self.packed_metadata = None
        self.module, self.function = None, 16 * (1 + len(fake.binaries))
        self._run = fake._launch
        fake.binaries[self.function] = self.name, hash((self.hash, fake.device))

    def _init_handles(self) -> None:
        pass

    @property
    def run(self):
        return self._run


def install(package: str = "msda_triton", fake: FakeDriver | None = None, compiling: bool = True) -> FakeDriver:
    """Make the kernels of a package run on a fake GPU.

    Tensors are the CPU's, and integer tensors count as the GPU's, whose content the host does not know.

    Args:
        package: this one, or an older one under another name. fake: the driver of an earlier call.
        compiling: whether kernels are compiled, or only told apart: thousands of them in seconds.
    """
    fake = fake or FakeDriver()
    driver.set_active(fake)
    if not compiling:
        triton.compiler.compile = lambda source, target, options, **_: NotCompiled(
            fake, source, _parsed(target, options)
        )
    functional = importlib.import_module(f"{package}.functional")
    functional.TRITON_DEVICES = ("cuda", "xpu", "cpu")
    try:
        plan = importlib.import_module(f"{package}.kernels.plan")
    except ModuleNotFoundError:  # before there was one
        plan = importlib.import_module(f"{package}.tuning")
    plan.architecture = lambda device: f"sm_{fake.capability}"
    if hasattr(functional, "_integers"):  # until ccff825
        known = functional._integers
        functional._integers = lambda name, x, *rest: (
            (x, None) if isinstance(x, torch.Tensor) else known(name, x, *rest)
        )
    else:
        importlib.import_module(f"{package}.checks").on_host = lambda x: False
        importlib.import_module(f"{package}.op")._has_kernels = lambda device: True
    return fake
