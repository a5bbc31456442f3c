"""Lists of tensors cut into what one backend call can take: one device, dtypes it has kernels for, dense, one memory order a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._backend import Backend
from sam_kernels._tensor_list import TensorList, are_trusted, is_dense_row, slices_are_runs
from sam_kernels.operations import Operands, Operation

__all__ = ["Part", "run", "split"]


@dataclass(slots=True)
class Part:
    """Rows that one backend call takes."""

    backend: Backend
    lists: Operands
    write_back: Sequence[tuple[Tensor, Tensor]] = field(default=())

    def run(self, op: Operation) -> Any:
        """Makes ``op`` of these rows. The results of rows that had to be computed in a dense copy go where the caller wants them."""
        result = self.backend.run(op, self.lists)
        for destination, source in self.write_back:
            destination.copy_(source)
        return result


def run(op: Operation, lists: Mapping[str, Sequence[Tensor] | None]) -> list[Any]:
    """What the backend of each part of the lists returns for ``op``. ``lists`` by role: checked, or trusted."""
    return [part.run(op) for part in split(lists, written=op.writes)]


def split(
    lists: Mapping[str, Sequence[Tensor] | None],
    *,
    written: Collection[str] = (),
    by_slices: bool = False,
    indices: Sequence[int] | None = None,
) -> list[Part]:
    """Groups rows by device and by the backend that has kernels for their dtypes, and makes rows dense that are not.

    A row whose tensors differ in memory order is computed in contiguous copies; the copies of ``written`` lists are copied back by
    :meth:`Part.run`. Lists that are all :class:`TensorList` are taken as they are. ``by_slices``: rows whose slices along the first
    dimension are no runs of memory (a transposed matrix) are computed in contiguous copies too, whatever the list. ``indices``: the
    caller's numbers of the rows, if they are not 0, 1, ...
    """
    given = {role: tensors for role, tensors in lists.items() if tensors is not None}
    first = next(iter(given.values()))
    if len(first) == 0:
        return []
    if are_trusted(given.values()) and not (by_slices and not all(map(slices_are_runs, first))):
        numbers = range(len(first)) if indices is None else indices
        return [Part(_dispatch.select(first[0].device.type), Operands(given, numbers))]  # type: ignore[arg-type]  # seen above
    chosen: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}
    parts: dict[tuple[torch.device, Backend], list[int]] = {}
    for i, row in enumerate(zip(*given.values(), strict=True)):
        kind = first[i].device, frozenset([tensor.dtype for tensor in row])
        backend = chosen.get(kind)
        if backend is None:
            backend = chosen[kind] = _dispatch.select(kind[0].type, kind[1])
        parts.setdefault((kind[0], backend), []).append(i)
    return [_dense_part(backend, given, rows, written, by_slices, indices) for (_, backend), rows in parts.items()]


def _dense_part(
    backend: Backend,
    given: Mapping[str, Sequence[Tensor]],
    rows: list[int],
    written: Collection[str],
    by_slices: bool,
    indices: Sequence[int] | None,
) -> Part:
    picked = {role: [tensors[i] for i in rows] for role, tensors in given.items()}
    write_back = []
    for row, together in enumerate(zip(*picked.values(), strict=True)):
        if is_dense_row(together) and not (by_slices and not slices_are_runs(together[0])):
            continue
        for role, tensors in picked.items():
            dense = tensors[row].contiguous()
            if role in written and dense is not tensors[row]:
                write_back.append((tensors[row], dense))
            tensors[row] = dense
    if not backend.refuses_no_memory:
        for tensors in picked.values():
            _check_addresses(tensors)
    numbers = rows if indices is None else [indices[i] for i in rows]
    return Part(backend, Operands({role: TensorList(tensors) for role, tensors in picked.items()}, numbers), write_back)


def _check_addresses(tensors: Iterable[Tensor]) -> None:
    """Raises TypeError for a tensor whose storage was freed: torch's own loops over lists read address 0."""
    for tensor in tensors:
        if tensor.device.type in ("cpu", "cuda") and tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise TypeError(f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory")
