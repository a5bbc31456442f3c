"""One training run: one optimizer, one seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from sam_kernels.cli.train.clock import StepClock
from sam_kernels.cli.train.data import Digits, flip_labels
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import PEER, Settings, build, kind_of, options_of
from sam_kernels.cli.train.peer import PlainSAM
from sam_kernels.cli.train.plan import Plan

__all__ = ["Run", "run"]


@dataclass
class Run:
    optimizer: str
    seed: int
    steps: int = 0
    seconds: float = 0.0  # all steps, without evaluation
    seconds_per_step: float = 0.0  # mean over the steps after the first, which sets up; the three parts add up to it
    forward_seconds: float = 0.0  # of a step: all its forward passes
    backward_seconds: float = 0.0  # all that autograd does
    rest_seconds: float = 0.0  # the optimizer's own work
    optimizer_share: float = 0.0  # of a step's time: the rest
    median_seconds_per_step: float = 0.0  # of all steps: for comparisons that a busy moment of the machine must not decide
    train_loss: list[float] = field(default_factory=list)  # an epoch's mean, at the unperturbed weights, on the (noisy) training labels
    test_accuracy: list[float] = field(default_factory=list)  # after each epoch, on the clean labels of the images to score on
    first_loss: float = 0.0  # of the first batch, at the initial weights
    scored_images: int = 0  # that each accuracy is a proportion of
    diverged: bool = False  # a loss is not finite, or the accuracy is at chance and the loss above the first
    top_eigenvalue: float | None = None  # of the Hessian of the training loss at the end; None: not measured
    hessian_trace: float | None = None


def run(
    name: str,
    seed: int,
    data: Digits,
    settings: Settings,
    plan: Plan,
    *,
    advance: Callable[[], None] = lambda: None,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    finished: Callable[[nn.Module, Tensor], None] = lambda model, labels: None,
) -> Run:
    """Initial weights, flipped labels and batches depend on ``seed`` alone. Calls ``advance`` after each epoch, and ``finished`` at the end
    with the model and the labels that it was trained on.

    ``schedule`` makes what the learning rate follows, a step an epoch; a cosine to 0, a step a step, where it is None.
    """
    device = data.train_images.device
    labels = flip_labels(data.train_labels.cpu(), plan.label_noise, seed).to(device)
    torch.manual_seed(seed)
    model = small_cnn(data.train_images.shape[-1], normalization=plan.normalization).to(device)
    optimizer = build(name, model, settings, seed)
    batches = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(labels) // plan.batch_size
    by_step = None if schedule else CosineAnnealingLR(optimizer, T_max=plan.epochs * steps_per_epoch)
    by_epoch = schedule(optimizer) if schedule else None
    result = Run(name, seed)
    clock = StepClock(device)
    step = _StepOf(name, model, optimizer, settings, clock)
    for _ in range(plan.epochs):
        losses = []
        # BatchNorm needs batches of one size: the last, shorter one is left out, as drop_last does; the next epoch's order differs.
        order = torch.randperm(len(labels), generator=batches)[: steps_per_epoch * plan.batch_size]
        for batch in torch.split(order, plan.batch_size):
            chosen = batch.to(device)
            losses.append(step(data.train_images[chosen], labels[chosen]))
            if by_step is not None:
                by_step.step()
        if by_epoch is not None:
            by_epoch.step()
        if not result.train_loss:
            result.first_loss = losses[0].item()
        result.train_loss.append(torch.stack(losses).mean().item())
        result.test_accuracy.append(_accuracy(model, data.test_images, data.test_labels))
        advance()
    finished(model, labels)
    result.steps, result.seconds = len(clock.steps), sum(clock.steps)
    mean = clock.mean()
    result.seconds_per_step, result.forward_seconds = mean.step, mean.forward
    result.backward_seconds, result.rest_seconds = mean.backward, mean.rest
    result.optimizer_share = mean.rest / mean.step
    result.median_seconds_per_step = clock.median_step()
    result.scored_images = len(data.test_labels)
    result.diverged = _has_diverged(result, chance=data.test_labels.bincount().max().item() / result.scored_images)
    return result


def _has_diverged(result: Run, chance: float) -> bool:
    """``chance``: the share of the largest class, which a network that always answers the same may reach. At chance: no more than two
    standard errors of a proportion above it."""
    if not all(map(math.isfinite, result.train_loss)):
        return True
    most = chance + 2 * math.sqrt(chance * (1 - chance) / result.scored_images)
    return result.test_accuracy[-1] <= most and result.train_loss[-1] > result.first_loss


class _StepOf:
    """One step of the optimizer called ``name``, timed, as that kind of optimizer takes it. Returns the mean loss at the weights."""

    def __init__(self, name: str, model: nn.Module, optimizer: Any, settings: Settings, clock: StepClock) -> None:
        self._kind = kind_of(name)
        self._micro_batch_size = options_of(name, settings).get("micro_batch_size", 0)
        self._model, self._optimizer, self._clock = model, optimizer, clock
        self._plain = PlainSAM(optimizer, model, options_of(name, settings)["rho"]) if name == PEER else None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._clock.step():
            if self._kind == "rwsam":  # zeroes the gradients and calls backward itself
                loss = self._optimizer.step(lambda: self._losses(images, labels))
            elif self._kind == "msam":
                micro_batches = len(labels) // self._micro_batch_size
                loss = self._optimizer.step(self._gradient, batch=(images, labels), micro_batches=micro_batches)
            elif self._plain is not None:
                loss = self._plain.step(lambda: self._gradient(images, labels))
            else:
                loss = self._optimizer.step(lambda: self._gradient(images, labels))
        return torch.as_tensor(loss)

    def _losses(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._clock.forward():
            losses = nn.functional.cross_entropy(self._model(images), labels, reduction="none")
        self._clock.watch(losses)
        return losses

    def _gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._clock.forward():
            loss = nn.functional.cross_entropy(self._model(images), labels)
        with self._clock.backward():  # zeroing the gradients is no optimizer's own work
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    correct = (model(images).argmax(dim=1) == labels).sum().item()
    model.train()
    return float(correct / len(labels))
