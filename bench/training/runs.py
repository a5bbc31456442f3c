"""A training run of one implementation: a model of its own, data in memory, and a step that times its forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.masters.clock import best_clock
from bench.providers import BASES, PROVIDERS, MicroBatchStepper
from bench.training.models import Kind, loss_of

__all__ = ["BASE", "LOOP", "NAMES", "Run", "missing", "title"]

BASE = "base"
LOOP = "davda54/fused"  # the usual loop with the fastest base that torch has
NAMES = (BASE, "sam_kernels/native", "torch._foreach_/fused", LOOP, "pytorch_optimizer/fused")
LR = 1e-6  # so small that every step is the same step


def title(name: str, base: str | None = None) -> str:
    """Of an implementation in tables; ``base``: a name of BASES."""
    if name == BASE:
        return "base optimizer alone, fused" if base is None else f"{BASES[base].title} alone, fused"
    return PROVIDERS[name].title


def missing(name: str, kind: Kind, n_tensors: int) -> str | None:
    """Return why an implementation cannot train this model here, or None."""
    if name == BASE:
        return None
    if kind.micro_batches > 1 and not PROVIDERS[name].takes_micro_batches:
        return "has no steps of m-SAM"
    return PROVIDERS[name].missing(n_tensors)


class Run:
    """A call makes ``block`` training steps. ``optimizer_ms`` has, for each call, the milliseconds of a step outside its passes.

    A pass sets the gradients to None, computes the loss and calls ``backward``. All else of a step is the optimizer's: its norm,
    perturbation and update, and the averaging of m-SAM's gradients.
    """

    def __init__(self, name: str, kind: Kind, *, quick: bool = False) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = (kind.make_quick if quick else kind.make)()
        self.batch = kind.quick_batch if quick else kind.batch
        self.inputs, self.labels = kind.inputs(self.batch)
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.block, self.optimizer_ms = 1, list[float]()
        self._clock, self._in_passes = best_clock(), 0
        self._step = self._make_step(name, kind)

    def __call__(self) -> None:
        self._in_passes = 0
        start = self._clock()
        for _ in range(self.block):
            self._step()
        self.optimizer_ms.append((self._clock() - start - self._in_passes) / 1e6 / self.block)

    def _make_step(self, name: str, kind: Kind) -> Callable[[], object]:
        base = replace(BASES[kind.base], kwargs={**BASES[kind.base].kwargs, "lr": LR})
        passes = partial(self._passes, self.inputs, self.labels)
        if name == BASE:
            optimizer: torch.optim.Optimizer = cast(Any, base.optimizer)(self.params, **base.kwargs, fused=True)

            def base_step() -> None:
                passes()
                optimizer.step()

            return base_step
        self.stepper = stepper = PROVIDERS[name].make(self.params, base)
        if kind.micro_batches > 1:
            chunks = zip(self.inputs.chunk(kind.micro_batches), self.labels.chunk(kind.micro_batches), strict=True)
            closures = [partial(self._passes, *chunk) for chunk in chunks]
            return partial(cast(MicroBatchStepper, stepper).micro_batch_step, closures)

        def sam_step() -> None:
            passes()
            stepper.first_step()
            passes()
            stepper.second_step()

        return sam_step

    def _passes(self, inputs: Tensor, labels: Tensor) -> Tensor:
        start = self._clock()
        with torch.enable_grad():  # the loops of m-SAM call this under no_grad
            for param in self.params:
                param.grad = None
            loss = loss_of(self.model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        self._in_passes += self._clock() - start
        return loss
