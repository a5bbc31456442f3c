"""A small regression problem and the formulas of one step, written out."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels._dispatch import available
from sam_kernels.backends.native import CUDA_ON_HOST

# What is missing, and why, stands at the top of the test run; .ci/run insists on native. The process that runs CUDA's kernels on the host
# tests those alone: foreach has had its turn.
BACKENDS = ["native"] if CUDA_ON_HOST else available()
BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="sgd-momentum"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="adamw"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01}, id="rmsprop-not-fused"),
]
every_base = pytest.mark.parametrize(("base", "kwargs"), BASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)


def make_batch(dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), targets.to(dtype)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = (tensor.to(next(model.parameters()).device) for tensor in batch)
    return nn.functional.mse_loss(model(inputs), targets)


def add_gradient(
    model: nn.Module, batch: Any = None, share: float = 1.0, *, loss_of: Callable[[nn.Module, Any], Tensor] = loss_of
) -> Tensor:
    """The body of a closure that does not zero. Returns the loss, ``share`` times that of the batch (None: the usual one)."""
    loss = share * loss_of(model, make_batch(next(model.parameters()).dtype) if batch is None else batch)
    loss.backward()
    return loss


def closure_of(
    optimizer: Any, model: nn.Module, batch: tuple[Tensor, Tensor], loss_of: Callable[[nn.Module, Any], Tensor] = loss_of
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return add_gradient(model, batch, loss_of=loss_of)

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def set_weights(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(model.parameters(), values, strict=True):
            param.copy_(value)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return [param.grad.clone() for param in model.parameters()]  # type: ignore[union-attr]


def written_out_step(
    model: nn.Module,
    base: Any,
    batch: tuple[Tensor, Tensor],
    *,
    rho: float,
    lambd: float = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    scale: float = 1.0,
) -> None:
    """One step of Unified SAM as the formula says it, with ``base`` a torch optimizer on ``model``'s own parameters."""
    start = weights(model)
    sign = -1.0 if base.param_groups[0].get("maximize") else 1.0  # to maximise f is to minimise -f
    grads = [sign * grad for grad in gradients(model, batch)]
    scaling = [scale * (param.abs() + eta if adaptive else torch.ones_like(param)) for param in start]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(scaling, grads, strict=True)))
    length = rho * (1 - lambd + lambd / (norm + 1e-12))
    set_weights(model, [w + length * t * t * g for w, t, g in zip(start, scaling, grads, strict=True)])
    gradients(model, batch)
    set_weights(model, start)
    base.step()


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: differs by {(a.double() - b.double()).abs().max().item():.3e}"


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
