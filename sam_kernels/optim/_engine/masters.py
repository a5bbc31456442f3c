"""float32 masters of 16-bit parameters: what steps start from and go to. They are the backup of the ascent too."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._memory_of import is_fake
from sam_kernels._sharding import READS_PLAINLY, is_dtensor
from sam_kernels._validate import check_flag
from sam_kernels.optim._engine.lists import GroupLists
from sam_kernels.optim._engine.memory import MASTER, NARROW, ParamMemory
from sam_kernels.optim._shards.dtensor import as_owner, local_of
from sam_kernels.optim._types import ParamGroup, ParamState

__all__ = ["Masters", "check_masters", "is_narrow", "warn_of_no_masters"]

_LOOKS_EVERY = 256  # steps
_PIECE = 1 << 20  # elements


def is_narrow(param: Tensor) -> bool:
    """Whether a parameter can have a master."""
    return param.dtype in NARROW


class Masters:
    """The masters of all 16-bit parameters, kept in ``memory``: 4 bytes a parameter.

    Between steps every parameter is its master, rounded to nearest. Where somebody else has written a parameter (a loaded model, clipped
    weights), its master follows before the next step: elements that are no longer their master's rounding take the parameter's value. A
    write is noticed by the parameter's version. One through ``.data`` leaves no version: all bits are compared at steps 1, 2, 4, 8, …, and
    at every 256th.
    """

    def __init__(self, memory: ParamMemory, base: Optimizer) -> None:
        self._memory = memory
        self._base = base
        self._has_warned = False
        self._steps = 0  # that began with a look at the versions

    def begin(self) -> None:
        """A new step."""
        self._steps += 1

    def of(self, lists: GroupLists) -> list[Tensor]:
        """The masters of 16-bit parameters as operations take them; made from the parameters where there are none."""
        masters = self._memory.of(MASTER, lists)
        if any(master is None for master in masters):
            self._make(lists, masters)
            masters = self._memory.of(MASTER, lists)
        return cast("list[Tensor]", masters)

    def _make(self, lists: GroupLists, known: Sequence[Tensor | None]) -> None:
        """Makes those that are missing."""
        made = [
            torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(param) if master is None else master
            for param, master in zip(lists.params, known, strict=True)
        ]
        self._memory.put(MASTER, lists, made)
        self.widen_state([owner for owner, master in zip(lists.owners, known, strict=True) if master is None])

    def widen_state(self, params: Iterable[Tensor]) -> None:
        """State that the base has for 16-bit parameters, in 16 bits, becomes float32: ``torch.distributed.checkpoint`` casts what it
        loads to the dtypes that it finds."""
        for param in params:
            if is_narrow(param) and param in self._base.state:
                _widen(self._base.state[param])

    def wrote(self, lists: GroupLists) -> None:
        """Notes that the parameters are what the optimizer has just written, or made masters from."""
        lists.written = self._now(lists)

    def _now(self, lists: GroupLists) -> tuple[object, list[int]]:
        """Which masters, and the versions of the parameters; of DTensors those of the rank's own parts too, by which ``to_local()`` is
        written."""
        versions = _versions(lists.owners)
        return self._memory.version(MASTER), versions if lists.owners is lists.params else [*versions, *_versions(lists.params)]

    @torch.no_grad()
    def follow(self, lists: GroupLists) -> None:
        """Makes the masters follow parameters that somebody else has written. Warns, once. Waits for the device where it looks.

        Every rank looks at its own parts, and communicates with none.
        """
        if is_fake(lists.params[0]):
            return
        masters, now = self.of(lists), self._now(lists)
        is_due = self._steps & (self._steps - 1) == 0 or self._steps % _LOOKS_EVERY == 0
        if lists.written == now and not is_due:
            return
        count = _follow(lists.params, masters)
        is_unseen, lists.written = lists.written == now, now
        if count > 0 and not self._has_warned:
            self._has_warned = True
            _warn_of_writes(f"{count} of {len(lists.params)} parameters of a group", is_unseen=is_unseen)


def _warn_of_writes(which: str, *, is_unseen: bool) -> None:
    message = (
        f"SAM: master_weights=True: {which} were written by somebody else since the last step; where they are no longer their masters' "
        "rounding, the masters now have their values."
    )
    if is_unseen:
        message += " They were written through .data, which leaves no trace, so most such writes are lost: use torch.no_grad()."
    warnings.warn(message, UserWarning, stacklevel=3)


def _follow(params: Sequence[Tensor], masters: Sequence[Tensor]) -> int:
    """Makes masters follow their parameters. Returns how many had to. Waits for the device once where none has."""
    pieces = [list(_pieces(param.detach(), master)) for param, master in zip(params, masters, strict=True)]
    device = params[0].device  # a group may have parameters on several
    are_other = [torch.stack([_differ(*piece).any() for piece in each]).any().to(device) for each in pieces]
    if not bool(torch.stack(are_other).any()):
        return 0
    count = 0
    for each, is_other in zip(pieces, are_other, strict=True):
        if bool(is_other):
            count += 1
            for param, master in each:
                master.copy_(torch.where(_differ(param, master), param.to(torch.float32), master))
    return count


def _pieces(param: Tensor, master: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of so few elements that what is compared needs no memory to speak of."""
    if not (param.is_contiguous() and master.is_contiguous()):
        return iter([(param, master)])
    return zip(torch.split(param.view(-1), _PIECE), torch.split(master.view(-1), _PIECE), strict=True)


def _differ(param: Tensor, master: Tensor) -> Tensor:
    """Where the parameter is not its master's rounding, bit for bit."""
    return master.to(param.dtype).view(torch.int16) != param.view(torch.int16)


def _widen(state: ParamState) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dtype in NARROW and (type(value) is Tensor or is_dtensor(value)):
            state[key] = as_owner(value, local_of(value).to(torch.float32))


def _versions(params: Sequence[Tensor]) -> list[int]:
    with READS_PLAINLY():
        return [param._version for param in params]


def check_masters(master_weights: Any, *, base: Optimizer, capturable: bool) -> bool:
    """Checks the option of :class:`sam_kernels.SAM`. Raises TypeError or ValueError."""
    has_masters = check_flag("SAM", "master_weights", master_weights)
    if has_masters and any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(base).__mro__):
        raise ValueError(
            "SAM: master_weights=True with ZeroRedundancyOptimizer, which steps on parameters of its own and sends these to the other "
            "ranks; leave master_weights out, or shard masters and state with fully_shard"
        )
    if has_masters and capturable:
        raise ValueError(
            "SAM: master_weights=True with capturable=True: a graph that is replayed would not notice weights that somebody else has "
            "written, and put its masters in their place; leave one of them out"
        )
    return has_masters


def warn_of_no_masters(groups: Sequence[ParamGroup]) -> None:
    """``master_weights=True`` where no trainable parameter can have one."""
    params = [param for param in chain.from_iterable(group["params"] for group in groups) if param.requires_grad]
    if not any(map(is_narrow, params)):
        dtypes = ", ".join(sorted({str(param.dtype).removeprefix("torch.") for param in params}))
        warnings.warn(
            f"SAM: master_weights=True has nothing to do: masters are for bfloat16 and float16 parameters, and all of these are {dtypes}; "
            "leave it out, or convert the model first: model.to(torch.bfloat16)",
            UserWarning,
            stacklevel=4,
        )
