"""One run over several processes that torchrun started: who this one is, and the little that they tell each other."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from detr.errors import ProcessError

T = TypeVar("T")


# others wait this long while the first process checks data or computes an average precision
PATIENCE = timedelta(days=7)
_objects: dist.ProcessGroup | None = None  # for Python objects, on the CPU


def join(device: torch.device) -> torch.device:
    """Join the processes of this run, if torchrun started it; the device of this process.

    On GPUs they talk by NCCL, and each takes the GPU of its local rank; on CPUs by gloo.
    """
    global _objects
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _objects = dist.new_group(backend="gloo", timeout=PATIENCE)
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Within it this process has joined the others, see `join`; nothing is done where it had joined before."""
    before = dist.is_initialized()
    yield join(device)
    if not before:
        leave()


def leave() -> None:
    """Undo `join`."""
    global _objects
    if dist.is_initialized():
        dist.destroy_process_group()
    _objects = None


@contextlib.contextmanager
def one_line_for_lost_processes() -> Iterator[None]:
    """What a process sees of the end of another one, as an error of one line.

    Raises:
        ProcessError: a message to or from another process failed, or torchrun, which saw it first, ends this one.
    """
    if world_size() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to send it, and the line has to be written
        raise ProcessError(
            f"process {rank()}: another process of this run has ended, and with it this one; its message says why"
        ) from error
    signal.signal(signal.SIGTERM, before)


def _end(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise ProcessError(
        f"process {rank()}: ended from outside (SIGTERM), as after the end of another process of its run"
    )


class StopOnSignal:
    """Whether SIGINT or SIGTERM came: what `Run.train` asks before each step, and sooner nobody listens.

    With the first question these signals are taken over, so that a run ends after its step; a second one acts as ever.
    `close` gives them back.
    """

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __call__(self) -> bool:
        if not self.before and threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self.received

    def _note(self, number: int, _frame: Any) -> None:
        self.received = True
        signal.signal(number, self.before[number])

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def add_up(tensor: Tensor) -> Tensor:
    """`tensor`, replaced by its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_objects)
    return values


def gather_on_main(value: T) -> list[T] | None:
    """The values of all processes on the main one, None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, group=_objects)
    return values


def wait() -> None:
    """Until all processes have come here."""
    gather(None)


def from_main(compute: Callable[[], T]) -> T:
    """What `compute` gives on the main process, which alone calls it, on all of them."""
    values = [compute() if is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=_objects)
    return values[0]
