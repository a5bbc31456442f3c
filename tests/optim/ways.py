"""Every way to take one step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import sam_kernels
from tests.optim.problem import add_gradient, closure_of, loss_of, make_batch

__all__ = ["KEEPERS", "WAYS", "by_closure", "by_first_step_and_step", "by_gradient", "by_micro_batches", "by_two_steps", "plainly", "sam"]


KEEPERS = ["VaSSO", "FriendlySAM", "LookSAM"]  # members that keep a tensor for each parameter


def sam(model: nn.Module, base: Any = torch.optim.SGD, **options: Any) -> Any:
    return sam_kernels.SAM(model.parameters(), base, **{"rho": 0.05, **options})


def by_closure(optimizer: Any, model: nn.Module) -> None:
    optimizer.step(closure_of(optimizer, model, make_batch()))


def by_micro_batches(optimizer: Any, model: nn.Module) -> None:
    optimizer.step([closure_of(optimizer, model, make_batch(seed=seed)) for seed in (1, 2)])


def by_two_steps(optimizer: Any, model: nn.Module) -> None:
    loss_of(model, make_batch()).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch()).backward()
    optimizer.second_step(zero_grad=True)


def by_first_step_and_step(optimizer: Any, model: nn.Module) -> None:
    loss_of(model, make_batch()).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_gradient(optimizer: Any, model: nn.Module) -> None:
    optimizer.backward(partial(add_gradient, model))
    optimizer.step()
    optimizer.zero_grad()


def plainly(optimizer: Any, model: nn.Module) -> None:
    loss_of(model, make_batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


WAYS = [by_closure, by_micro_batches, by_two_steps, by_first_step_and_step, by_gradient, plainly]
