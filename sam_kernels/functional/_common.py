"""Types and checks that the operations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._tensor_list import TensorList, are_trusted
from sam_kernels.operations import Operation

__all__ = ["StepRows", "Tensors", "TensorsOrNone", "by_first_step", "check_lists", "check_with_gaps", "checked", "filled", "params_if"]

_Op = TypeVar("_Op", bound=Operation)
Tensors = Sequence[Tensor]
TensorsOrNone = list[Tensor | None] | TensorList  # None: a row's first step


def checked(op: _Op) -> _Op:
    """Check the options of an operation that was just made as its class describes them, and return it with Python floats for its numbers.

    A number that may be a tensor stays one (``_validate.check_number_or_tensor``). Nobody else has ``op`` yet: it is changed in place.

    Raises TypeError for a wrong type, ValueError for a number out of range or a tensor that holds no single number.
    """
    name = op.name
    for field, limits in op.limits.items():
        value = getattr(op, field)
        if (type(value) is float and limits.least <= value <= limits.most) or (value is None and field in op.optional):
            continue
        if type(value) is int and limits.least <= value <= limits.most:
            number: object = float(value)
        elif field in op.numbers:
            number = _validate.check_number_or_tensor(name, field, value, low=limits.low, high=limits.high)
        else:
            number = _validate.check_number(name, field, value, low=limits.low, high=limits.high, open_low=limits.open_low)
        if number is not value:
            object.__setattr__(op, field, number)  # of a frozen dataclass
    for field in op.flags:
        if type(value := getattr(op, field)) is not bool:
            _validate.check_flag(name, field, value)
    for field in op.scalars:
        value = getattr(op, field)
        if value is not None or field not in op.optional:
            _validate.check_scalar_tensor(name, field, value)
    return op


def params_if(adaptive: bool, op: str, params: Tensors | None) -> Tensors | None:
    """The parameters that a norm reads: none unless it is ``adaptive``. Raises ValueError if they are missing."""
    if adaptive and params is None:
        raise ValueError(f"{op}: adaptive=True needs params")
    return params if adaptive else None


def check_lists(op: type[Operation] | Operation, lists: Mapping[str, Tensors | None]) -> None:
    """Check lists that are not trusted. Raises TypeError or ValueError if they do not fit each other, or if lists that are written share
    memory: with the options of ``op``, or with some options of its class."""
    if not are_trusted(lists.values()):
        _validate.check_lists(op.name, lists, written=_written(op))


def _written(op: type[Operation] | Operation) -> tuple[str, ...]:
    return op.writes if isinstance(op, Operation) else op.written


def check_with_gaps(op: type[Operation] | Operation, lists: dict[str, Tensors | None], name: str, entries: TensorsOrNone) -> None:
    """As :func:`check_lists`, with one more list called ``name`` whose entries may be None: None fits every row."""
    if not isinstance(entries, list):
        raise TypeError(f"{op.name}: {name} must be a list of tensors or None, got {_validate.describe(entries)}")
    if are_trusted((*lists.values(), entries)):
        return
    _validate.check_lists(op.name, lists)
    first_name, first = next((key, tensors) for key, tensors in lists.items() if tensors is not None)
    if len(entries) != len(first):
        raise ValueError(f"{op.name}: {name} has {len(entries)} tensors, {first_name} has {len(first)}")
    _validate.check_lists(op.name, {first_name: first, name: filled(entries, first)})
    everything: dict[str, Sequence[Tensor | None] | None] = {**lists, name: entries}
    _validate.check_distinct(op.name, {key: everything[key] or [] for key in _written(op)})


def filled(entries: Sequence[Tensor | None], stand_ins: Tensors) -> list[Tensor]:
    """The entries, with the tensor of the same row in the place of None."""
    return [stand_in if entry is None else entry for entry, stand_in in zip(entries, stand_ins, strict=True)]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of lists that all make their first step, or all make a later one.

    Attributes:
        is_first: whether it is the first step.
        lists: by role, with the list whose entries may be None: zeros for a first step, or no list.
        indices: the rows in the caller's lists; None: all of them.
    """

    is_first: bool
    lists: dict[str, Tensors | None]
    indices: list[int] | None = None

    def put_back(self, name: str, entries: TensorsOrNone) -> None:
        """Put the tensors that a first step has filled into the caller's list."""
        for i, tensor in zip(self.indices or (), self.lists[name] or (), strict=True):
            entries[i] = tensor


def by_first_step(lists: Mapping[str, Tensors | None], name: str, entries: TensorsOrNone, *, like: str | None) -> list[StepRows]:
    """The rows whose entry in the list ``name`` is None, then the others. A first step gets zeros like the tensors of the list ``like``."""
    everything: dict[str, Sequence[Any] | None] = {**lists, name: entries}
    if isinstance(entries, TensorList) or all(entry is not None for entry in entries):
        return [StepRows(False, everything)]
    found = []
    for is_first in (True, False):
        indices = [i for i, entry in enumerate(entries) if (entry is None) is is_first]
        if indices:
            part: dict[str, Tensors | None]
            part = {role: None if tensors is None else [tensors[i] for i in indices] for role, tensors in everything.items()}
            if is_first:
                part[name] = None if like is None else [torch.zeros_like(tensor) for tensor in part[like] or ()]
            found.append(StepRows(is_first, part, indices))
    return found
