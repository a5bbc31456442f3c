"""Inner products and weighted sums of two lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.backends.foreach._rows import arithmetic_dtypes, exact, scale_, skip_of, widen, write

__all__ = ["combine_", "grad_dots"]

_PIECE = 1024


def grad_dots(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], origins: Sequence[Tensor] | None, *, found_inf: Tensor | None
) -> Tensor:  # (3,) float64
    """See :func:`sam_kernels.functional.grad_dots`. Summed in float64."""
    dtypes = arithmetic_dtypes(lefts, rights, origins)
    others = widen(rights, dtypes)
    if origins is not None:
        others = list(torch._foreach_sub(others, widen(origins, dtypes)))
    wide_lefts, wide_others = ([tensor.reshape(-1).to(torch.float64) for tensor in tensors] for tensors in (lefts, others))
    pairs = zip(wide_lefts, wide_others, strict=True)
    sums = [torch.stack([_total(left * left), _total(left * other), _total(other * other)]) for left, other in pairs]
    result = torch.stack(sums).sum(dim=0)
    _report(result, found_inf)
    return result


def _total(terms: Tensor) -> Tensor:  # (N,) -> ()
    """Their sum, in pieces small enough for one thread: bits do not depend on the number of threads."""
    while terms.numel() > _PIECE:
        terms = torch.nn.functional.pad(terms, (0, -terms.numel() % _PIECE)).reshape(-1, _PIECE).sum(dim=1)
    return terms.sum()


def combine_(
    outs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    origins: Sequence[Tensor] | None,
    *,
    left_weight: float | Tensor,  # ()
    right_weight: float | Tensor,  # ()
    origin_weight: float | Tensor,  # ()
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where an out is float64
    """See :func:`sam_kernels.functional.combine_`."""
    skip = skip_of(None, found_inf)
    dtypes = arithmetic_dtypes(outs, lefts, rights, origins)
    terms = []
    for tensors, weight in ((lefts, left_weight), (rights, right_weight), (origins, origin_weight)):
        if tensors is not None:
            terms.append(widen(tensors, dtypes, copy=True))
            scale_(terms[-1], exact(weight))
    if origins is not None:
        torch._foreach_add_(terms[1], terms.pop())
    torch._foreach_add_(terms[0], terms[1])
    results = terms[0]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([result.to(torch.float64) for result in results])))
    if skip is not True:
        write(outs, results, skip)
    dtype = torch.float64 if any(out.dtype is torch.float64 for out in outs) else torch.float32
    result: Tensor = norm.to(dtype)
    _report(result, found_inf)
    return result


def _report(result: Tensor, found_inf: Tensor | None) -> None:
    """Sets the flag where a number is not finite. Waits for no device."""
    if found_inf is not None:
        found_inf.logical_or_(~torch.isfinite(result).all())
