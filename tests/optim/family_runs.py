"""Members of the family at work: made, stepped in each way there is, and looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.optim.directions import FirstGradient
from tests.optim.family import BASES, CLOSURES_ONLY, MEMBERS
from tests.optim.problem import closure_of, loss_of, make_batch

__all__ = [
    "CASES",
    "ONE_CASE_EACH",
    "TWO_STEP_CASES",
    "base_of",
    "close",
    "everything_of",
    "make",
    "memory_of",
    "run",
    "state_of",
    "two_steps",
    "using",
    "what_a_skipped_step_leaves",
]

SPS = "SAMSPS"


def base_of(name: str, base: str = "sgd-momentum") -> str:
    """The base of that name, or what a member has in its place."""
    return "sps-momentum" if name == SPS else base


def _cases(names: Any, bases: tuple[str, ...]) -> list[Any]:
    pairs = dict.fromkeys((name, base_of(name, base)) for name in names for base in bases)
    return [pytest.param(name, base, id=f"{name}-{base}") for name, base in pairs if base in MEMBERS[name].bases]


CASES = _cases(MEMBERS, ("sgd-momentum", "adamw", "rmsprop"))
ONE_CASE_EACH = _cases(MEMBERS, ("sgd-momentum",))
TWO_STEP_CASES = _cases([name for name in MEMBERS if name not in CLOSURES_ONLY], ("sgd-momentum", "adamw", "rmsprop"))


def make(name: str, params: Any, base: str = "sgd-momentum", **options: Any) -> Any:
    """The optimizer; ``options`` beside the member's own, or in their place."""
    base_class, kwargs = BASES[base_of(name, base)]
    return MEMBERS[name].make(params, base_class, **{**kwargs, **options})


@contextlib.contextmanager
def using(backend: str | None) -> Iterator[None]:
    with contextlib.nullcontext() if backend is None else sam_kernels.use_backend(backend):
        yield


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def run(optimizer: Any, model: nn.Module, steps: int, *, start: int = 0, after: Callable[[], Any] = lambda: None) -> None:
    """Steps with closures on batches start, start + 1, …"""
    for k in range(start, start + steps):
        optimizer.step(closure_of(optimizer, model, make_batch(dtype_of(model), seed=k)))
        after()


def two_steps(optimizer: Any, model: nn.Module, batch: Any, *, zero_first: bool = True, zero_second: bool = True) -> None:
    """One step by first_step and second_step, in the order that the member asks for."""
    optimizer.zero_grad()
    if optimizer.direction.first_gradient is FirstGradient.ELSEWHERE:
        optimizer.random_step()
    if optimizer.direction.first_gradient is not FirstGradient.NONE:
        loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=zero_first)
    if not zero_first:
        optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.second_step(zero_grad=zero_second, **({"loss": loss} if isinstance(optimizer, sam_kernels.SAMSPS) else {}))


def state_of(optimizer: Any) -> list[Tensor]:
    """The base optimizer's."""
    return [value.clone() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def memory_of(optimizer: Any) -> list[Tensor]:
    """What the direction and the descent rule keep, as a checkpoint has it."""
    names = (*optimizer.direction.keeps, *optimizer.descent.keeps)
    saved = optimizer.state_dict()["state"].values()
    found = [state[name] for state in saved for name in names if name in state]
    return [each.clone() for each in found if not each.isnan().all()]


def everything_of(optimizer: Any, model: nn.Module) -> list[Tensor]:
    params = [param.detach().clone() for param in model.parameters()]
    return [*params, *state_of(optimizer), *memory_of(optimizer)]


def what_a_skipped_step_leaves(name: str, optimizer: Any, model: nn.Module) -> list[Tensor]:
    """Everything, but for S2SAM the gradient of the step before: that of a skipped one is not kept."""
    found = everything_of(optimizer, model)
    return found[: len(found) - len(memory_of(optimizer))] if name == "S2SAM" else found


def close(left: list[Tensor], right: list[Tensor], *, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    for i, (got, wanted) in enumerate(zip(left, right, strict=True)):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, msg=lambda text, i=i: f"tensor {i}: {text}")  # type: ignore[misc]
