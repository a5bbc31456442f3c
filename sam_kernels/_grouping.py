"""Lists of tensors cut into what one backend call can take: one device, dtypes it has kernels for, dense, one memory order a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._tensor_list import TensorList, are_trusted, is_dense_row, slices_are_runs

__all__ = ["Rows", "split"]


@dataclass
class Rows:
    """Rows that one backend call takes.

    ``lists`` maps each name to its tensors in these rows (None: takes no part), ``indices`` says which rows of the caller's lists they are.
    """

    backend: ModuleType
    lists: dict[str, TensorList | None]
    indices: Sequence[int]
    write_back: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def finish(self) -> None:
        """Copies the results of rows that had to be computed in a dense copy to where the caller wants them."""
        for destination, source in self.write_back:
            destination.copy_(source)


def split(lists: Mapping[str, Sequence[Tensor] | None], *, written: Iterable[str] = (), by_slices: bool = False) -> list[Rows]:
    """Groups rows by device and by the backend that has kernels for their dtypes, and makes rows dense that are not.

    A row whose tensors differ in memory order is computed in contiguous copies; the copies of ``written`` lists are copied back by
    :meth:`Rows.finish`. Lists that are all :class:`TensorList` are taken as they are. ``by_slices``: rows whose slices along the first
    dimension are no runs of memory (a transposed matrix) are computed in contiguous copies too, whatever the list.
    """
    given = [tensors for tensors in lists.values() if tensors is not None]
    first = given[0]
    if len(first) == 0:
        return []
    if are_trusted(given) and not (by_slices and not all(map(slices_are_runs, first))):
        return [Rows(_dispatch.select(first[0].device.type), dict(lists), range(len(first)))]  # type: ignore[arg-type]  # seen above
    chosen: dict[tuple[torch.device, frozenset[torch.dtype]], ModuleType] = {}
    parts: dict[tuple[torch.device, ModuleType], list[int]] = {}
    for i, row in enumerate(zip(*given, strict=True)):
        kind = first[i].device, frozenset([tensor.dtype for tensor in row])
        backend = chosen.get(kind)
        if backend is None:
            backend = chosen[kind] = _dispatch.select(kind[0].type, kind[1])
        parts.setdefault((kind[0], backend), []).append(i)
    return [_dense_rows(backend, lists, indices, set(written), by_slices) for (_, backend), indices in parts.items()]


def _dense_rows(
    backend: ModuleType, lists: Mapping[str, Sequence[Tensor] | None], indices: list[int], written: set[str], by_slices: bool
) -> Rows:
    picked = {name: None if tensors is None else [tensors[i] for i in indices] for name, tensors in lists.items()}
    names = [name for name, tensors in picked.items() if tensors is not None]
    rows = Rows(backend, {}, indices)
    for row in range(len(indices)):
        together = [picked[name][row] for name in names]  # type: ignore[index]  # names of given lists
        if is_dense_row(together) and not (by_slices and not slices_are_runs(together[0])):
            continue
        for name in names:
            tensors = picked[name]
            assert tensors is not None
            dense = tensors[row].contiguous()
            if name in written and dense is not tensors[row]:
                rows.write_back.append((tensors[row], dense))
            tensors[row] = dense
    if not backend.REFUSES_NO_MEMORY:
        for tensors in picked.values():
            _check_addresses(tensors or ())
    rows.lists = {name: None if tensors is None else TensorList(tensors) for name, tensors in picked.items()}
    return rows


def _check_addresses(tensors: Iterable[Tensor]) -> None:
    """Raises TypeError for a tensor whose storage was freed: torch's own loops over lists read address 0."""
    for tensor in tensors:
        if tensor.device.type in ("cpu", "cuda") and tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise TypeError(f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory")
