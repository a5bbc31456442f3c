"""Norms of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import split
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import Tensors
from sam_kernels.functional._flat import GROUPS
from sam_kernels.functional._library import operation

__all__ = ["combine_norms", "grad_norm", "grad_norms"]


def _fake_norm(*, grads: Tensors, **_: Any) -> Tensor:
    return _fake_norms(grad_groups=grads, group_sizes=[len(grads)])[0]


def _fake_norms(*, grad_groups: Tensors, group_sizes: Sequence[int], **_: Any) -> Tensor:
    """``grad_groups`` flattened."""
    if not grad_groups:
        return torch.zeros(len(group_sizes))
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in grad_groups) else torch.float32
    return grad_groups[0].new_empty(len(group_sizes), dtype=dtype)


@operation(written=("found_inf",), fake=_fake_norm)
def grad_norm(
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Global 2-norm of the gradients: sqrt(sum g^2), or of T_w g with T_w = |p| + eta when ``adaptive`` (ASAM).

    Sums in float64 on the CPU. The order is fixed: bits depend neither on the number of threads nor on the instruction set.
    ``found_inf`` is set to 1 where the norm is not finite, and left alone otherwise.
    Reads g (and p): N s bytes.
    """
    return _grad_norms("grad_norm", [grads], params, adaptive=adaptive, eta=eta, found_inf=found_inf)[0]


@operation(fake=_fake_norms, flat=GROUPS)
def grad_norms(
    grad_groups: Sequence[Tensors],  # M groups of n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> Tensor:  # (M,) float32, float64 where a gradient is float64
    """:func:`grad_norm` of every group (one micro-batch's gradients each) in one pass. Reads M N s bytes."""
    if not isinstance(grad_groups, list | tuple):
        raise TypeError(f"grad_norms: grad_groups must be a list of lists of tensors, got {_validate.describe(grad_groups)}")
    return _grad_norms("grad_norms", grad_groups, params, adaptive=adaptive, eta=eta, found_inf=None)


def _grad_norms(
    op: str, groups: Sequence[Tensors], params: Tensors | None, *, adaptive: bool, eta: float, found_inf: Tensor | None
) -> Tensor:
    _validate.check_flag(op, "adaptive", adaptive)
    eta = _validate.check_number(op, "eta", eta, low=0.0)
    if adaptive and params is None:
        raise ValueError(f"{op}: adaptive=True needs params")
    if found_inf is not None:
        _validate.check_scalar_tensor(op, "found_inf", found_inf)
    used_params = params if adaptive else None
    for j, group in enumerate(groups):
        if not (isinstance(group, TensorList) and (used_params is None or isinstance(used_params, TensorList))):
            name = "grads" if op == "grad_norm" else f"grad_groups[{j}]"
            _validate.check_lists(op, {name: group, "params": used_params})
    grads = groups[0] if len(groups) == 1 else [grad for group in groups for grad in group]
    repeated = used_params if used_params is None or len(groups) == 1 else [param for _ in groups for param in used_params]
    group_of_row = [j for j, group in enumerate(groups) for _ in group] if len(groups) != 1 else None
    norms = []
    for rows in split({"grads": grads, "params": repeated}):
        sizes = [len(rows.indices)] if group_of_row is None else _count(group_of_row, rows.indices, len(groups))
        norms.append(rows.backend.grad_norms(rows.lists["grads"], rows.lists["params"], sizes, adaptive=adaptive, eta=eta))
    result = combine_norms(norms) if norms else torch.zeros(len(groups))
    if found_inf is not None:
        _mark_not_finite(result[0], found_inf)
    return result


def _mark_not_finite(norm: Tensor, found_inf: Tensor) -> None:
    if norm.device.type != "cpu":
        found_inf.logical_or_(~torch.isfinite(norm).to(found_inf.device))
    elif not math.isfinite(norm.item()):  # five small torch operations less than the line above
        found_inf.fill_(1.0)


def combine_norms(norms: Sequence[Tensor]) -> Tensor:
    """sqrt(sum of squares) of norms over disjoint parts, elementwise, on the first one's device. float64 where one of them is."""
    if len(norms) == 1:
        return norms[0]
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    wide = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    return cast(Tensor, torch.linalg.vector_norm(wide, dim=0)).to(dtype)


def _count(group_of_row: Sequence[int], indices: Sequence[int], groups: int) -> list[int]:
    counts = [0] * groups
    for i in indices:
        counts[group_of_row[i]] += 1
    return counts
