"""The pointer table: one launch an operation and dtype, whatever the number of tensors.

Everything about a set of lists that does not change from step to step lies on the device: sizes, the chunks, and the addresses of
parameters, backups and state. Gradients may move at every backward pass: their addresses are compared, and copied (asynchronously, from
pinned memory) only when they did. A steady step therefore copies nothing or one small block, allocates nothing, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._config import CONFIGS, Config
from sam_kernels.backends.triton._contents import Contents
from sam_kernels.backends.triton._device import is_recording, keep, on
from sam_kernels.backends.triton._launch import launch
from sam_kernels.backends.triton._lists import Description, describe_list
from sam_kernels.backends.triton._slices import columns_of, whole_slices
from sam_kernels.backends.triton._staging import Staging, upload

__all__ = ["ChunkTable", "LaunchGroup", "table_of"]

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TABLES_KEPT = 16  # a list takes part in a handful of operations; the oldest goes first


@dataclass(frozen=True)
class LaunchGroup:
    """Chunks of the rows that share their dtypes, and the width of blocks for their slices: one launch."""

    dtypes: Mapping[str, Any]  # by role, what Triton calls its dtype
    chunks: int
    rows: Tensor  # (chunks,) int32
    chunk_indices: Tensor  # (chunks,) int32: which chunk of its row
    slots: Tensor  # (chunks,) int32: its place among all chunks, in the order of rows
    constants: Mapping[str, int]  # as ChunkTable.constants, for kernels that compute every element by itself
    columns: int | None  # as columns_of says of its slices


class ChunkTable:
    """The chunks of some lists of equal sizes and the addresses of their tensors, on the device."""

    def __init__(
        self,
        given: Mapping[str, Contents],
        config: Config,
        device: torch.device,
        slice_sizes: Sequence[int] = (),  # (R,) of slices that no chunk cuts, 0 for a row without; () for none at all
    ) -> None:
        all_numels = [contents.numels for contents in given.values()]
        sizes = all_numels[0]
        if any(numels != sizes for numels in all_numels):
            raise ValueError("tensor lists of different sizes")
        self._config = config
        self.is_recorded = False  # in a CUDA graph
        self.constants = _constants(config, config.block)
        self.device = device
        self.count = len(sizes)
        self._known = dict(given)
        self._slices = {role: i for i, role in enumerate(given)}
        # A row of addresses starts at a multiple of 16 bytes, or a kernel would be compiled once for even and once for odd numbers of them.
        self._stride = self.count + self.count % 2
        self._addresses = torch.zeros(len(given) * self._stride, dtype=torch.int64, device=self.device)
        self._views = {role: self._addresses[i * self._stride : i * self._stride + self.count] for role, i in self._slices.items()}
        self._staging = Staging(self._addresses, self.count)
        if is_recording(self.device):
            self._record()
        else:
            for role, contents in given.items():
                self._staging.write(self._slices[role] * self._stride, contents)
        numels = torch.tensor(sizes, dtype=torch.int64)
        self.numels = upload(numels, self.device)
        self.slice_sizes = upload(torch.tensor(slice_sizes, dtype=torch.int64), self.device) if slice_sizes else None
        dtypes = list(zip(*(contents.dtypes for contents in given.values()), strict=True))
        blocks = [config.block if len({dtype.itemsize for dtype in row}) == 1 else config.mixed_block for row in dtypes]
        sliced = list(zip(slice_sizes or [0] * self.count, blocks, strict=True))
        self.chunk_size = config.chunk_of(sum(sizes))
        chunk = torch.tensor([whole_slices(size, block, self.chunk_size) for size, block in sliced], dtype=torch.int64)
        self._chunk_counts = (numels + chunk - 1) // chunk
        columns = [columns_of(size, block) for size, block in sliced]
        self.groups = self._make_groups(given, list(zip(dtypes, blocks, columns, strict=True)))
        self._row_indices: dict[tuple[int, ...], Tensor] = {}
        self._bounds: dict[tuple[int, ...], Tensor] = {}

    def _make_groups(self, given: Iterable[str], kinds: Sequence[tuple[tuple[torch.dtype, ...], int, int | None]]) -> list[LaunchGroup]:
        """``kinds``: of each row, its dtypes, the size of blocks and the columns for its slices."""
        rows = torch.repeat_interleave(torch.arange(self.count), self._chunk_counts)
        first_slots = self._chunk_counts.cumsum(0) - self._chunk_counts
        slots = torch.arange(len(rows))
        alike: dict[tuple[tuple[torch.dtype, ...], int, int | None], list[int]] = {}
        for row, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(row)
        groups = []
        for (dtypes, block, columns), members in alike.items():
            chosen = slots
            if len(alike) > 1:
                belongs = torch.zeros(self.count, dtype=torch.bool)
                belongs[members] = True
                chosen = slots[belongs[rows]]
            mine = rows[chosen]
            named = dict(zip(given, (TRITON_DTYPES[dtype] for dtype in dtypes), strict=True))
            row_of, chunk_of, slot_of = (upload(part.to(torch.int32), self.device) for part in (mine, chosen - first_slots[mine], chosen))
            constants = _constants(self._config, block)
            groups.append(LaunchGroup(named, len(mine), row_of, chunk_of, slot_of, constants, columns))
        return groups

    def launch(self, kernel: Any, group: LaunchGroup, roles: Sequence[str], *args: Any, **constants: Any) -> None:
        """Runs a kernel on the chunks of a group. Its first arguments are the addresses of each role, sizes, rows and chunks, then the size
        of a chunk, unless that is a constant; ``args`` follow. Its constants are the dtypes of the roles, and those of the group."""
        size = [] if "CHUNK_SIZE" in constants else [self.chunk_size]
        work = *self.pointers(*roles), self.numels, group.rows, group.chunk_indices, *size
        dtypes = tuple([group.dtypes.get(role) for role in roles])
        launch(kernel, group.chunks, self.device, *work, *args, DTYPES=dtypes, **{**group.constants, **constants})

    def pointers(self, *roles: str) -> list[Tensor | None]:
        """(R,) int64 addresses of each role; None for one that takes no part."""
        return [self._views.get(role) for role in roles]

    def matches(self, given: Mapping[str, Contents]) -> bool:
        """Whether lists in the table's roles differ from the table's in their addresses alone."""
        for role, contents in given.items():
            known = self._known[role]
            if contents is not known and not contents.has_kinds_of(known):
                return False
        return True

    def update(self, given: Mapping[str, Contents]) -> None:
        """Copies the addresses that are not those of the last call; into a CUDA graph that is being recorded, all of them: what others copy
        here between its replays is then no concern of it."""
        recording = is_recording(self.device)
        for role, contents in given.items():
            known = self._known[role]
            if contents is not known:
                if not recording and not contents.has_pointers_of(known):
                    self._staging.write(self._slices[role] * self._stride, contents)
                self._known[role] = contents
        if recording:
            self._record()

    def _record(self) -> None:
        self._staging.record({self._slices[role] * self._stride: contents for role, contents in self._known.items()})

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """(C,) float32 and (C,) int32: a sum a chunk and how it is scaled."""
        chunks = int(self._chunk_counts.sum())
        sums, kinds = (torch.empty(chunks, dtype=dtype, device=self.device) for dtype in (torch.float32, torch.int32))
        return sums, kinds

    @cached_property
    def counter(self) -> Tensor:
        """() int32, 0 between launches, for programs to count themselves. A graph that is recorded when it is made fills it."""
        return torch.zeros((), dtype=torch.int32, device=self.device)

    @cached_property
    def dot_sums(self) -> tuple[Tensor, ...]:
        """(C,) float32 three times and (C,) int32: three sums a chunk and how they are scaled."""
        squares, kinds = self.sums
        return squares, torch.empty_like(squares), torch.empty_like(squares), kinds

    @cached_property
    def corrections(self) -> tuple[Tensor, Tensor]:
        """(R,) float32 twice: what a row of Adam's needs besides its tensors."""
        first, second = (torch.empty(self.count, dtype=torch.float32, device=self.device) for _ in range(2))
        return first, second

    def row_indices(self, indices: Sequence[int]) -> Tensor | None:  # (R,) int32
        """The caller's numbers of the rows; None where they are the table's."""
        if isinstance(indices, range) and indices == range(self.count):
            return None
        key = tuple(indices)
        if key not in self._row_indices:
            self._row_indices[key] = upload(torch.tensor(key, dtype=torch.int32), self.device)
        return self._row_indices[key]

    def bounds(self, group_sizes: tuple[int, ...]) -> Tensor:  # (M + 1,) int32
        """Where the chunks of each of M consecutive groups of rows begin, and where the last ends."""
        known = self._bounds.get(group_sizes)
        if known is None:
            before = torch.cat([torch.zeros(1, dtype=torch.int64), self._chunk_counts.cumsum(0)])
            rows = torch.tensor([0, *group_sizes], dtype=torch.int64).cumsum(0)
            known = self._bounds[group_sizes] = upload(before[rows].to(torch.int32), self.device)
        return known


def _constants(config: Config, block: int) -> dict[str, int]:
    return {"BLOCK_SIZE": block, "num_warps": config.num_warps}


def table_of(lists: Mapping[str, Sequence[Tensor] | None], kernel: str, slice_sizes: tuple[int, ...] = ()) -> ChunkTable:
    """The table of these lists for a kernel, kept with the list that lives longest: the parameters', or the one the gradients belong to."""
    described = {role: describe_list(tensors) for role, tensors in lists.items() if tensors is not None}
    anchor = described.get("params") or next(iter(described.values()))
    anchor = anchor.owner or anchor
    config = CONFIGS[kernel]
    key = (kernel, config, slice_sizes, tuple(described))
    table: ChunkTable | None = anchor.tables.get(key)
    contents = {role: description.contents for role, description in described.items()}
    with on(anchor.device):
        recording = is_recording(anchor.device)
        # What a graph copies into its table at a replay, nobody here is told: eager calls get one of their own.
        if table is None or not table.matches(contents) or (table.is_recorded and not recording):
            table = ChunkTable(contents, config, anchor.device, slice_sizes)
            _keep(anchor, key, table)
        else:
            table.update(contents)
        if recording:
            table.is_recorded = True
            keep(table, *(tensors for role, tensors in lists.items() if role != "grads"))  # gradients are the graph's own
    return table


def _keep(anchor: Description, key: Any, table: ChunkTable) -> None:
    anchor.tables.pop(key, None)
    if len(anchor.tables) >= _TABLES_KEPT:
        del anchor.tables[next(iter(anchor.tables))]
    anchor.tables[key] = table
