"""Steps whose gradients do not depend on the weights: those of float32 parameters are those of 16-bit ones with masters, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.optim.directions import FirstGradient
from tests.helpers.compare import assert_same_bits

__all__ = [
    "SHAPES",
    "WAYS",
    "assert_masters",
    "assert_rounded",
    "assert_whole",
    "closure_of",
    "grads_of",
    "look",
    "masters_of",
    "params_of",
    "run",
    "saved_masters_of",
    "take_step",
]

SHAPES = ((5,), (103, 10), (300,))
WAYS = ("closure", "micro-batches", "n-SAM", "two steps", "backward")
Dtypes = torch.dtype | Sequence[torch.dtype]


def _each(dtypes: Dtypes) -> Sequence[torch.dtype]:
    return [dtypes] * len(SHAPES) if isinstance(dtypes, torch.dtype) else dtypes


def params_of(dtypes: Dtypes) -> list[nn.Parameter]:
    """Values that all dtypes have."""
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(shape, generator=generator).to(torch.float16).to(torch.bfloat16) for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value, dtype in zip(values, _each(dtypes), strict=True)]


def grads_of(i: int) -> list[Tensor]:
    """Multiples of 1/8 up to 2: all dtypes have them, and the means of two."""
    generator = torch.Generator().manual_seed(100 + i)
    return [torch.randint(-16, 17, shape, generator=generator) / 8 for shape in SHAPES]


def closure_of(
    params: Sequence[Tensor],
    first: int,
    *,
    seen: list[list[Tensor]] | None = None,
    loss: float = 0.0,
    spoil: Callable[[int], Any] = lambda _: None,
) -> Callable[..., float]:
    """A closure with other gradients at every call. ``seen``: gets the weights of every call. ``spoil``: called with the number of the
    call, from 1, when the gradients are there."""
    calls = 0

    def closure(*_: Any) -> float:
        nonlocal calls
        if seen is not None:
            seen.append([param.detach().clone() for param in params])
        for param, grad in zip(params, grads_of(first + calls), strict=True):
            param.grad = grad.to(param.dtype) if param.requires_grad else None
        calls += 1
        spoil(calls)
        return loss

    return closure


def take_step(way: str, optimizer: Any, params: Sequence[Tensor], i: int, *, seen: list[list[Tensor]] | None = None) -> None:
    """One of :data:`WAYS` to take a step."""
    closure, other = closure_of(params, 10 * i, seen=seen), closure_of(params, 10 * i + 5, seen=seen)
    if way == "closure":
        optimizer.step(closure)
    elif way == "micro-batches":
        optimizer.step([closure, other])
    elif way == "n-SAM":
        optimizer.step(closure, ascent_closure=other)
    elif way == "two steps":
        if optimizer.direction.first_gradient is FirstGradient.ELSEWHERE:
            optimizer.random_step()
        if optimizer.direction.first_gradient is not FirstGradient.NONE:
            closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)
    elif way == "backward":
        optimizer.backward(closure)
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError(way)


def run(optimizer: Any, params: Sequence[Tensor], steps: range = range(4)) -> None:
    for i in steps:
        optimizer.step(closure_of(params, 10 * i))


def look(optimizer: Any, params: Sequence[Tensor]) -> None:
    """A step that is given up in its second pass, when the masters have followed the parameters."""

    def fail(call: int) -> None:
        if call == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        optimizer.step(closure_of(params, 50, spoil=fail))


def masters_of(optimizer: Any) -> list[Tensor | None]:
    """Of each parameter, None where it has none; the tensors themselves."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return list(optimizer._memory.entries("master_param", params)) if optimizer._memory.has_masters else [None] * len(params)


def saved_masters_of(optimizer: Any) -> list[Tensor]:
    """As a checkpoint has them."""
    state = optimizer.state_dict()["state"]
    return [state[i]["master_param"] for i in sorted(state)]


def assert_rounded(params: Sequence[Tensor], masters: Sequence[Tensor | None]) -> None:
    """Every parameter that has a master is its rounding."""
    pairs = [(param, master) for param, master in zip(params, masters, strict=True) if master is not None]
    assert_same_bits("params", [param for param, _ in pairs], [master.to(param.dtype) for param, master in pairs])


def assert_masters(optimizer: Any, params: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Masters, or parameters without one, are ``expected``; other parameters are their masters, rounded."""
    masters = masters_of(optimizer)
    assert_rounded(params, masters)
    found = [param if master is None else master for param, master in zip(params, masters, strict=True)]
    assert_same_bits("masters", found, expected)


def assert_whole(optimizer: Any, params: list[nn.Parameter]) -> None:
    """Parameters are their masters' rounding, and groups and state are the parameters'."""
    assert_rounded(params, masters_of(optimizer))
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(left is right for left, right in zip(held, params, strict=True))
    assert set(optimizer.state) <= set(params)
