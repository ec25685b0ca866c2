"""A trained detector for a program of one's own: from a file of weights to boxes, metrics and exported models."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor

from detr import checkpoint, resume
from detr.arguments import checked, names_of, path_of
from detr.checkpoint import written_by
from detr.config import FORMATS, MAX_DETS, Config, short
from detr.data import collate, validation_loader
from detr.detections import Detections
from detr.devices import device_of
from detr.errors import ArgumentError, CheckpointError
from detr.evaluate import evaluate, per_class_table
from detr.export import export_model
from detr.images import AnyImage, as_picture, reading_of, to_tensor
from detr.model import DeformableDETR, first_not_finite
from detr.output import WRITTEN_BY, claim_file, make_parent, whole
from detr.postprocess import postprocess
from detr.splits import dataset_of, hold_out_of, load_to_evaluate
from detr.terminal import say
from detr.transforms import evaluation_transform, resize
from detr.weights import export_weights

BY = "Detector.save"
THRESHOLD = 0.5
_KEPT = ("averaged", "steps_done", "metrics", "data")  # of a checkpoint, beside its weights

K = TypeVar("K")


class Metrics(dict):
    """Metrics by name, see `Detector.evaluate`, which makes it. As text they are tables for people."""

    table: str = ""

    def __str__(self) -> str:
        return f"{self.table}\n{per_class_table(self)}"


class Detector:
    """A trained detector; `detr.load` and `detr.train` make it.

    Attributes:
        classes: names of the classes; the label k of a detection means `classes[k]`.
        category_ids: of each class, the id in the dataset that the detector was trained on.
        config: what the model is and how it was trained, a `detr.Config`.
        model: the `torch.nn.Module`, in evaluation mode.
        device: the torch.device of the model.
        path: the file that it was loaded from.
        metrics: a dict of the evaluation after the step whose weights these are; None if there was none.
        stopped: True if `detr.train` was stopped before the end of its run.
    """

    model: DeformableDETR
    config: Config
    path: Path
    stopped: bool

    def __init__(
        self,
        model: DeformableDETR,
        config: Config,
        categories: dict[int, str],
        path: Path,
        about: dict[str, Any],
        stopped: bool = False,
    ) -> None:
        self.model, self.config, self.path, self.stopped = model.eval(), config, path, stopped
        self._categories, self._about = categories, about

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

    @overload
    def predict(
        self,
        images: AnyImage,
        threshold: float | None = None,
        batch_size: int = 1,
        *,
        exif: str | None = None,
        large_images: bool = False,
    ) -> Detections: ...

    @overload
    def predict(
        self,
        images: list[AnyImage] | tuple[AnyImage, ...],
        threshold: float | None = None,
        batch_size: int = 1,
        *,
        exif: str | None = None,
        large_images: bool = False,
    ) -> list[Detections]: ...

    def predict(
        self,
        images: Any,
        threshold: float | None = None,
        batch_size: int = 1,
        *,
        exif: str | None = None,
        large_images: bool = False,
    ) -> Any:
        """Detect objects.

        Args:
            images: an image, or a list of images of any kinds: the path of a file; a PIL image; an array [H, W, 3] of
                uint8 (red, green, blue: turn those of OpenCV by `image[..., ::-1]`); a tensor [3, H, W] of uint8 or of
                floats from 0 to 1, not normalised. Grey images and those with transparency are converted; of files and
                PIL images grey of 16 or 32 bits is mapped from its 0.5 and 99.5 percentile to 0..255. Any size: the
                model's own is made of it here.
            threshold: lowest score of an object, 0 to 1; None is 0.5.
            batch_size: most images of one size that the model gets at a time.
            exif: "turn" (None): files and PIL images are turned as their EXIF orientation says; or "ignore".
            large_images: also read files of more than 89 million pixels.

        Returns:
            `Detections`, or for a list a list of them, in its order.

        Raises:
            DataError: something is no image, or cannot be read; names it. ArgumentError: names the argument.
            NotFiniteError: the model gives no numbers.
        """
        threshold, batch_size = checked("threshold", threshold), checked("batch_size", batch_size)
        reading = reading_of({"exif": checked("exif", exif), "large_images": large_images})
        single = not isinstance(images, list | tuple)
        given = [images] if single else images
        names = ["image"] if single else [f"images[{i}]" for i in range(len(given))]
        pictures = ((i, as_picture(image, names[i], reading)) for i, image in enumerate(given))
        found = dict(self.stream(pictures, threshold, batch_size))
        results = [found[i].found_in(image, reading) for i, image in enumerate(given)]
        return results[0] if single else results

    def stream(
        self, pictures: Iterable[tuple[K, AnyImage]], threshold: float | None = None, batch_size: int = 1
    ) -> Iterator[tuple[K, Detections]]:
        """Detect objects in any number of images, which need not fit into memory together.

        Args:
            pictures: for each image a key, which will be the source of its detections, and the image, as of `predict`.
            threshold, batch_size: as of `predict`.

        Yields:
            The key and the detections of each. With a batch size above 1 images wait for others of their size, and
            come in another order.

        Raises:
            As `predict`, when the first result or that of the image is asked for.
        """
        threshold, batch_size = checked("threshold", threshold), checked("batch_size", batch_size) or 1
        threshold = THRESHOLD if threshold is None else threshold
        waiting: dict[tuple[int, ...], list[tuple[K, tuple[int, int], Tensor]]] = defaultdict(list)
        for pair in pictures:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ArgumentError(f"pictures: expected pairs of a key and an image, got {short(pair)}")
            key, image = pair
            picture = as_picture(image, f"image {key}")
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
            data: folder of the dataset, or its data.yaml.
            split: "train", "val", "test", ...
            annotations, images: of the split, a json and a folder of images, if their names are others than usual.
            format, classes, val_fraction, split_seed, exif, large_images, workers: as of `detr.train`.
            batch_size: images of one size at once; None is as in the training.
            max_dets: most detections of an image that count, the best ones.

        Returns:
            A dict: AP, AP50, AP75, APS, APM, APL, AR1, AR10, AR100 (with another `max_dets` AR of that number), ARS,
            ARM and ARL, 0 to 1, or None where there is no object of the kind (COCO's table has -1 there); "per_class":
            for each name AP, AP50, boxes, and the score with the best F1; "images", "unreadable", "left_out",
            "max_dets" and "seconds". Printed, it is COCO's table and one of the classes. A line on standard output says
            so if the split had to be held out of the training images.

        Raises:
            DataError: the dataset cannot be read, or has other classes; names file and entry. ArgumentError: names the
            argument.
        """
        given = {"val_fraction": val_fraction, "split_seed": split_seed, "format": format, "exif": exif}
        flags = {name: checked(name, value) for name, value in given.items()}
        flags |= {"data": path_of("data", data), "classes": names_of("classes", classes), "large_images": large_images}
        batch_size, workers = checked("batch_size", batch_size), checked("workers", workers)
        max_dets = checked("max_dets", max_dets) or MAX_DETS
        if not isinstance(split, str) or not split:
            raise ArgumentError(f"split: expected the name of a split, got {short(split)}")
        places = {"annotations": annotations, "images": images}
        named = tuple(None if value is None else path_of(name, value) for name, value in places.items())
        dataset = dataset_of(flags, {split: named})
        before, reading = hold_out_of(resume.known(self._about)), reading_of(flags)
        found, said = load_to_evaluate(dataset, split, self._categories, reading, hold_out_of(flags), before)
        if said:
            say(said)
        val = validation_loader(found, self.config, self.device, workers, batch_size)
        metrics, table = evaluate(self.model, val, self.device, max_dets)
        result = Metrics(metrics)
        result.table = table
        return result

    def export(self, path: str | Path, to: str, size: tuple[int, int] | None = None, attention: str = "plain") -> Path:
        """Write the detector for other code, as `detr export` does. Its own file of before is replaced.

        Args:
            path: a file, or for "hf" a folder.
            to: the whole model: "onnx", "torch-export" (a .pt2 file of torch.export) or "aoti" (a .pt2 package that
                AOTInductor compiles for this CPU). Its weights: "official" (a file of the original repository) or "hf"
                (a folder for Hugging Face).
            size: (H, W) of the padded images that a whole model takes, pixels; None is (image_size, image_size) of the
                config. Its inputs are images [B, 3, H, W], normalised by ImageNet's mean and deviation and padded with
                zeros at the right and the bottom, and mask [B, H, W], True on padding; its outputs logits [B, N, K] and
                boxes [B, N, 4] (cx, cy, w, h), 0 to 1 of the unpadded image.
            attention: of ONNX only: "plain" operators, or "tensorrt" or "mmdeploy": one node for their plugin.

        Returns:
            The path of the file.

        Raises:
            ArgumentError: names the argument that does not fit. MissingPackageError: names the package.
            CheckpointError: a weight is not a number. OutputError: a file is in the way that detr did not write.
        """
        path = path_of("path", path)
        if to not in ("official", "hf", *FORMATS):
            raise ArgumentError(f"to: expected one of official, hf, {', '.join(FORMATS)}, got {short(to)}")
        fault = first_not_finite(self.model.state_dict())
        if fault:
            raise CheckpointError(f"{self.path}: {fault}")
        model = self.model
        if self.device.type != "cpu":
            model = checkpoint.model_of(self._content(), self.path)[0].eval()
        if to not in FORMATS:
            return export_weights(model, path, to, self.classes)
        size = (self.config.image_size, self.config.image_size) if size is None else size
        if not isinstance(size, list | tuple) or len(size) != 2 or None in size:
            raise ArgumentError(f"size: expected (H, W), got {short(size)}")
        height, width = (checked("size", side) for side in size)
        return export_model(model, path, to, (height, width), self.classes, attention)

    def save(self, path: str | Path) -> Path:
        """Write the detector to one file, which `detr.load` and every command takes. A file of this kind is replaced.

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


def load(path: str | Path, device: str | torch.device | None = None) -> Detector:
    """The detector in a file of weights, or in the folder of a run.

    Args:
        path: best.pt or checkpoint.pt of a run, a file of `Detector.save`, or the folder of a run. Of a folder best.pt
            is taken: the step with the best AP; before the first evaluation it is checkpoint.pt. Where the run averaged
            its weights these are the averaged ones.
        device: "cpu", "cuda:1" or a torch.device; None is a CUDA GPU if there is one, else the CPU.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another program; nothing in it is executed.
        ArgumentError: there is no such device here.
    """
    device = device_of(device)
    path = path_of("path", path)
    file = checkpoint.file_of(path)
    return detector_of(checkpoint.load(file), file, device)


def detector_of(content: dict[str, Any], file: Path, device: torch.device, stopped: bool = False) -> Detector:
    """The detector in a checkpoint that was loaded from a file."""
    model, config = checkpoint.model_of(content, file)
    about = {name: content[name] for name in _KEPT if name in content}
    # float32 whatever PyTorch's default is now
    return Detector(model.to(device, torch.float32), config, checkpoint.classes_of(content), file, about, stopped)


def used(content: dict[str, Any]) -> dict[str, Any]:
    """What `detector_of` needs of a checkpoint, and not what continues the training."""
    return {name: content[name] for name in (*checkpoint.KEYS, "ema", *_KEPT) if name in content}


def load_pixels(picture: Image.Image, config: Config) -> Tensor:
    """The image [3, H, W] that the model of `config` sees."""
    pixels = resize(to_tensor(picture), config.image_size, config.max_size)
    return evaluation_transform()(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))[0]
