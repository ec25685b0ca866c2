"""What learns in a run: the model, its average, the loss and the optimiser, and one optimiser step of them."""

import contextlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detr import checkpoint, distributed
from detr.config import Config
from detr.errors import CheckpointError
from detr.losses import Criterion, at_least_one, noised_boxes

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_WANTED = ("labels", "boxes", "noised")  # of a target, for the loss

Batch = tuple[Tensor, Tensor, list[dict[str, Any]]]  # of detr.data.collate


@dataclass(frozen=True)
class Step:
    """What an optimiser step did: the same on all processes, `culprit` apart."""

    values: dict[str, float]  # "loss", its terms and "grad_norm", over the batches of all processes, before the step
    taken: bool  # the weights were changed: loss and gradient are finite
    overflow: bool  # not taken because scaled float16 gradients overflowed, which is no fault: the scale is halved
    culprit: bool  # not taken, and a batch of this process was the cause (best guess)
    unreadable: int  # image files that could not be read, on all processes
    stop: bool  # a process was asked to stop

    @property
    def loss(self) -> float:
        """The loss, or NaN if it is not finite."""
        return self.values["loss"] if math.isfinite(self.values["loss"]) else math.nan

    @property
    def skipped(self) -> bool:
        """The weights were left as they were, for a loss or a gradient that is not finite."""
        return not self.taken and not self.overflow


class Learner:
    """A model with all that changes it. With several processes each has one, and they step together.

    Args:
        model: on the device where it is trained.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.n_queries, self.clip_norm = model, config.n_queries, config.clip_norm
        self.autocast_to = AMP_DTYPES[config.amp]
        self.device = next(model.parameters()).device
        self.world = distributed.world_size()
        if config.lr_backbone == 0:
            model.backbone.freeze()
        self.average = None
        if config.ema:
            # the running statistics of BatchNorm are averaged like the weights that they belong to
            self.average = AveragedModel(model, multi_avg_fn=_average(config.ema), use_buffers=True)
        self.replica = torch.compile(model, fullgraph=True, dynamic=True) if config.compile else model
        if self.world > 1:
            self.replica = _distributed(self.replica, self.device, config)
        self.criterion = Criterion(config, model.num_classes)
        self.optimizer = torch.optim.AdamW(
            param_groups(model, config),
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model if there is one."""
        return self.average.module if self.average else self.model

    def set_rates(self, factor: float) -> None:
        """The learning rates of the next step, as a factor on their peaks."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def step(self, batches: list[Batch], unreadable: int = 0, stop: bool = False) -> Step:
        """One optimiser step on the batches of all processes, whose gradients are added up.

        Args:
            unreadable, stop: of this process; the result has their sums over all, from the all-reduce of the losses.
        """
        wanted = [
            [{name: target[name].to(self.device) for name in _WANTED if name in target} for target in targets]
            for _, _, targets in batches
        ]
        counts = sum(self.criterion.counts(targets, self.n_queries) for targets in wanted).to(self.device)
        # gradients are added up over batches and averaged over processes
        counts = at_least_one(distributed.add_up(counts)) / self.world
        self.optimizer.zero_grad()
        before = [tensor.clone() for tensor in self.statistics]
        losses = []
        for i, ((images, mask, _), targets) in enumerate(zip(batches, wanted, strict=True)):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.replica.no_sync():
                images, mask = images.to(self.device, non_blocking=True), mask.to(self.device)
                with self._autocast():
                    outputs = self.replica(images, mask, noised_boxes(targets))
                total, terms = self.criterion(outputs, targets, counts)
                self.scaler.scale(total).backward()
            losses.append(torch.stack([total.detach(), *terms.values()]))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or math.inf)

        flags = torch.tensor([float(unreadable), float(stop)], device=self.device)
        summary = distributed.add_up(torch.cat([sum(losses) / self.world, norm[None] / self.world, flags]))
        # one transfer from the device for all numbers
        *numbers, all_unreadable, stopping = summary.tolist()
        values = dict(zip(["loss", *self.criterion.names, "grad_norm"], numbers, strict=True))
        taken, finite = math.isfinite(values["loss"] + values["grad_norm"]), math.isfinite(values["loss"])
        overflow = not taken and self.scaler.is_enabled() and finite and self.scaler.get_scale() >= 1
        self._settle_statistics(before, taken)
        if taken:
            self.scaler.step(self.optimizer)
            if self.average:
                self.average.update_parameters(self.model)
        self.scaler.update()
        culprit = not taken and not overflow and (finite or not math.isfinite(sum(losses)[0].item()))
        return Step(values, taken, overflow, culprit, int(all_unreadable), stopping > 0)

    def _settle_statistics(self, before: list[Tensor], taken: bool) -> None:
        """Make the running statistics the means over all processes, or after a skipped step those from `before`."""
        values = self.statistics if taken else before
        if taken and self.statistics and self.world > 1:
            sizes = [len(tensor) for tensor in self.statistics]
            values = (distributed.add_up(torch.cat(self.statistics)) / self.world).split(sizes)
        for tensor, value in zip(self.statistics, values, strict=True):
            tensor.copy_(value)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.autocast_to, enabled=self.autocast_to is not None)

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        averages = {}
        if self.average:
            averages = {"ema": self.average.module.state_dict(), "ema_steps": int(self.average.n_averaged)}
        mine = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {"model": self.model.state_dict()} | mine | averages

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a `state` that was read from `path`.

        Raises:
            CheckpointError: it is not of this model, or a field of it is absent or wrong; nothing was loaded then.
        """
        checkpoint.require(state, ("optimizer", "scaler", *(("ema", "ema_steps") if self.average else ())), path)
        problem = checkpoint.misfit(self.scaler.state_dict(), state["scaler"], "scaler")
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        checkpoint.check_optimizer(self.optimizer, state["optimizer"], path)
        checkpoint.check_weights(self.model, state["model"], path)
        if self.average:
            checkpoint.check_weights(self.average.module, state["ema"], path)
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["ema_steps"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def param_groups(model: nn.Module, config: Config) -> list[dict]:
    """Parameter groups for AdamW: the backbone, the sampling offsets and reference points, and everything else."""
    groups = {name: [] for name in ("rest", "backbone", "offsets")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone." in name:
            groups["backbone"].append(parameter)
        elif "sampling_offsets" in name or "reference_points" in name:
            groups["offsets"].append(parameter)
        else:
            groups["rest"].append(parameter)
    rates = {"rest": config.lr, "backbone": config.lr_backbone, "offsets": config.lr * config.lr_offsets_mult}
    return [
        {"name": name, "params": parameters, "lr": rates[name]} for name, parameters in groups.items() if parameters
    ]


def _distributed(model: nn.Module, device: torch.device, config: Config) -> DistributedDataParallel:
    """The model with gradients that are means over all processes."""
    with warnings.catch_warnings():
        # torch 2.14 renames broadcast_buffers, and older ones do not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            # without auxiliary losses the heads of the first layers get no gradient
            find_unused_parameters=not config.aux_loss,
        )


def _average(decay: float) -> Any:
    """Exponential average for AveragedModel; its decay grows to `decay`, for short runs."""

    def average(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        n = int(n)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, n)

    return average
