"""A trained detector for a program of one's own: from a file of weights to boxes, metrics and exported models."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from detr import checkpoint, resume
from detr.arguments import check_arguments, check_names, path_of
from detr.checkpoint import written_by
from detr.config import FORMATS, MAX_DETS, Config
from detr.data import collate, validation_loader
from detr.detections import Detections
from detr.devices import device_of
from detr.errors import ArgumentError, CheckpointError
from detr.evaluate import evaluate, per_class_table
from detr.export import export_model
from detr.images import as_picture, reading_of, to_tensor
from detr.model import DeformableDETR, first_not_finite
from detr.output import WRITTEN_BY, claim_file, make_parent, whole
from detr.postprocess import postprocess
from detr.splits import dataset_of, hold_out_of, load_to_evaluate
from detr.transforms import evaluation_transform, resize
from detr.weights import export_weights

BY = "Detector.save"
THRESHOLD = 0.5
_KEPT = ("averaged", "steps_done", "metrics", "data")  # of a checkpoint, beside its weights

K = TypeVar("K")


class Metrics(dict):
    """Metrics by name, see `Detector.evaluate`. As text they are tables for people."""

    table: str

    def __str__(self) -> str:
        return f"{self.table}\n{per_class_table(self)}"


class Detector:
    """A trained detector; `detr.load` and `detr.train` make it.

    Attributes:
        classes: names of the classes, in the order of labels: 0, 1, ...
        category_ids: the ids that they have in the dataset of the training.
        config: all fields of the run, a `detr.Config`.
        model: the `torch.nn.Module`, in evaluation mode.
        device: where it is.
        path: the file that it was loaded from.
        metrics: of the evaluation that the file was kept for, or None.
        stopped: `detr.train` was stopped before the end of the run.
    """

    def __init__(
        self, model: DeformableDETR, config: Config, categories: dict[int, str], path: Path, about: dict[str, Any]
    ) -> None:
        self.model, self.config, self.path = model.eval(), config, path
        self._categories, self._about = categories, about
        self.stopped = False

    @property
    def classes(self) -> list[str]:
        return list(self._categories.values())

    @property
    def category_ids(self) -> list[int]:
        return list(self._categories)

    @property
    def metrics(self) -> dict[str, Any] | None:
        return self._about.get("metrics")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return f"Detector({self.config.name}, {len(self.classes)} classes: {names}; {self.path}, on {self.device})"

    def predict(self, images: Any, threshold: float | None = None, batch_size: int = 1) -> Any:
        """Detect objects.

        Args:
            images: an image, or a list of images of any kinds: the path of a file; a PIL image; an array [H, W, 3] of
                uint8 (red, green, blue: turn those of OpenCV by `image[..., ::-1]`); a tensor [3, H, W] of uint8 or of
                floats from 0 to 1, not normalised. Grey images and those with transparency are converted, files and
                PIL images turned as their EXIF orientation says. Any size: the model's own is made of it here.
            threshold: lowest score of an object, 0 to 1; None is 0.5.
            batch_size: most images of one size that the model gets at a time.

        Returns:
            `Detections`, or for a list a list of them, in its order.

        Raises:
            DataError: something is no image, or cannot be read; names it. ArgumentError: names the argument.
            NotFiniteError: the model gives no numbers.
        """
        check_arguments(threshold=threshold, batch_size=batch_size)
        single = not isinstance(images, list | tuple)
        given = [images] if single else images
        names = ["image"] if single else [f"images[{i}]" for i in range(len(given))]
        pictures = ((i, as_picture(image, names[i])) for i, image in enumerate(given))
        found = dict(self.stream(pictures, threshold, batch_size))
        for i, each in found.items():
            each.source = given[i]
        return found[0] if single else [found[i] for i in range(len(given))]

    def stream(
        self, pictures: Iterable[tuple[K, Image.Image]], threshold: float | None = None, batch_size: int = 1
    ) -> Iterator[tuple[K, Detections]]:
        """Detect objects in any number of images, which need not fit into memory together.

        Args:
            pictures: a key and an RGB picture for each; the key is the source of its detections.
            threshold, batch_size: as of `predict`.

        Yields:
            The key and the detections of each. With a batch size above 1 images wait for others of their size, and
            come in another order.
        """
        check_arguments(threshold=threshold, batch_size=batch_size)
        threshold = THRESHOLD if threshold is None else threshold
        waiting: dict[tuple[int, ...], list[tuple[K, tuple[int, int], Tensor]]] = defaultdict(list)
        for key, picture in pictures:
            pixels = load_pixels(picture, self.config)
            batch = waiting[pixels.shape]
            batch.append((key, picture.size, pixels))
            # not too many of them wait in memory
            if sum(map(len, waiting.values())) >= 8 * batch_size:
                batch = max(waiting.values(), key=len)
            elif len(batch) < batch_size:
                continue
            yield from self._detect(batch, threshold)
            batch.clear()
        for batch in waiting.values():
            for i in range(0, len(batch), batch_size):
                yield from self._detect(batch[i : i + batch_size], threshold)

    def _detect(
        self, batch: list[tuple[K, tuple[int, int], Tensor]], threshold: float
    ) -> Iterator[tuple[K, Detections]]:
        """The detections on images of one size in the model, so that none is padded and none changes another's."""
        images, mask, _ = collate([(pixels, {}) for *_, pixels in batch])
        with torch.inference_mode():
            outputs = self.model(images.to(self.device), mask.to(self.device))
        sizes = torch.tensor([(height, width) for _, (width, height), _ in batch], device=self.device)
        for (key, size, _), found in zip(batch, postprocess(outputs, sizes), strict=True):
            xyxy, scores, labels = (found[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
            shown = scores.astype(float) >= threshold
            yield key, Detections(xyxy[shown], scores[shown], labels[shown], self._categories, size, key)

    def evaluate(
        self,
        data: str | Path,
        split: str = "val",
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        format: str | None = None,
        classes: list[str] | None = None,
        val_fraction: float | None = None,
        split_seed: int | None = None,
        exif: str | None = None,
        large_images: bool = False,
        batch_size: int | None = None,
        max_dets: int = MAX_DETS,
        workers: int | None = None,
    ) -> Metrics:
        """COCO's average precision on a split of a dataset, as `detr eval` computes it.

        Args:
            data: folder of the dataset, or its data.yaml. split: "train", "val", "test", ...
            annotations, images: of the split, a json and a folder of images, if their names are others than usual.
            format, classes, val_fraction, split_seed, exif, large_images, workers: as of `detr.train`.
            batch_size: images of one size at once; None is as in the training.
            max_dets: most detections of an image that count, the best ones.

        Returns:
            A dict: AP, AP50, AP75, APS, ... (0 to 1, or None without ground truth of the kind), "per_class", "images",
            and more. Printed, it is COCO's table and one of the classes; and before them a line, if the split had to be
            held out of the training images.

        Raises:
            DataError: the dataset cannot be read, or has other classes; names file and entry. ArgumentError: names the
            argument.
        """
        numbers = {"val_fraction": val_fraction, "split_seed": split_seed, "batch_size": batch_size}
        check_arguments(**numbers, max_dets=max_dets, workers=workers, format=format, exif=exif)
        flags = {"data": path_of("data", data), "format": format, "classes": check_names("classes", classes), **numbers}
        dataset = dataset_of(flags, {split: (annotations, images)})
        before = hold_out_of(resume.known(self._about))
        reading = reading_of({"exif": exif, "large_images": large_images})
        found, said = load_to_evaluate(dataset, split, self._categories, reading, hold_out_of(flags), before)
        val = validation_loader(found, self.config, self.device, workers, batch_size)
        metrics, table = evaluate(self.model, val, self.device, max_dets)
        result = Metrics(metrics)
        result.table = f"{said}\n{table}" if said else table
        return result

    def export(self, path: str | Path, to: str, size: tuple[int, int] | None = None, attention: str = "plain") -> Path:
        """Write the detector for other code, as `detr export` does.

        Args:
            path: a file, or for "hf" a folder.
            to: the whole model: "onnx", "torch-export" (a .pt2 file of torch.export) or "aoti" (a .pt2 package that
                AOTInductor compiles for this CPU). Its weights: "official" (a file of the original repository) or "hf"
                (a folder for Hugging Face).
            size: (H, W) of the padded images that a whole model takes, pixels; None is `config.image_size`, twice.
            attention: of ONNX only: "plain" operators, or "tensorrt" or "mmdeploy": one node for their plugin.

        Returns:
            The path of the file.

        Raises:
            ArgumentError: names the argument that does not fit. MissingPackageError: names the package.
            CheckpointError: a weight is not a number. OutputError: a file is in the way that detr did not write.
        """
        path = path_of("path", path)
        if to not in ("official", "hf", *FORMATS):
            raise ArgumentError(f"to: expected one of official, hf, {', '.join(FORMATS)}, got {to!r}")
        fault = first_not_finite(self.model.state_dict())
        if fault:
            raise CheckpointError(f"{self.path}: {fault}")
        model = self.model
        if self.device.type != "cpu":
            model = checkpoint.model_of(self._content(), self.path)[0].eval()
        if to not in FORMATS:
            return export_weights(model, path, to, self.classes)
        try:
            height, width = size or (self.config.image_size, self.config.image_size)
        except (TypeError, ValueError):
            raise ArgumentError(f"size: expected (H, W), got {size!r}") from None
        for side in (height, width):
            check_arguments(size=side)
        return export_model(model, path, to, (height, width), self.classes, attention)

    def save(self, path: str | Path) -> Path:
        """Write the detector to one file, which `detr.load` and every command takes.

        Raises:
            OutputError: there is something at `path` that `Detector.save` did not write.
        """
        path = path_of("path", path)
        claim_file(path, BY, written_by)
        make_parent(path)
        with whole(path, durable=True) as file:
            torch.save(self._content() | {WRITTEN_BY: BY}, file)
        return path

    def _content(self) -> dict[str, Any]:
        """What a checkpoint holds, with the weights as they are now."""
        weights = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        classes = {"class_names": self.classes, "category_ids": self.category_ids}
        return {"config": self.config.to_dict(), **classes, "model": weights, **self._about}


def load(path: str | Path, device: Any = None) -> Detector:
    """The detector in a file of weights, or in the folder of a run.

    Args:
        path: best.pt or checkpoint.pt of a run, a file of `Detector.save`, or the folder of a run, of which best.pt is
            taken, the step with the best AP, or before the first evaluation checkpoint.pt. Where a run averaged its
            weights they are the averaged ones.
        device: "cpu", "cuda:1" or a torch.device; None is a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another program; nothing in it is executed.
        ArgumentError: there is no such device here.
    """
    device = device_of(device)
    path = path_of("path", path)
    file = checkpoint.file_of(path)
    return detector_of(checkpoint.load(file), file, device)


def detector_of(content: dict[str, Any], file: Path, device: torch.device) -> Detector:
    """The detector in a checkpoint that was loaded from a file."""
    model, config = checkpoint.model_of(content, file)
    about = {name: content[name] for name in _KEPT if name in content}
    return Detector(model.to(device), config, checkpoint.classes_of(content), file, about)


def load_pixels(picture: Image.Image, config: Config) -> Tensor:
    """The image [3, H, W] that the model of `config` sees."""
    pixels = resize(to_tensor(picture), config.image_size, config.max_size)
    return evaluation_transform()(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))[0]
