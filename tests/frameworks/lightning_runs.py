"""A small module, its batches and its trainer, and SAM's steps on them written out: what the tests of Lightning and Fabric share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sam_kernels import SAM
from sam_kernels.integrations.lightning import SAMCallback
from tests.frameworks.formula import RHO

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

LR, BATCHES, ROWS = 0.1, 6, 4
Batch = tuple[Tensor, Tensor]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count: int = BATCHES, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(ROWS, 5, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x.to(dtype), torch.randint(0, 3, (ROWS,), generator=generator)) for x in inputs]


def loss_of(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(module: nn.Module, **options: Any) -> SAM:
    return SAM(module.parameters(), torch.optim.SGD, **{"lr": LR, "momentum": 0.9, "rho": RHO, **options})


class Module(lightning.LightningModule):  # type: ignore[misc]
    """``make(module)``: the optimizer, or all that ``configure_optimizers`` returns."""

    def __init__(self, make: Callable[[Any], Any] = sgd, model: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self._make = net() if model is None else model, make

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self._make(self)


class Manual(Module):
    """``step(module, optimizer, batch)`` is the training step."""

    def __init__(self, step: Callable[[Any, Any, Any], Any], make: Callable[[Any], Any] = sgd, model: nn.Module | None = None) -> None:
        super().__init__(make, model)
        self.automatic_optimization, self._step = False, step

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self._step(self, self.optimizers(), batch)

    def closure(self, *batch: Tensor, share: float = 1.0) -> Tensor:
        """Forward and backward pass, without zero_grad."""
        loss = loss_of(self.net, batch) * share  # type: ignore[arg-type]
        self.manual_backward(loss)
        return loss


def trainer_of(**options: Any) -> Any:
    """A quiet trainer of one epoch on the CPU, with SAMCallback in front of ``callbacks``."""
    return manual_trainer(**{**options, "callbacks": [SAMCallback(), *options.get("callbacks", [])]})


def manual_trainer(**options: Any) -> Any:
    """As :func:`trainer_of`, without the callback."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "devices": 1, **quiet, **options})


def loader(data: Sequence[Any] | None = None) -> Any:
    return DataLoader(batches() if data is None else data, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


# --- SAM's steps, written out ---


def steps_of(data: Sequence[Any], accumulation: int) -> list[list[Any]]:
    return [list(data[i : i + accumulation]) for i in range(0, len(data), accumulation)]


def train_by_formula(
    model: nn.Module,
    steps: Sequence[Sequence[Sequence[Batch]]],
    *,
    base: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
    share: Callable[[int], float] | None = None,
    share_of: Mapping[int, float] | None = None,
    lambd: float = 1.0,
    clip: float = 0.0,
    by_value: bool = False,
    context: Callable[[], Any] = nullcontext,
    scale: float = 1.0,
    after: Callable[[int, torch.optim.Optimizer], None] = lambda i, optimizer: None,
) -> nn.Module:
    """SAM's steps. ``steps``: of each step the ascents, of each ascent the batches whose mean loss is its f. Returns the model.

    An ascent: e = rho (1 - lambd + lambd / |g|) g with g = ∇f(w). The step is along the sum of share · ∇f(w + e) over its ascents. A share
    is 1 / (number of ascents), unless ``share(number)`` says another, or ``share_of`` by the number of the ascent's batches. A step with a
    gradient that is not finite changes nothing. ``scale``: of losses, so that gradients of float16 activations are not too small for it.
    """
    params, optimizer = list(model.parameters()), base(model)

    def grads_of(group: Sequence[Batch]) -> list[Tensor]:
        total = [torch.zeros_like(param) for param in params]
        for batch in group:  # one by one: autocast would add their gradients up in the lower precision
            with context():
                loss = loss_of(model, batch)
            for sum_, grad in zip(total, torch.autograd.grad(loss * scale, params), strict=True):
                sum_ += grad / (scale * len(group))
        return total

    for i, ascents in enumerate(steps):
        total = [torch.zeros_like(param) for param in params]
        weight = 1 / len(ascents) if share is None else share(len(ascents))
        for group in ascents:
            grads = grads_of(group)
            norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
            start = [param.detach().clone() for param in params]
            with torch.no_grad():
                for param, grad in zip(params, grads, strict=True):
                    param.add_((RHO * (1 - lambd + lambd / (norm + 1e-12))).to(param.dtype) * grad)
            sharp = grads_of(group)
            with torch.no_grad():
                for param, old in zip(params, start, strict=True):
                    param.copy_(old)
            factor = weight if share_of is None else share_of[len(group)]
            total = [before + factor * grad for before, grad in zip(total, sharp, strict=True)]
        if not all(bool(grad.isfinite().all()) for grad in total):
            after(i, optimizer)
            continue
        for param, grad in zip(params, total, strict=True):
            param.grad = grad
        if clip and by_value:
            torch.nn.utils.clip_grad_value_(params, clip)
        elif clip:
            length = torch.stack([grad.square().sum() for grad in total]).sum().sqrt()
            for param in params:
                assert param.grad is not None
                param.grad.mul_(min(1.0, clip / (length.item() + 1e-6)))
        optimizer.step()
        after(i, optimizer)
    return model
