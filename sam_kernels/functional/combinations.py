"""Inner products and weighted sums of two lists of tensors: what the descent rules of the SAM family are made of.

GSAM (arXiv 2203.08065), WSAM (arXiv 2305.15817), LookSAM (arXiv 2203.02714), SAM-SPS, and RSAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._grouping import split
from sam_kernels.functional._common import Tensors, check_lists, checked
from sam_kernels.functional._library import operation
from sam_kernels.functional._results import joined, norm_like, run_reporting
from sam_kernels.operations import Combine, GradDots, Number

__all__ = ["combine_", "grad_dots"]


def _fake_dots(*, lefts: Tensors, **_: Any) -> Tensor:
    return norm_like(lefts, 3).to(torch.float64)


def _fake_norm(*, outs: Tensors, **_: Any) -> Tensor:
    return norm_like(outs)


@operation(written=GradDots.reports, fake=_fake_dots)
def grad_dots(
    lefts: Tensors,  # n tensors
    rights: Tensors,  # n tensors
    origins: Tensors | None = None,  # n tensors
    *,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # (3,) float64
    """(sum l^2, sum l d, sum d^2) over all elements, with d = r - o, or d = r without ``origins``; on the device of the first of ``lefts``.

    What GSAM needs (arXiv 2203.08065: <g, g_p> and |g_p|^2), LookSAM (arXiv 2203.02714) and, with the perturbed weights as ``rights`` and
    the saved ones as ``origins``, SAM-SPS: <grad f(e), e - x>, no copy of the ascent gradient being needed.

    d is rounded to the row's arithmetic. Sums are float64 on the CPU, in the order of :func:`grad_norm`'s: bits depend neither on the
    number of threads nor on the instruction set. The CUDA and the Triton kernels sum float32 terms in float32 within a thread or a chunk,
    the chunks in float64, in one order too; the error of sum l d is then relative to |l| |d|. On every backend a sum is infinite only where
    float64 is, or where an element, or a difference r - o, is not finite in the row's arithmetic.
    ``found_inf`` is set to 1 where one of the three is not finite, and left alone otherwise. Empty lists give zeros.
    Reads l, r (and o): 2 N s bytes (3 N s).
    """
    op = checked(GradDots(found_inf=found_inf))
    lists: dict[str, Tensors | None] = {"lefts": lefts, "rights": rights, "origins": origins}
    check_lists(GradDots, lists)
    return run_reporting(op, split(lists), _sum)


def _sum(dots: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.to(dots[0].device) for each in dots]).sum(dim=0) if dots else _fake_dots(lefts=())


@operation(written=(*Combine.written, *Combine.reports), fake=_fake_norm)
def combine_(
    outs: Tensors,  # n tensors
    lefts: Tensors,  # n tensors
    rights: Tensors,  # n tensors
    origins: Tensors | None = None,  # n tensors
    *,
    left_weight: Number,
    right_weight: Number,
    origin_weight: Number = 0.0,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where an out is float64
    """out <- left_weight l + (right_weight r + origin_weight o), and the norm of that.

    ``outs`` may be the tensors of ``lefts``, ``rights`` or ``origins``, row by row: in place. Tensors that overlap in part, or those of
    another row, must not be written. A weight may be any finite number; it is rounded once to the row's arithmetic, and no term is left
    out because it is 0 (0 inf is NaN). No multiplication is fused with an addition: with weights 1 and -1 the term in parentheses is
    r - o, exact where r and o are close, as in RSAM: g <- c g + (p - x).
    GSAM (arXiv 2203.08065): g_p <- (1 + alpha c) g_p - alpha g. WSAM (arXiv 2305.15817): g_p <- k g_p + (1 - k) g. LookSAM (arXiv
    2203.02714): v <- g_s - c g, later g <- g + s v.
    The norm is that of the result before it is rounded to storage, summed as in :func:`grad_norm`; 0 for empty lists.
    Where ``found_inf`` is set nothing is written, and the norm is that of what would have been. It is set to 1 where the norm is not
    finite, when this call may already have written.
    Raises ValueError for an ``origin_weight`` without ``origins``.
    Reads l, r (and o); writes out: 3 N s bytes (4 N s).
    """
    op = checked(Combine(left_weight=left_weight, right_weight=right_weight, origin_weight=origin_weight, found_inf=found_inf))
    if origins is None and not _is_zero(op.origin_weight):
        raise ValueError(f"{op.name}: origin_weight needs origins, which it is multiplied by")
    lists: dict[str, Tensors | None] = {"outs": outs, "lefts": lefts, "rights": rights, "origins": origins}
    check_lists(Combine, lists)
    return run_reporting(op, split(lists, written=op.written), joined)


def _is_zero(weight: Number) -> bool:
    """Without looking at a device."""
    return weight.is_cpu and weight.item() == 0.0 if isinstance(weight, Tensor) else weight == 0.0
