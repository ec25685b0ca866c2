"""From the images and boxes of a split to batches: the torch datasets, the collate function and the loaders."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr.config import Config
from detr.errors import DataError
from detr.images import for_each, read_image, to_tensor
from detr.split import Split
from detr.transforms import evaluation_transform, noised, resize, resized_size

# resized images are kept in memory if all of a split take no more than this
CACHE_BYTES = 1 << 30
# images that are tried, one after the other, in the place of one that cannot be read
SUBSTITUTES = 20


class DetectionDataset(Dataset):
    """Item i: (image [3, H, W] as `transform` makes it, target) of image i of the split.

    The target has "labels" [T] int64, "boxes" [T, 4] cxcywh in [0, 1], "image_id" int and "orig_size" [2] int64 (h, w);
    crowds are not in it.

    Args:
        transform: (uint8 image [3, H, W], boxes [T, 4] xyxy pixels, labels) -> (float image, boxes, labels).
        resize_to: None, or (shortest side, longest side): images are brought to this size first, and are kept in memory
            as uint8 if all of them fit into CACHE_BYTES. Decoding then happens here, once, and files that cannot be
            read are tried again when their item is wanted.
        blank_unreadable: a file that cannot be read when its item is wanted gives a black image without boxes, and
            "unreadable" in its target says why.

    Raises:
        DataError: when the item of a damaged image file is wanted.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable,
        resize_to: tuple[int, int] | None = None,
        blank_unreadable: bool = False,
    ) -> None:
        self.split = split
        self.blank_unreadable = blank_unreadable
        self.transform = transform
        self.resize_to = resize_to
        self.cache: list[Tensor | None] | None = None  # None where a file cannot be read
        pixels = sum(height * width for height, width in self.sizes(range(len(self))))
        if resize_to is not None and 3 * pixels <= CACHE_BYTES:
            found = for_each(self._read, range(len(self)), f"reading {split.image_dir}")
            self.cache = [None if isinstance(pixels, DataError) else pixels for pixels in found]

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is started to load images: it reads them itself. One that is forked shares the memory."""
        return self.__dict__ | {"cache": None}

    def _read(self, index: int) -> Tensor:
        image = self.split.images[index]
        try:
            pixels = to_tensor(read_image(image.path, (image.width, image.height), self.split.reading))
        except DataError as error:
            where = "".join(f"{part}: " for part in self.split.place(index) if part and part != str(image.path))
            raise DataError(f"{where}{image.path}: {error}") from None
        return pixels if self.resize_to is None else resize(pixels, *self.resize_to)

    def __len__(self) -> int:
        return len(self.split.images)

    def sizes(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """(height, width) of images before their transform, in pixels, without reading them."""
        sizes = (self.split.images.sizes[index, ::-1].tolist() for index in indices)
        return [tuple(resized_size(*size, *self.resize_to)) if self.resize_to else size for size in sizes]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self.item(index, self.transform)

    def item(self, index: int, transform: Callable) -> tuple[Tensor, dict[str, Any]]:
        """The item with another transform."""
        image = self.split.images[index]
        orig_size = torch.tensor([image.height, image.width])
        try:
            kept = self.cache and self.cache[index]
            pixels = self._read(index) if kept is None else kept
        except DataError as error:
            if not self.blank_unreadable:
                raise
            nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "orig_size": orig_size}
            blank = torch.zeros(3, *self.sizes([index])[0])
            return blank, nothing | {"image_id": image.image_id, "unreadable": [str(error)]}
        height, width = pixels.shape[-2:]
        scale = torch.tensor([width / image.width, height / image.height] * 2)
        real = ~image.crowd
        pixels, boxes, labels = transform(pixels, image.boxes[real] * scale, image.labels[real])
        height, width = pixels.shape[-2:]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        boxes = torch.cat([centres, boxes[:, 2:] - boxes[:, :2]], 1) / torch.tensor([width, height] * 2)
        return pixels, {"labels": labels, "boxes": boxes, "image_id": image.image_id, "orig_size": orig_size}


class TrainingStream(Dataset):
    """The endless sequence of training samples: epoch after epoch, each a new permutation of `dataset`.

    Sample n is a function of (seed, n) alone, its augmentation included: it does not depend on the number of workers or
    processes or on where a run was interrupted. A loader over `range(a, b)` continues any run. An image that cannot be
    read is replaced by the next one of its epoch, and "unreadable" in the target says why.

    Args:
        batch: images that a process takes at a time. rank, world: with several processes each one has a stream of its
            own, batch after batch dealt out to them in turn: together they see what one process would.
        early: the transform of the first passes over the images, and how many these are.
        denoising: if not 0, "noised" in a target has boxes near its objects, see `detr.transforms.noised`.
        group: if not 1, so many samples in a row are all tall or all not, and so are padded less in a batch; what fills
            no group comes last in the epoch.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        seed: int,
        batch: int = 1,
        rank: int = 0,
        world: int = 1,
        group: int = 1,
        early: tuple[Callable | None, int] = (None, 0),
        denoising: int = 0,
    ) -> None:
        self.dataset = dataset
        self.seed, self.denoising = seed, denoising
        self.batch, self.rank, self.world, self.group, self.early = batch, rank, world, group, early
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        mine, i = divmod(index, self.batch)
        n = (mine * self.world + self.rank) * self.batch + i
        epoch, position = divmod(n, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, 0, epoch))
            order = torch.randperm(len(self.dataset), generator=generator).numpy()
            if self.group > 1:
                first = -epoch * len(order) % self.group  # these end a group of the epoch before
                rest = order[first:]
                height, width = np.array(self.dataset.sizes(rest)).reshape(-1, 2).T
                rest = in_groups(rest, height > width, self.group, generator)
                order = np.concatenate([order[:first], rest])
            self._epoch, self._order = epoch, order
        # torchvision's transforms draw from the global CPU generator; torch.manual_seed would reset the GPU's too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, 1, n))
            return self._readable(position)

    def _readable(self, position: int) -> tuple[Tensor, dict[str, Any]]:
        """The sample at this position of the epoch, or the first after it that can be read."""
        unreadable = []
        for shift in range(min(SUBSTITUTES, len(self.dataset))):
            try:
                index = int(self._order[(position + shift) % len(self.dataset)])
                transform, passes = self.early
                image, target = self.dataset.item(index, transform) if self._epoch < passes else self.dataset[index]
                if self.denoising:
                    target["noised"] = noised(target["boxes"], self.denoising)
            except DataError as error:
                unreadable.append(str(error))
            else:
                return image, target | ({"unreadable": unreadable} if unreadable else {})
        raise DataError(f"{len(unreadable)} images one after the other cannot be read, the first: {unreadable[0]}")


def in_groups(order: np.ndarray, tall: np.ndarray, size: int, generator: torch.Generator) -> np.ndarray:
    """`order` as groups of `size` that are all tall or all not, in random order; at the end what fills no group."""
    groups, left = [], []
    for kind in (order[tall], order[~tall]):
        full = len(kind) // size * size
        groups += list(kind[:full].reshape(-1, size))
        left.append(kind[full:])
    shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return np.concatenate([*shuffled, *left])


def seed_of(*numbers: int) -> int:
    """64 random bits from integers: neighbouring samples must not start from neighbouring states of a generator."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Images [B, 3, H, W] padded with zeros at the right and bottom, mask [B, H, W] (True = padding), targets."""
    images, targets = zip(*samples, strict=True)
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.float32)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask, list(targets)


def same_size_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Batches of indices whose images have one size, so that none is padded: each result is that of the image alone."""
    by_size = defaultdict(list)
    for index, size in enumerate(sizes):
        by_size[size].append(index)
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


class Loader(DataLoader):
    """Batches of `collate`. Between processes targets are arrays: each of their tensors would keep a file open."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Any]]]]:
        with _signals_held() if self.num_workers else contextlib.nullcontext():
            batches = super().__iter__()  # starts the processes
        for images, mask, targets in batches:
            yield images, mask, [_map(target, np.ndarray, torch.from_numpy) for target in targets]


def _collate_arrays(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    images, mask, targets = collate(samples)
    return images, mask, [_map(target, Tensor, Tensor.numpy) for target in targets]


def _map(target: dict[str, Any], kind: type, function: Callable) -> dict[str, Any]:
    return {name: function(value) if isinstance(value, kind) else value for name, value in target.items()}


def make_loader(
    dataset: DetectionDataset | TrainingStream,
    batches: Iterable[Sequence[int]],
    device: torch.device,
    workers: int | None = None,
) -> Loader:
    """A loader of collated batches.

    Args:
        batches: the indices of each batch, in order.
        workers: processes that prepare samples; None is none where the images are in memory, else one a CPU, at most 8.
    """
    if workers is None:
        source = dataset.dataset if isinstance(dataset, TrainingStream) else dataset
        workers = min(8, os.cpu_count() or 1) if source.cache is None else 0
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate_arrays,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
        # the loader would draw a seed from the global generator, which a resumed run has to find unchanged
        generator=torch.Generator(),
        # processes of a fork server, the default of Python 3.14, have its mask of signals and not ours
        multiprocessing_context="spawn" if workers and multiprocessing.get_start_method() == "forkserver" else None,
    )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM for this thread wait; processes that are started here block both too, until they are ready."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # unblocks these signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_worker: int) -> None:
    # a terminal sends Ctrl-C to all processes, and a scheduler SIGTERM; the parent still needs batches to end its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with_the_parent() -> None:
    """End this process when its parent sends SIGTERM or is gone, which PyTorch misses while this process starts."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        came = signal.sigtimedwait({signal.SIGTERM}, 2.0)
        if came is not None and came.si_pid == parent.pid:
            break
    os._exit(0)


def validation_loader(
    split: Split,
    config: Config,
    device: torch.device,
    workers: int | None = None,
    batch_size: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Loader:
    """The images of a split at the size of `config`, batches of one size.

    An image file that cannot be read becomes a black image, and "unreadable" in its target says why.

    Args:
        batch_size: images at a time; None takes as many as a process has at a time in training.
        share: (rank, world): of `world` processes that divide the batches among them, those of process `rank`.
    """
    dataset = DetectionDataset(
        split, evaluation_transform(), (config.image_size, config.max_size), blank_unreadable=True
    )
    rank, world = share
    batch_size = batch_size or max(1, config.batch_size // config.accumulated_batches(world) // world)
    batches = same_size_batches(dataset.sizes(range(len(dataset))), batch_size)
    return make_loader(dataset, batches[rank::world], device, workers)
