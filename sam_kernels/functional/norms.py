"""Norms of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_kernels import _validate
from sam_kernels._flags import report_norm
from sam_kernels._grouping import split
from sam_kernels._tensor_list import are_trusted
from sam_kernels.functional._common import Tensors, check_lists, params_if
from sam_kernels.functional._flat import GROUPS
from sam_kernels.functional._library import operation
from sam_kernels.functional._results import combine_norms, norm_like
from sam_kernels.operations import CheckFinite, GradNorms

__all__ = ["check_finite_", "fake_norm", "grad_norm", "grad_norm_", "grad_norms"]


def fake_norm(*, grads: Tensors, **_: Any) -> Tensor:
    return norm_like(grads)


def _fake_norms(*, grad_groups: Tensors, group_sizes: Sequence[int], **_: Any) -> Tensor:
    """``grad_groups`` flattened."""
    return norm_like(grad_groups, len(group_sizes))


@operation(written=("found_inf",), fake=fake_norm)
def grad_norm(
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Global 2-norm of the gradients: sqrt(sum g^2), or of T_w g with T_w = |p| + eta when ``adaptive`` (ASAM).

    Sums in float64 on the CPU, in float32 in the Triton kernels. The order is fixed: bits depend neither on the number of threads nor on
    the instruction set.
    ``found_inf`` is set to 1 where the norm is not finite, and left alone otherwise. An adaptive norm is NaN where a weight is not finite
    and its gradient is 0 (inf 0): :func:`perturb_` with this norm or ``found_inf`` then changes nothing.
    Reads g (and p): N s bytes.
    """
    return _grad_norms("grad_norm", [grads], params, adaptive=adaptive, eta=eta, found_inf=found_inf)[0]


@operation(written=("norm", "found_inf", "skipped"))
def grad_norm_(
    norm: Tensor,  # () any floating dtype, into which the norm of grad_norm is rounded
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # ()
    skipped: Tensor | None = None,  # () float32 or float64
) -> None:
    """:func:`grad_norm` into ``norm``, so that nothing is allocated.

    With ``skipped`` a new step begins: what ``found_inf`` was is added to ``skipped`` first, and it starts from 0. On a device that is part
    of the launch which finishes the norm.
    """
    _validate.check_scalar_tensor("grad_norm_", "norm", norm)
    if skipped is not None:
        _validate.check_counter("grad_norm_", "skipped", skipped)
        if found_inf is None:
            raise ValueError("grad_norm_: skipped needs found_inf, which it counts")
    _grad_norms("grad_norm_", [grads], params, adaptive=adaptive, eta=eta, found_inf=found_inf, skipped=skipped, out=norm)


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
    return _grad_norms("grad_norms", grad_groups, params, adaptive=adaptive, eta=eta)


def _grad_norms(
    name: str,
    groups: Sequence[Tensors],
    params: Tensors | None,
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    _validate.check_flag(name, "adaptive", adaptive)
    eta = _validate.check_number(name, "eta", eta, low=0.0)
    if found_inf is not None:
        _validate.check_scalar_tensor(name, "found_inf", found_inf)
    used_params = params_if(adaptive, name, params)
    for j, group in enumerate(groups):
        if not are_trusted((group, used_params)):
            role = f"grad_groups[{j}]" if name == "grad_norms" else "grads"
            _validate.check_lists(name, {role: group, "params": used_params})
    grads = groups[0] if len(groups) == 1 else [grad for group in groups for grad in group]
    repeated = used_params if used_params is None or len(groups) == 1 else [param for _ in groups for param in used_params]
    group_of_row = [j for j, group in enumerate(groups) for _ in group] if len(groups) != 1 else None
    row_groups = split({"grads": grads, "params": repeated})
    # One backend reports by itself, on a device within the launch that finishes the norm.
    report: dict[str, Tensor | None] = {"found_inf": found_inf, "skipped": skipped, "out": out}
    alone = len(row_groups) == 1 and all(tensor is None or tensor.device == grads[0].device for tensor in report.values())
    reported = report if alone else {}
    norms = []
    for rows in row_groups:
        indices = rows.lists.indices
        sizes = [len(indices)] if group_of_row is None else _count(group_of_row, indices, len(groups))
        norms.append(rows.run(GradNorms(group_sizes=sizes, adaptive=adaptive, eta=eta, **reported)))
    result = combine_norms(norms) if norms else norm_like((), len(groups))
    return result if alone or len(groups) != 1 else report_norm(result[0], **report).reshape(1)


@operation(written=CheckFinite.reports)
def check_finite_(grads: Tensors, found_inf: Tensor) -> None:
    """Sets ``found_inf`` () to 1 where an element of the gradients is not finite, and leaves it alone otherwise. Reads g: N s bytes."""
    _validate.check_scalar_tensor(CheckFinite.name, "found_inf", found_inf)
    lists: dict[str, Tensors | None] = {"grads": grads}
    check_lists(CheckFinite, lists)
    for rows in split(lists):
        here = found_inf if found_inf.device == rows.lists.device else found_inf.to(rows.lists.device)
        rows.run(CheckFinite(found_inf=here))
        if here is not found_inf:
            found_inf.logical_or_(here.to(found_inf.device))


def _count(group_of_row: Sequence[int], indices: Sequence[int], groups: int) -> list[int]:
    counts = [0] * groups
    for i in indices:
        counts[group_of_row[i]] += 1
    return counts
