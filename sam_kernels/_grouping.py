"""Lists of tensors cut into what one backend call can take: one device, dense, one memory order a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._tensor_list import TensorList, is_dense_row

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


def split(lists: Mapping[str, Sequence[Tensor] | None], *, written: Iterable[str] = (), rowwise: Iterable[str] | None = None) -> list[Rows]:
    """Groups rows by device and makes rows dense that are not. ``rowwise`` names the lists whose elements pair up (default: all).

    A row whose tensors differ in memory order is computed in contiguous copies; the copies of ``written`` lists are copied back by
    :meth:`Rows.finish`. Lists that are all :class:`TensorList` are taken as they are.
    """
    given = [tensors for tensors in lists.values() if tensors is not None]
    first = given[0]
    if len(first) == 0:
        return []
    if all(isinstance(tensors, TensorList) for tensors in given):
        return [Rows(_dispatch.select(first[0].device.type), dict(lists), range(len(first)))]  # type: ignore[arg-type]
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(first):
        by_device.setdefault(tensor.device, []).append(i)
    paired = list(lists) if rowwise is None else list(rowwise)
    return [_dense_rows(_dispatch.select(device.type), lists, indices, set(written), paired) for device, indices in by_device.items()]


def _dense_rows(
    backend: ModuleType, lists: Mapping[str, Sequence[Tensor] | None], indices: list[int], written: set[str], paired: list[str]
) -> Rows:
    picked = {name: None if tensors is None else [tensors[i] for i in indices] for name, tensors in lists.items()}
    names = [name for name in paired if picked[name] is not None]
    rows = Rows(backend, {}, indices)
    for row in range(len(indices)):
        if is_dense_row([picked[name][row] for name in names]):  # type: ignore[index]
            continue
        for name in names:
            tensors = picked[name]
            assert tensors is not None
            dense = tensors[row].contiguous()
            if name in written and dense is not tensors[row]:
                rows.write_back.append((tensors[row], dense))
            tensors[row] = dense
    rows.lists = {name: None if tensors is None else TensorList(tensors) for name, tensors in picked.items()}
    return rows
