"""Helpers of the operations: rows in the arithmetic type, norms, factors, and results rounded to storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.operations import Adaptive, Number, Operands, Operation

__all__ = [
    "add_scaled_", "arithmetic_dtypes", "asam_weights", "exact", "is_host", "joined_norm", "norms_of", "number_of", "rows_of", "scale_",
    "skip_of", "start", "wide", "widen", "write",
]  # fmt: skip


def rows_of(op: Operation, lists: Operands) -> list[tuple[Tensor, ...]]:
    """The tensors of each row, in the order of the operation's roles. Counters of steps belong to none."""
    return list(zip(*(lists[role] for role in op.roles if role in lists), strict=True))


def arithmetic_dtypes(op: Operation, lists: Operands) -> list[torch.dtype]:
    """The arithmetic type of each row."""
    return [arithmetic_dtype(row) for row in rows_of(op, lists)]


def asam_weights(params: Sequence[Tensor], eta: float) -> list[Tensor]:
    """T = |p| + eta of every parameter."""
    weights = torch._foreach_abs(list(params))
    torch._foreach_add_(weights, eta)
    return list(weights)


def norms_of(op: Adaptive, tensors: Sequence[Tensor], lists: Operands) -> list[Tensor]:  # n () float64
    """The norm of every tensor, or of T times it if the operation is adaptive, summed in float64."""
    terms = [tensor.to(torch.float64) for tensor in tensors]
    if op.adaptive:
        terms = list(torch._foreach_mul(asam_weights([param.to(torch.float64) for param in lists["params"]], op.eta), terms))
    return list(torch._foreach_norm(terms))


def joined_norm(norms: Sequence[Tensor]) -> Tensor:  # ()
    """The norm of all tensors together, from their norms."""
    result: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return result


def wide(scalar: Tensor) -> Tensor:  # one element -> () float64
    return scalar.reshape(()).to(torch.float64)


def widen(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, copy: bool = False) -> list[Tensor]:
    """The tensors in the arithmetic type: themselves where they are of it, unless a ``copy`` is asked for."""
    return [tensor.to(dtype, copy=copy) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def write(destinations: Sequence[Tensor], results: Sequence[Tensor], skip: Tensor | None) -> None:
    """Rounds the results once into their destinations, where they are not these already, except where the step is skipped."""
    for destination, result in zip(destinations, results, strict=True):
        if result is not destination:
            rounded = result.to(destination.dtype)
            destination.copy_(rounded if skip is None else torch.where(skip, destination, rounded))


def is_host(scalar: Tensor) -> bool:
    """Whether reading a number waits for nobody."""
    return scalar.device.type == "cpu"


def skip_of(norm: Tensor | None, found_inf: Tensor | None) -> Tensor | Literal[True] | None:
    """Whether to skip: known on the CPU, () bool on another device, None where nothing can ask for it."""
    flags = []
    if norm is not None:
        flags.append(~torch.isfinite(norm.reshape(())))
    if found_inf is not None:
        flags.append(found_inf.reshape(()) != 0)
    if not flags:
        return None
    skip = flags[0] if len(flags) == 1 else flags[0] | flags[1]
    if is_host(skip):
        return True if bool(skip) else None
    return skip


def number_of(scalar: Tensor) -> Tensor | float:
    return float(scalar) if is_host(scalar) else scalar


def exact(number: Number) -> Tensor | float:
    """A hyperparameter to calculate with: a number, or () float64 where reading it would wait for a device."""
    return number_of(number.to(torch.float64)) if isinstance(number, Tensor) else number


def add_scaled_(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Tensor | float) -> None:
    """tensors <- tensors + factor others."""
    if isinstance(factor, float):
        torch._foreach_add_(list(tensors), list(others), alpha=factor)
    else:
        torch._foreach_add_(list(tensors), [other * factor.to(other.dtype) for other in others])


def scale_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    if isinstance(factor, float):
        torch._foreach_mul_(list(tensors), factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.dtype))


def start(
    params: Sequence[Tensor], old_params: Sequence[Tensor] | None, dtypes: Sequence[torch.dtype], skip: Tensor | None
) -> list[Tensor]:
    """What an operation starts from, in the arithmetic type, to be changed in place: the parameters, restored first where there are
    ``old_params``, or a copy of a backup that is of a wider type than its parameter."""
    if old_params is None:
        return widen(params, dtypes, copy=skip is not None)
    torch._foreach_copy_(list(params), list(old_params))
    sources = [old if old.dtype is not param.dtype else param for param, old in zip(params, old_params, strict=True)]
    copies = [source is not param or skip is not None for source, param in zip(sources, params, strict=True)]
    return [source.to(dtype, copy=copy) for source, dtype, copy in zip(sources, dtypes, copies, strict=True)]
