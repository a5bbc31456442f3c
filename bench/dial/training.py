"""One training run: a task, a method, a radius, a seed and a number of epochs."""

from __future__ import annotations

from collections.abc import Iterator
from time import thread_time

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from bench.dial.methods import METHODS, make_optimizer, repeated, take_step
from bench.dial.tasks import Task

__all__ = ["Training", "train"]


class Training:
    """Initial weights, wrong labels and the order of batches depend on ``seed`` alone: runs of two methods are a pair.

    ``repeats``: past its last step a run begins again, radius and learning rate included, on the weights that it has.
    """

    def __init__(self, task: Task, method: str, rho: float | None, seed: int, *, steps: int, held_out: bool, repeats: bool = False) -> None:
        self._method, self._batch_size = method, task.batch_size
        self.problem = task.make(seed, task.samples, held_out)
        radius = None if rho is None else METHODS[method].radius(rho, steps)
        self._optimizer = make_optimizer(method, self.problem.model, task.base, repeated(radius, steps) if repeats else radius)
        self._schedule = CosineAnnealingLR(self._optimizer, T_max=steps)
        self._batches = self._in_order(torch.Generator().manual_seed(seed))

    def _in_order(self, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Batches of one size, as BatchNorm needs them: the last, shorter one of an epoch is left out."""
        while True:
            order = torch.randperm(len(self.problem.labels), generator=generator)
            yield from (batch for batch in order.split(self._batch_size) if len(batch) == self._batch_size)

    def step(self) -> None:
        batch = next(self._batches)
        take_step(self._method, self._optimizer, self.problem.model, self.problem.inputs[batch], self.problem.labels[batch])
        self._schedule.step()


def train(task: Task, method: str, rho: float | None, seed: int, *, epochs: int, held_out: bool) -> tuple[float, float]:
    """Return the score after the last step, and the seconds of processor time that the steps took."""
    steps = epochs * (task.samples // task.batch_size)
    training = Training(task, method, rho, seed, steps=steps, held_out=held_out)
    start = thread_time()
    for _ in range(steps):
        training.step()
    return training.problem.score(), thread_time() - start
