"""The second stage of a norm: one program adds up the sums of its chunks, in a fixed order, and takes the root. The last program of the
last launch that makes sums does it; where there are several norms, or no chunks at all, a launch of its own.

Each program takes a ticket when its sum is stored. The one that gets the last of its launch finds what all others have stored: a barrier
puts the stores of a program's threads before its ticket, which is an atomic addition with release and acquire semantics for the whole
device, so every other program's stores come before the last one's loads. Those go to the second-level cache (``.cg``): a first-level cache
is not kept up to date with what other processors write. Earlier launches (of other dtypes) are complete by the order of the stream. Which
program is the last decides nothing but who adds.

The number of tickets is taken back at the end, so the counter is 0 between launches, whatever the stream or the graph. It belongs to the
table, as the sums do: two streams that use one table at once make each other's norms wrong, but leave the counter right, since every n-th
ticket is the last one, in whichever order they are taken.

A chunk's sum is of one of three kinds, so that only a norm that float32 cannot hold is infinite: as it is, of terms times SHRINK (they were
too large to be squared), or of terms times GROW (too small).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import convert, is_finite
from sam_kernels.backends.triton._config import FINISH_BLOCK
from sam_kernels.backends.triton._launch import launch
from sam_kernels.backends.triton._table import ChunkTable, LaunchGroup

__all__ = [
    "GROW", "GROWN", "HIGH", "IN_RANGE", "LOW", "SHRINK", "SHRUNK", "Finish", "finish_in_last_program", "launch_sums", "store_sum",
]  # fmt: skip

SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**100)
IN_RANGE, SHRUNK, GROWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
HIGH, LOW = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)  # a sum of squares of a chunk as it is lies between

_NOT_LAST = (None,) * 5  # counter, bounds, norm, found_inf and skipped of a launch that makes sums alone


@triton.jit
def _finish_one(sums, kinds, begin, end, norm, found_inf, skipped, BLOCK_SIZE: tl.constexpr):
    """The norm of chunks [begin, end), into its place. sums, kinds: as of the kernel below; the others: pointers, or None."""
    in_range = tl.zeros([BLOCK_SIZE], tl.float32)
    shrunk = tl.zeros([BLOCK_SIZE], tl.float32)
    grown = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in tl.range(begin, end, BLOCK_SIZE, loop_unroll_factor=2):  # two blocks are waited for at a time
        slots = block + tl.arange(0, BLOCK_SIZE)
        part = tl.load(sums + slots, mask=slots < end, other=0.0, cache_modifier=".cg")
        kind = tl.load(kinds + slots, mask=slots < end, other=0, cache_modifier=".cg")
        in_range += tl.where(kind == IN_RANGE, part, 0.0)
        shrunk += tl.where(kind == SHRUNK, part, 0.0)
        grown += tl.where(kind == GROWN, part, 0.0)
    medium, big, small = tl.sum(in_range), tl.sum(shrunk), tl.sum(grown)
    # 1 / factor, twice: its square would not fit float32.
    from_big = tl.sqrt_rn(big + medium * SHRINK * SHRINK) * (1.0 / SHRINK)
    from_medium = tl.sqrt_rn(medium + small * (1.0 / GROW) * (1.0 / GROW))
    from_small = tl.sqrt_rn(small) * (1.0 / GROW)
    result = tl.where(big != 0.0, from_big, tl.where(medium != 0.0, from_medium, from_small))
    tl.store(norm, convert(result, norm.dtype.element_ty))
    if found_inf is not None:
        finite = is_finite(result)
        if skipped is not None:
            count = convert(tl.load(skipped), tl.float32) + convert(tl.load(found_inf), tl.float32)
            tl.store(skipped, convert(count, skipped.dtype.element_ty))
            tl.store(found_inf, tl.where(finite, 0.0, 1.0))
        elif ~finite:
            tl.store(found_inf, 1.0)


@triton.jit
def store_sum(
    total,
    kind,
    work_slots,  # (C,) int32
    sums,  # (C,) float32
    kinds,  # (C,) int32
):
    """The sum of this program's chunk, into its place."""
    slot = tl.load(work_slots + tl.program_id(0))
    tl.store(sums + slot, total)
    tl.store(kinds + slot, kind)


@triton.jit
def finish_in_last_program(
    sums,  # (C,) float32
    kinds,  # (C,) int32
    counter,  # () int32; None: the sums are added up later
    bounds,  # (2,) int32: 0, C
    norm,  # () floating point
    found_inf,  # () floating point or None: set where the norm is not finite
    skipped,  # () floating point or None: what found_inf was is added to it, and found_inf starts anew
    FINISH_SIZE: tl.constexpr,
):
    """Makes the norm, where this program is the last to have stored its sum."""
    if counter is not None:
        # Not a constant 0: the compiler would lay blocks out otherwise than for several norms, and add in another order. (Not beside the
        # other bound: AMD's compiler would make one wide access of both, and that is what operands are known by.)
        begin = tl.load(bounds)
        programs = tl.num_programs(0)
        tl.debug_barrier()
        ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if ticket % programs == programs - 1:
            tl.atomic_add(counter, -programs, sem="relaxed", scope="gpu")
            _finish_one(sums, kinds, begin, tl.load(bounds + 1), norm, found_inf, skipped, FINISH_SIZE)


@triton.jit
def _finish_kernel(
    sums,  # (C,) float32
    kinds,  # (C,) int32
    bounds,  # (M + 1,) int32: the sums of each norm
    norms,  # (M,) floating point
    found_inf,  # () float32 or None: set where the norm is not finite
    skipped,  # () float32 or None: what found_inf was is added to it, and found_inf starts anew
    BLOCK_SIZE: tl.constexpr,
):
    group = tl.program_id(0)
    _finish_one(
        sums, kinds, tl.load(bounds + group), tl.load(bounds + group + 1), norms + group, found_inf, skipped, BLOCK_SIZE
    )  # fmt: skip


def launch_sums(
    kernel: Any,
    table: ChunkTable,
    group: LaunchGroup,
    roles: Sequence[str],
    finishing: Sequence[Tensor | None],  # as of Finish.arguments
    *args: Any,
    **constants: Any,
) -> None:
    """The first stage of a norm, for one of the groups of a table."""
    table.launch(kernel, group, roles, group.slots, *table.sums, *finishing, *args, FINISH_SIZE=FINISH_BLOCK, **constants)


class Finish:
    """The second stage in the last program of the last launch, where there is one norm and a launch at all; else in a launch of its own.
    Both launches have four warps: others would add in another order."""

    def __init__(
        self,
        table: ChunkTable,
        group_sizes: tuple[int, ...],
        norms: Tensor,  # (M,)
        found_inf: Tensor | None,
        skipped: Tensor | None,
        *,
        folds: bool = True,  # whether the kernel has registers for it
    ) -> None:
        self._table = table
        self._group_sizes = group_sizes
        self._results = norms, found_inf, skipped
        folds = folds and len(group_sizes) == 1
        self._last = next((group for group in reversed(table.groups) if group.chunks > 0), None) if folds else None

    def arguments(self, group: LaunchGroup) -> tuple[Tensor | None, ...]:
        """What :func:`finish_in_last_program` takes beside the sums: counter, bounds, norm, found_inf and skipped, of the last launch; None
        for others."""
        return (self._table.counter, self._table.bounds(self._group_sizes), *self._results) if group is self._last else _NOT_LAST

    def launch_rest(self) -> None:
        """What no last program does: norms of consecutive groups of rows from the sums of their chunks."""
        if self._last is None:
            table, sizes = self._table, self._group_sizes
            arguments = *table.sums, table.bounds(sizes), *self._results
            launch(_finish_kernel, len(sizes), table.device, *arguments, BLOCK_SIZE=FINISH_BLOCK)
