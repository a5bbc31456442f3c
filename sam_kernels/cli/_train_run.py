"""One training run: one optimizer, one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sam_kernels.cli._train_clock import StepClock
from sam_kernels.cli._train_data import Digits, flip_labels
from sam_kernels.cli._train_model import small_cnn
from sam_kernels.cli._train_optimizers import Settings, build

__all__ = ["Plan", "Run", "run"]


@dataclass(frozen=True)
class Plan:
    epochs: int
    batch_size: int
    label_noise: float  # share of the training labels to make wrong


@dataclass
class Run:
    optimizer: str
    seed: int
    steps: int = 0
    seconds: float = 0.0  # all steps, without evaluation
    seconds_per_step: float = 0.0  # median: neither the first step's set-up nor a busy moment of the machine counts
    optimizer_share: float = 0.0  # of a step's time, spent outside zero_grad, forward and backward; median
    train_loss: list[float] = field(default_factory=list)  # an epoch's mean, at the unperturbed weights, on the (noisy) training labels
    test_accuracy: list[float] = field(default_factory=list)  # after each epoch, on the clean test labels


def run(
    name: str,
    seed: int,
    data: Digits,
    settings: Settings,
    plan: Plan,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Run:
    """Initial weights, flipped labels and batches depend on ``seed`` alone. Calls ``advance`` after each epoch."""
    device = data.train_images.device
    labels = flip_labels(data.train_labels.cpu(), plan.label_noise, seed).to(device)
    torch.manual_seed(seed)
    model = small_cnn(data.train_images.shape[-1]).to(device)
    optimizer = build(name, model, settings)
    batches = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(labels) // plan.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.epochs * steps_per_epoch)
    result = Run(name, seed)
    clock = StepClock(device)
    for _ in range(plan.epochs):
        losses = []
        # BatchNorm needs batches of one size: the last, shorter one is left out, as drop_last does; the next epoch's order differs.
        order = torch.randperm(len(labels), generator=batches)[: steps_per_epoch * plan.batch_size]
        for batch in torch.split(order, plan.batch_size):
            chosen = batch.to(device)
            losses.append(_timed_step(model, optimizer, data.train_images[chosen], labels[chosen], clock))
            schedule.step()
        result.train_loss.append(torch.stack(losses).mean().item())
        result.test_accuracy.append(_accuracy(model, data.test_images, data.test_labels))
        advance()
    result.steps, result.seconds = len(clock.steps), sum(clock.steps)
    result.seconds_per_step, result.optimizer_share = clock.median(), clock.median_optimizer_share()
    return result


def _timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, clock: StepClock) -> Tensor:
    def closure() -> Tensor:
        with clock.gradient():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
            return loss.detach()

    with clock.step():
        loss = optimizer.step(closure)  # type: ignore[arg-type] # torch's stub says float; it returns what the closure returns
    return torch.as_tensor(loss)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    correct = (model(images).argmax(dim=1) == labels).sum().item()
    model.train()
    return float(correct / len(labels))
