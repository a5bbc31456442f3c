"""A small problem that every rank has its own batches of, and its runs on one process and on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM

RANKS, STEPS, ROWS = 2, 4, 6
# Both runs add the same numbers up in another order: some hundred roundings of 1.1e-16 a step, at gradients and weights of about 1.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Branches(nn.Module):
    """``left`` and ``right`` take part only where the input says so, ``never`` nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.left, self.right, self.never = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, inputs: Tensor, branch: str = "") -> Tensor:
        hidden = torch.tanh(self.stem(inputs))
        if branch:
            hidden = hidden + getattr(self, branch)(hidden)
        out: Tensor = self.head(hidden)
        return out


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch_of(step: int, rank: int, k: int) -> tuple[Tensor, Tensor]:
    """Of k micro-batches."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    scale = 1.0 + 2.0 * rank  # gradients of other lengths on other ranks
    return (
        scale * torch.randn(k * ROWS, 5, generator=generator, dtype=torch.float64),
        torch.randn(k * ROWS, 3, generator=generator, dtype=torch.float64),
    )


def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:  # (B,)
    losses: Tensor = (model(inputs, **kwargs) - targets).square().mean(1)
    return losses


@dataclass(frozen=True)
class Run:
    """How a run is made. ``closure(optimizer, model, scaler)`` gives what is called with one micro-batch."""

    make: Callable[..., Any] = SAM
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9})
    more: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    ddp: dict[str, Any] = field(default_factory=dict)
    k: int = 1
    as_list: bool = False
    branches: tuple[tuple[str, ...], ...] = ()  # by rank, by micro-batch
    zero_late: bool = False  # zero_grad between forward and backward
    scales: bool = False
    averaged: bool = False  # SAM on the batch of all ranks

    def model(self) -> nn.Module:
        return Branches().double() if self.branches else make_model()

    def optimizer(self, around: nn.Module, **kwargs: Any) -> Any:
        first = around if self.make.__name__ == "RWSAM" else around.parameters()
        return self.make(first, self.base, **self.options, **self.more, **kwargs)

    def closure(self, optimizer: Any, model: nn.Module, scaler: Any) -> Callable[..., Tensor]:
        def closure(inputs: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
            if self.make.__name__ == "RWSAM":
                return losses_of(model, inputs, targets, **kwargs)
            if not self.zero_late:
                optimizer.zero_grad()
            loss = losses_of(model, inputs, targets, **kwargs).mean()
            if self.zero_late:
                optimizer.zero_grad()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        return closure

    def pieces(self, closure: Callable[..., Tensor], step: int, rank: int) -> list[Callable[[], Tensor]]:
        """A closure for each micro-batch of a rank."""
        inputs, targets = batch_of(step, rank, self.k)
        found = []
        for i, (x, y) in enumerate(zip(inputs.split(ROWS), targets.split(ROWS), strict=True)):
            branch = {"branch": self.branches[rank][i]} if self.branches else {}
            found.append(lambda x=x, y=y, branch=branch: closure(x, y, **branch))
        return found


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def counted(model: DistributedDataParallel) -> list[int]:
    """One entry for each bucket of gradients that is reduced."""
    calls: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at the annotations themselves, not at strings
        calls.append(bucket.index())
        work = distributed.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, hook)
    return calls


def on_one_rank(rank: int, run: Run) -> dict[str, Any]:
    """Weights after every step, and how many buckets of gradients each step has reduced."""
    model = run.model()
    ddp = DistributedDataParallel(model, **run.ddp)
    calls, scaler = counted(ddp), torch.amp.GradScaler("cpu", init_scale=4.0) if run.scales else None
    given = {} if run.make.__name__ == "RWSAM" else {"model": ddp, "local_ascent": not run.averaged}
    optimizer = run.optimizer(ddp, **given)
    closure, weights, reduced = run.closure(optimizer, ddp, scaler), [], []
    kwargs = {} if scaler is None else {"grad_scaler": scaler}
    for step in range(STEPS):
        before = len(calls)
        if run.as_list or run.branches:
            optimizer.step(run.pieces(closure, step, rank), **kwargs)
        else:
            optimizer.step(closure, batch=batch_of(step, rank, run.k), micro_batches=run.k, **kwargs)
        if scaler is not None:
            scaler.update()
        weights.append(weights_of(model))
        reduced.append(len(calls) - before)
    return {"weights": weights, "reduced": reduced, "skipped": optimizer.skipped_steps}


def on_one_process(run: Run) -> list[list[Tensor]]:
    """The same run without replicas: m-SAM over the micro-batches of all ranks, or SAM on their whole batch."""
    model, weights = run.model(), []
    optimizer = run.optimizer(model)
    closure = run.closure(optimizer, model, None)
    for step in range(STEPS):
        if run.averaged:
            batches = zip(*(batch_of(step, rank, run.k) for rank in range(RANKS)), strict=True)
            whole = [torch.cat(each) for each in batches]
            optimizer.step(lambda whole=whole: closure(*whole))
        else:
            optimizer.step([piece for rank in range(RANKS) for piece in run.pieces(closure, step, rank)])
        weights.append(weights_of(model))
    return weights


def assert_alike(found: list[list[Tensor]], right: list[list[Tensor]]) -> None:
    for step, (left, expected) in enumerate(zip(found, right, strict=True)):
        for i, (got, value) in enumerate(zip(left, expected, strict=True)):
            torch.testing.assert_close(got, value, **CLOSE, msg=lambda text, step=step, i=i: f"step {step}, parameter {i}: {text}")
