"""Every way to take one step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.optim.problem import closure_of, loss_of, make_batch

__all__ = ["WAYS", "by_closure", "by_first_step_and_step", "by_gradient", "by_micro_batches", "by_two_steps", "plainly"]


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
    def closure() -> Tensor:
        loss = loss_of(model, make_batch())
        loss.backward()
        return loss

    optimizer.backward(closure)
    optimizer.step()
    optimizer.zero_grad()


def plainly(optimizer: Any, model: nn.Module) -> None:
    loss_of(model, make_batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


WAYS = [by_closure, by_micro_batches, by_two_steps, by_first_step_and_step, by_gradient, plainly]
