"""The documented ways of using a ``torch.amp.GradScaler``, each as one training iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.problem import loss_of, make_batch

__all__ = ["BASES", "FLOWS", "SCALE", "InfOnPass", "scaled_closure", "step_with"]

BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="sgd-momentum"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="adamw"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01}, id="rmsprop-not-fused"),
]
SCALE = 1024.0


class InfOnPass(nn.Module):
    """Multiplies the loss so that the gradient of one chosen pass is infinite."""

    def __init__(self, bad_pass: int | None) -> None:
        super().__init__()
        self.bad_pass = bad_pass
        self.passes = 0

    def forward(self, loss: Tensor) -> Tensor:
        self.passes += 1
        return loss * (float("inf") if self.passes == self.bad_pass else 1.0)


def scaled_closure(optimizer: Any, model: nn.Module, scaler: Any, spoil: InfOnPass) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = spoil(loss_of(model, make_batch()))
        scaler.scale(loss).backward()
        return loss

    return closure


def step_with(flow: str, optimizer: Any, model: nn.Module, scaler: Any, bad_pass: int | None = None) -> None:
    """One iteration in one of the documented ways of using a scaler."""
    spoil = InfOnPass(bad_pass)
    if flow == "closure":
        optimizer.step(scaled_closure(optimizer, model, scaler, spoil), grad_scaler=scaler)
        scaler.update()
        return
    optimizer.zero_grad()
    scaler.scale(spoil(loss_of(model, make_batch()))).backward()
    if flow == "two unscalings":
        scaler.unscale_(optimizer)
        optimizer.first_step(zero_grad=True)
    else:
        optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaler.scale(spoil(loss_of(model, make_batch()))).backward()
    if flow == "two unscalings":
        scaler.unscale_(optimizer.base_optimizer)
        optimizer.second_step()
    else:
        scaler.step(optimizer)
    scaler.update()


FLOWS = ["closure", "two unscalings", "scaler.step"]
