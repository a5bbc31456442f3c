"""Cut a batch into micro-batches: every tensor, array and list of the samples' data in it, whatever containers they lie in."""

from __future__ import annotations

import enum
import numbers
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sam_kernels.optim._batches.structures import Structure, attributes_of, structure_of

__all__ = ["cut_batch"]

# Every micro-batch gets these as they are.
_SHARED = (
    type(None),
    str,
    bytes,
    bytearray,
    numbers.Number,
    enum.Enum,
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.Generator,
    torch.amp.GradScaler,
    torch.optim.Optimizer,
    nn.Module,
)
_SETTINGS = (type(None), type, torch.dtype, torch.device, torch.layout, torch.memory_format, nn.Module)  # a list of these is no data
_DEPTH = 8  # levels at which tensors are looked for in objects of unknown classes
_CLOSURES = "cut the batch yourself and pass a list of closures, one for each micro-batch"


class _Rows(NamedTuple):
    """A tensor, an array, or a list or tuple without tensors."""

    name: str
    value: Any
    rows: int

    @property
    def is_tensor(self) -> bool:
        return _is_tensor(self.value)


def cut_batch(batch: Sequence[Any], micro_batches: int) -> list[Sequence[Any]]:
    """Return ``micro_batches`` batches of the same structure, each with its share of the rows. Tensors and arrays are views.

    Mappings, dataclasses, attrs classes, namespaces, named tuples, lists and tuples are rebuilt around their cut entries. A list that holds
    no tensor is data of the samples and is cut; so is a tuple of as many strings as there are rows. Every micro-batch gets numbers,
    strings, callables, modules and objects without tensors as they are.

    Raises TypeError for objects that hold tensors and cannot be cut, ValueError for rows that disagree or cannot be shared out equally.
    """
    is_cut = micro_batches > 1  # else nothing has to be cuttable
    found = list(_rows_in(batch, "batch", strict=is_cut, is_top=True))
    first = next((each for each in found if each.is_tensor), None)
    if first is None:
        raise ValueError("SAM.step: batch holds no tensor")
    for each in found:
        if each.is_tensor and each.rows != first.rows:
            raise ValueError(f"SAM.step: {each.name} has {each.rows} rows, {first.name} has {first.rows}")
        if is_cut and not each.is_tensor:
            _check_list(each, first)
    if first.rows == 0 or first.rows % micro_batches != 0:
        raise ValueError(f"SAM.step: {first.rows} rows of batch cannot be cut into {micro_batches} equal micro-batches")
    if not is_cut:
        return [batch]
    share = first.rows // micro_batches
    return [_piece(batch, "batch", slice(j * share, (j + 1) * share), first.rows, is_top=True) for j in range(micro_batches)]


def _rows_in(value: Any, name: str, *, strict: bool, is_top: bool = False) -> Iterator[_Rows]:
    """Everything with rows inside ``value``. ``strict``: raise TypeError for an object that cannot be cut."""
    if _is_tensor(value):
        if strict:
            _check_dense(value, name)
        if len(value.shape) == 0:
            raise ValueError(f"SAM.step: {name} has no dimension to cut; pass a number, or use it without passing it")
        yield _Rows(name, value, int(value.shape[0]))
        return
    structure = _structure(value, name, is_top=is_top)
    if structure is not None:
        for entry_name, entry in structure.entries:
            yield from _rows_in(entry, entry_name, strict=strict)
    elif _is_list(value):
        if not all(isinstance(leaf, _SETTINGS) or callable(leaf) for leaf in _leaves(value)):
            yield _Rows(name, value, len(value))
    elif strict:
        _check_shared(value, name)


def _check_list(found: _Rows, first: _Rows) -> None:
    """A list of data has a row for each sample; a tuple may be a setting, such as the size of an image."""
    if isinstance(found.value, tuple):
        if found.rows == first.rows and not _holds_strings(found.value):
            raise ValueError(
                f"SAM.step: {found.name} is a tuple of {found.rows} entries without tensors, as many as {first.name} has rows: pass a list "
                "if they are one for each sample, and use it in the closure without passing it if they are not"
            )
    elif found.rows != first.rows:
        raise ValueError(
            f"SAM.step: {found.name} is a list of {found.rows} entries without tensors, {first.name} has {first.rows} rows: a list is cut "
            "with the batch. If it is not one of the samples' data, use it in the closure without passing it, or pass a tuple"
        )


def _piece(value: Any, name: str, part: slice, rows: int, *, is_top: bool = False) -> Any:
    if _is_tensor(value):
        return value[part]
    structure = _structure(value, name, is_top=is_top)
    if structure is not None:
        pieces = [_piece(entry, entry_name, part, rows) for entry_name, entry in structure.entries]
        changed = {i: new for i, (new, (_, old)) in enumerate(zip(pieces, structure.entries, strict=True)) if new is not old}
        return structure.rebuild(changed) if changed else value
    if not _is_list(value) or len(value) != rows or all(isinstance(leaf, _SETTINGS) or callable(leaf) for leaf in _leaves(value)):
        return value
    try:
        return value[part]
    except TypeError:  # a deque
        return type(value)(list(value)[part])


def _structure(value: Any, name: str, *, is_top: bool) -> Structure | None:
    """The container whose entries are cut one by one; None for a list that is cut as a whole, and for everything that is no container."""
    if isinstance(value, (*_SHARED, PackedSequence)):
        return None
    return None if _is_list(value) and not is_top and not _holds_tensor(value) else structure_of(value, name)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (*_SHARED, PackedSequence)) and not hasattr(value, "_fields")


def _is_tensor(value: Any) -> bool:
    """Or one of NumPy's arrays, which can only have come from a NumPy that is imported."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _check_dense(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        return
    kind = "a nested tensor" if value.is_nested else "" if value.layout is torch.strided else f"a {value.layout} tensor"
    if any(base.__name__ == "DTensor" for base in type(value).__mro__):
        kind = "a DTensor"
    if kind:
        raise TypeError(f"SAM.step: {name} is {kind}, which cannot be cut into micro-batches; pass a dense local tensor, or {_CLOSURES}")


def _check_shared(value: Any, name: str) -> None:
    """Whether every micro-batch may get the object as it is."""
    if isinstance(value, PackedSequence):
        raise TypeError(
            f"SAM.step: {name} is a PackedSequence, which cannot be cut into micro-batches; pass the padded tensor and the lengths and "
            f"pack them in the closure, or {_CLOSURES}"
        )
    if isinstance(value, _SHARED):
        return
    if isinstance(value, Iterator):
        raise TypeError(f"SAM.step: {name} is an iterator ({type(value).__name__}), which the first micro-batch would use up; pass a list")
    if not callable(value) and _holds_tensor(value):
        raise TypeError(
            f"SAM.step: {name} is a {type(value).__name__}, which holds tensors and cannot be cut into micro-batches; pass its tensors, or "
            f"a mapping or dataclass of them, and build it in the closure, or {_CLOSURES}"
        )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, Set) or _is_list(value):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _holds_strings(value: Sequence[Any]) -> bool:
    return all(isinstance(entry, str | bytes) for entry in value)


def _holds_tensor(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a tensor or an array lies anywhere in a container, or in the attributes of an object."""
    if _is_tensor(value):
        return True
    if isinstance(value, _SHARED) or depth == 0:
        return False
    if isinstance(value, Mapping):
        inside = [*value.values(), *(each for _, each in attributes_of(value))]
    elif isinstance(value, Set | Sequence):
        inside = [*value, *(each for _, each in attributes_of(value))]
    elif callable(value):
        return False
    else:
        inside = [each for _, each in attributes_of(value)]
    return any(_holds_tensor(each, depth - 1) for each in inside)
