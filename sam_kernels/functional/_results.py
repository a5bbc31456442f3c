"""Norms and sums that operations return: of several parts joined, reported to flags, and without values for FakeTensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels._grouping import Part
from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.functional._common import Tensors
from sam_kernels.operations import Centralize, Combine, GradDots

__all__ = ["combine_norms", "joined", "norm_like", "run_reporting"]


def combine_norms(norms: Sequence[Tensor]) -> Tensor:
    """sqrt(sum of squares) of norms over disjoint parts, elementwise, on the first one's device. float64 where one of them is."""
    if len(norms) == 1:
        return norms[0]
    wide = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    return cast(Tensor, torch.linalg.vector_norm(wide, dim=0)).to(arithmetic_dtype(norms))


def joined(norms: Sequence[Tensor]) -> Tensor:  # ()
    """As :func:`combine_norms`; 0 on the CPU for no parts, as of empty lists."""
    return combine_norms(norms) if norms else norm_like(())


def norm_like(tensors: Tensors, *shape: int) -> Tensor:
    """A tensor for norms over these tensors, on the device of the first: without values, or zeros on the CPU for no tensors."""
    if not tensors:
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    return tensors[0].new_empty(shape, dtype=arithmetic_dtype(tensors))


def run_reporting(op: Centralize | Combine | GradDots, parts: Sequence[Part], join: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """The results of all parts, joined. ``op.found_inf`` is set if the joined result is not finite.

    One backend reports by itself, on a device within the launch that finishes the result. Several backends report nothing, but for
    :class:`Combine`, which reads the flag too.
    """
    is_alone = len(parts) == 1 and (op.found_inf is None or op.found_inf.device == parts[0].lists.device)
    mine = op if is_alone or isinstance(op, Combine) else dataclasses.replace(op, found_inf=None)
    results: list[Tensor] = [part.run(mine) for part in parts]
    if is_alone:
        return results[0]
    result = join(results)
    report_norm(torch.linalg.vector_norm(result, ord=torch.inf), op.found_inf)
    return result
