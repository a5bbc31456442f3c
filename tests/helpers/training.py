"""A training problem whose gradients have the same bits every time, whoever launches them: elementwise operations and sums, no matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sam_kernels
from tests.optim.family_runs import make as member_of_family

__all__ = ["BASES", "CAPTURABLE_MEMBERS", "Bowl", "closure_of", "everything", "make", "make_member"]

# AdamW: a base whose step counters lie on the device.
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}
# Of the family, those whose steps a graph can hold.
CAPTURABLE_MEMBERS = ("VaSSO", "GCSAM", "GSAM", "WSAM-coupled", "WSAM-decoupled", "MomentumSAM", "S2SAM", "SAMSPS")
SHAPES = ((1000,), (33, 17), (3,), (), (2, 3, 5, 7))


class Bowl(nn.Module):
    """sum (scale (p - target))^2 over parameters of a few shapes."""

    def __init__(self, device: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        drawn = [[torch.randn(shape, generator=generator).to(device) for _ in range(3)] for shape in shapes]
        self.weights = nn.ParameterList([nn.Parameter(start) for start, _, _ in drawn])
        self.rest = [(target, scale) for _, target, scale in drawn]
        self.factor = torch.ones((), device=device)  # of the loss: inf spoils a gradient without anybody waiting

    def loss(self) -> Tensor:
        terms = [(scale * (p - target)).square().sum() for p, (target, scale) in zip(self.weights, self.rest, strict=True)]
        return torch.stack(terms).sum() * self.factor


def make(base: str, device: str, **sam: Any) -> tuple[Bowl, Any]:
    model = Bowl(device)
    optimizer_class, kwargs = BASES[base]
    return model, sam_kernels.SAM(model.parameters(), optimizer_class, **{"rho": 0.05, **sam}, **kwargs)


def make_member(name: str, device: str, **options: Any) -> tuple[Bowl, Any]:
    """A member of the family around SGD with momentum."""
    model = Bowl(device)
    return model, member_of_family(name, model.parameters(), **options)


def closure_of(optimizer: Any, model: Bowl, *, set_to_none: bool = True) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = model.loss()
        loss.backward()
        return loss

    return closure


def everything(model: Bowl, optimizer: Any) -> list[Tensor]:
    """Parameters and the base's state, on the CPU."""
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return [tensor.detach().cpu().clone() for tensor in (*model.parameters(), *state)]
