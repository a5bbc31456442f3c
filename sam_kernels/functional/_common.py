"""Types and checks that the operations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sam_kernels import _validate
from sam_kernels._tensor_list import TensorList, are_trusted
from sam_kernels.operations import Operation

__all__ = ["Tensors", "TensorsOrNone", "check_amp", "check_clip", "check_lists", "check_with_gaps", "first_and_later", "pick"]

Tensors = Sequence[Tensor]
TensorsOrNone = list[Tensor | None] | TensorList  # None: a row's first step


def check_lists(op: type[Operation], lists: Mapping[str, Tensors | None]) -> None:
    """Lists that operations trust are not looked at. Raises TypeError or ValueError for others that do not fit each other."""
    if not are_trusted(lists.values()):
        _validate.check_lists(op.name, lists, written=op.written)


def check_with_gaps(op: str, lists: dict[str, Tensors | None], name: str, entries: TensorsOrNone, *, written: tuple[str, ...]) -> None:
    """As ``_validate.check_lists``, with one more list called ``name`` whose entries may be None: these fit every row."""
    if not isinstance(entries, list):
        raise TypeError(f"{op}: {name} must be a list of tensors or None, got {_validate.describe(entries)}")
    if are_trusted((*lists.values(), entries)):
        return
    _validate.check_lists(op, lists)
    first_name, first = next((key, tensors) for key, tensors in lists.items() if tensors is not None)
    if len(entries) != len(first):
        raise ValueError(f"{op}: {name} has {len(entries)} tensors, {first_name} has {len(first)}")
    stand_ins = [tensor if entry is None else entry for tensor, entry in zip(first, entries, strict=True)]
    _validate.check_lists(op, {first_name: first, name: stand_ins})
    everything: dict[str, Sequence[Tensor | None] | None] = {**lists, name: entries}
    _validate.check_distinct(op, {key: everything[key] or [] for key in written})


def first_and_later(entries: Sequence[Tensor | None] | None) -> list[tuple[bool, list[int] | None]]:
    """The rows whose entry is None, then the others: (whether it is their first step, indices, None for all rows)."""
    first = [] if entries is None or isinstance(entries, TensorList) else [i for i, entry in enumerate(entries) if entry is None]
    if not first or entries is None:
        return [(False, None)]
    later = sorted(set(range(len(entries))) - set(first))
    return [(True, first), *([(False, later)] if later else [])]


def pick(tensors: Tensors | None, indices: list[int] | None) -> Tensors | None:
    return tensors if tensors is None or indices is None else [tensors[i] for i in indices]


def check_amp(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if grad_scale is not None:
        _validate.check_scalar_tensor(op, "grad_scale", grad_scale)
    if found_inf is not None:
        _validate.check_scalar_tensor(op, "found_inf", found_inf)


def check_clip(op: str, norm: Tensor | None, max_norm: float | None) -> float | None:
    if norm is not None:
        _validate.check_scalar_tensor(op, "norm", norm)
    if max_norm is None:
        return None
    if norm is None:
        raise ValueError(f"{op}: max_norm needs norm, the norm of the gradients as given")
    return _validate.check_number(op, "max_norm", max_norm, low=0.0)
