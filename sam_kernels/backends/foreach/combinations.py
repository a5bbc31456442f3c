"""Inner products and weighted sums of two lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.backends.foreach._rows import arithmetic_dtypes, exact, joined_norm, scale_, skip_of, widen, write
from sam_kernels.operations import Combine, GradDots, Operands

__all__ = ["combine_", "grad_dots"]

_PIECE = 1024


def grad_dots(op: GradDots, lists: Operands) -> Tensor:  # (3,) float64
    """See :class:`sam_kernels.operations.GradDots`. Summed in float64."""
    dtypes = arithmetic_dtypes(op, lists)
    others = widen(lists["rights"], dtypes)
    if "origins" in lists:
        others = list(torch._foreach_sub(others, widen(lists["origins"], dtypes)))
    wide_lefts, wide_others = ([tensor.reshape(-1).to(torch.float64) for tensor in tensors] for tensors in (lists["lefts"], others))
    pairs = zip(wide_lefts, wide_others, strict=True)
    sums = [torch.stack([_total(left * left), _total(left * other), _total(other * other)]) for left, other in pairs]
    result = torch.stack(sums).sum(dim=0)
    _report(result, op.found_inf)
    return result


def _total(terms: Tensor) -> Tensor:  # (N,) -> ()
    """Their sum, in pieces small enough for one thread: bits do not depend on the number of threads."""
    while terms.numel() > _PIECE:
        terms = torch.nn.functional.pad(terms, (0, -terms.numel() % _PIECE)).reshape(-1, _PIECE).sum(dim=1)
    return terms.sum()


def combine_(op: Combine, lists: Operands) -> Tensor:  # () float32, float64 where an out is float64
    """See :class:`sam_kernels.operations.Combine`."""
    skip = skip_of(None, op.found_inf)
    dtypes = arithmetic_dtypes(op, lists)
    terms = []
    for role, weight in (("lefts", op.left_weight), ("rights", op.right_weight), ("origins", op.origin_weight)):
        if role in lists:
            terms.append(widen(lists[role], dtypes, copy=True))
            scale_(terms[-1], exact(weight))
    if "origins" in lists:
        torch._foreach_add_(terms[1], terms.pop())
    torch._foreach_add_(terms[0], terms[1])
    results = terms[0]
    norm = joined_norm(torch._foreach_norm([result.to(torch.float64) for result in results])).to(arithmetic_dtype(lists["outs"]))
    if skip is not True:
        write(lists["outs"], results, skip)
    _report(norm, op.found_inf)
    return norm


def _report(result: Tensor, found_inf: Tensor | None) -> None:
    """Sets the flag where a number is not finite. Waits for no device."""
    if found_inf is not None:
        found_inf.logical_or_(~torch.isfinite(result).all())
