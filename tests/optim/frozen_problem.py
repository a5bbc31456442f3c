"""A model of which an optimizer perturbs the normalisation layer alone, and closures that note what the model was like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels import norm_layers
from tests.optim.family_runs import make
from tests.optim.problem import loss_of, make_batch

__all__ = ["Noting", "loss_and_backward", "make_frozen", "make_model", "moving", "resting"]


def make_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 2)
    return nn.Sequential(*layers).to(dtype)


def moving(model: nn.Module) -> list[Tensor]:
    """The parameters that are perturbed."""
    return [param for module in model.modules() if isinstance(module, nn.LayerNorm) for param in module.parameters()]


def resting(model: nn.Module) -> list[Tensor]:
    ours = set(map(id, moving(model)))
    return [param for param in model.parameters() if id(param) not in ours]


def make_frozen(name: str, model: nn.Module, base: str = "sgd-momentum", *, freeze: bool = True, **options: Any) -> Any:
    """A member of the family on normalisation layers. A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(name, norm_layers(model), base, freeze_unperturbed=freeze, **options)


def loss_and_backward(model: nn.Module, batch: Any = None) -> Tensor:
    loss = loss_of(model, make_batch() if batch is None else batch)
    loss.backward()
    return loss


class Noting:
    """A closure that notes for each call which parameters required a gradient, and which had one afterwards, in ``named_parameters`` order.

    ``error`` is raised in call number ``at``, before the forward pass or after the backward pass.
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        batch: Any = None,
        *,
        zero: Callable[[Any], None] | None = None,
        error: BaseException | None = None,
        at: int = -1,
        early: bool = False,
    ) -> None:
        self.optimizer, self.model, self.batch = optimizer, model, make_batch() if batch is None else batch
        self.zero = (lambda optimizer: optimizer.zero_grad()) if zero is None else zero
        self.error, self.at, self.early = error, at, early
        self.required: list[list[bool]] = []
        self.had_grads: list[list[bool]] = []

    def __call__(self) -> Tensor:
        call = len(self.required)
        self.required.append([param.requires_grad for param in self.model.parameters()])
        if self.error is not None and call == self.at and self.early:
            raise self.error
        self.zero(self.optimizer)
        loss = loss_and_backward(self.model, self.batch)
        self.had_grads.append([param.grad is not None for param in self.model.parameters()])
        if self.error is not None and call == self.at:
            raise self.error
        return loss
