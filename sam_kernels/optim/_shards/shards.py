"""What an optimizer over DTensors does on all ranks alike: norms, sums, the agreement on a skipped step, and what follows a write."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from sam_kernels._validate import describe
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._shards.layout import WHOLE, Layout, Meshes, layout_of, within_replica_of
from sam_kernels.optim._shards.modules import GatheredModules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GROUP_IS_GONE", "Shards", "check_apart", "check_process_group", "loss_value"]

GROUP_IS_GONE = (
    "SAM: the process group is gone (destroy_process_group was called), and the ranks make a step together; make steps before that, or "
    "begin anew with init_process_group, the model and the optimizer"
)
_NOT_OURS = "SAM: process_group has other ranks than this one; give the group of the ranks that hold the rest of the model"


class Shards:
    """Of all parameters of an optimizer. False where a rank has all of them whole: every method is then the single process's.

    Args:
        params: all parameters, group by group.
        process_group: ranks that have other parameters of the same model, such as the stages of a pipeline; None: there are none.
    """

    def __init__(self, params: Sequence[Tensor] = (), process_group: ProcessGroup | None = None) -> None:
        self._layouts = list(dict.fromkeys(map(layout_of, params)))
        self._norm_dtype = torch.float64 if any(param.dtype is torch.float64 for param in params) else torch.float32
        self._meshes = Meshes(self._layouts)
        self._modules = GatheredModules(params)
        self._process_group = process_group
        if process_group is not None and self._meshes:
            check_apart(process_group, self._meshes.ranks, "parameters that are DTensors")

    def __bool__(self) -> bool:
        return bool(self._meshes) or self._process_group is not None

    def check_capturable(self, capturable: bool) -> None:
        """Raises ValueError where a graph would be replayed over shards: what FSDP2 has gathered would outlive the weights."""
        if capturable and self._meshes:
            raise ValueError("SAM: capturable=True is not supported with DTensors, whose gathered copies a replayed graph cannot free")

    @property
    def only_layout(self) -> Layout:
        """Of all parameters. Raises TypeError where they have several."""
        if len(self._layouts) > 1:
            raise TypeError(
                "SAM: AscentStep.combined was given a norm alone, and parameters lie on the ranks in several ways; give (lists, norm)"
            )
        return self._layouts[0]

    @cached_property
    def _within_replica(self) -> tuple[dict[Layout, Layout], Meshes]:
        """By layout, that within one replica of HSDP's parameters, and the meshes of those."""
        layouts = {layout: within_replica_of(layout) for layout in self._layouts}
        return layouts, Meshes(list(layouts.values()))

    def sum(
        self, parts: Sequence[tuple[Layout, Tensor]], shape: tuple[int, ...], device: torch.device, *, meshes: Meshes | None = None
    ) -> Tensor:
        """Sums over all elements of all ranks, float64, of the rank's own sums. One all-reduce a mesh, and one of the process group."""
        total = (self._meshes if meshes is None else meshes).sum(parts, torch.empty(shape, dtype=torch.float64, device=device))
        if self._process_group is not None:
            distributed.all_reduce(total, group=self._process_group)
        return total

    def norm(self, parts: Sequence[tuple[Layout, Tensor]], device: torch.device, *, within_replica: bool = False) -> Tensor:  # ()
        """The norm over all elements of all ranks, of the rank's own norms: float64 where a parameter is, otherwise float32.

        ``within_replica``: of the ranks that together hold one copy, which may have other elements than those of another copy.
        """
        meshes, dtype = self._meshes, self._norm_dtype  # not that of the parts, of which a rank may have none
        if within_replica:
            layouts, meshes = self._within_replica
            parts = [(layouts[layout], norm) for layout, norm in parts]
        if device.type == "cpu" and self._process_group is None:  # Python's numbers: the same arithmetic in a tenth of the time
            square = meshes.sum_of_numbers([(layout, norm.item() * norm.item()) for layout, norm in parts])
            return torch.scalar_tensor(math.sqrt(square), dtype=dtype, device="cpu")
        squares = [(layout, norm.to(torch.float64).square()) for layout, norm in parts]
        return self.sum(squares, (), device, meshes=meshes).sqrt().to(dtype)

    def mean_loss(self, loss: Any, device: torch.device, *, within_replica: bool = False) -> Any:  # () float64
        """The mean of the losses of the ranks of a mesh, and of those ranks of the process group that have one. A loss that is no number is
        returned as it is. ``within_replica``: of the ranks that together hold one copy.

        Raises RuntimeError where some ranks of a mesh have a loss and others have none.
        """
        value, meshes = loss_value(loss, device) if self else None, self._within_replica[1] if within_replica else self._meshes
        if meshes:
            value = meshes.mean(value, device)
        if self._process_group is not None:
            sums = torch.zeros(2, dtype=torch.float64, device=device)
            if value is not None:
                sums = torch.stack([value, torch.ones_like(value)])
            distributed.all_reduce(sums, group=self._process_group)
            value = sums[0] / sums[1] if value is not None or sums[1].item() > 0 else None
        return loss if value is None else value

    def agree(self, found_inf: Tensor, *, has_gradient: bool = True) -> bool:  # ()
        """Sets ``found_inf`` where it is set on any rank: 4 bytes a mesh, and 4 of the process group.

        Returns whether a rank has a gradient; a rank that has one may get True without waiting for the answer.
        """
        if not self._meshes.have_others and self._process_group is None:
            return has_gradient
        usual = 1.0 if has_gradient else 0.0  # 2: a step that is skipped needs no gradient
        if found_inf.is_cpu:  # Python's numbers, as in norm
            flag = torch.scalar_tensor(2.0 if found_inf.item() != 0.0 else usual, dtype=torch.float32, device="cpu")
        else:
            flag = torch.where(found_inf != 0.0, 2.0, usual)
        self._meshes.agree(flag)
        if self._process_group is not None:
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._process_group)
        if not found_inf.is_cpu:
            found_inf.copy_(flag == 2.0)
        elif flag.item() == 2.0:
            found_inf.fill_(1.0)
        return has_gradient or flag.item() != 0.0

    def check_usable(self) -> None:
        """Raises RuntimeError where the processes no longer form a group."""
        if self and not distributed.is_initialized():
            raise RuntimeError(GROUP_IS_GONE)

    def abandon_pass(self) -> str:
        """After an exception: FSDP2's modules begin their next pass anew. Returns words for one that cannot."""
        self._modules.abandon_pass()
        return "" if self._modules.can_abandon_pass else "; FSDP2 of this version of torch cannot go on after an exception in a pass"

    @contextmanager
    def all_or_none(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """What every rank does, or none: the body changes nothing, and where it raises on one rank it raises on all.

        One all-reduce of 4 bytes a mesh, and one of the process group; the host waits. Raises: the body's exception; ValueError on the
        ranks whose body raised none.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self:
            found = torch.full((), float(error is not None), device=devices[0])
            self.agree(found)
            if error is None and found.item():
                raise ValueError("SAM: nothing is loaded, since the checkpoint was refused on another rank, whose error says why")
        if error is not None:
            raise error

    def written(self, layout: Layout, owners: Sequence[Tensor]) -> None:
        """After operations have written local parts of ``owners``: autograd learns of it, and what FSDP2 has gathered is freed."""
        if layout is not WHOLE:
            torch.autograd.graph.increment_version(owners)
            self.reshard()

    def reshard(self) -> None:
        """Frees what FSDP2 has gathered, which has requires_grad of before."""
        self._modules.reshard()


def loss_value(loss: Any, device: torch.device) -> Tensor | None:  # () float64
    """A loss as a tensor of its own; None for one that is no single number."""
    is_number = isinstance(loss, int | float) and not isinstance(loss, bool)
    if not is_number and not (isinstance(loss, Tensor) and loss.numel() == 1):
        return None
    value = local_of(loss) if isinstance(loss, Tensor) else loss
    return torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(()).clone()


def check_process_group(process_group: Any) -> Any:
    """The process group, None for none. Raises TypeError for anything else, ValueError for one that this rank is no part of."""
    if process_group is None:
        return None
    if distributed.is_available() and process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_NOT_OURS)
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        instead = "; give one of its groups, mesh.get_group(dim)" if hasattr(process_group, "get_all_groups") else ""
        raise TypeError(f"SAM: process_group must be a torch.distributed.ProcessGroup, got {describe(process_group)}{instead}")
    if distributed.get_rank(process_group) < 0:
        raise ValueError(_NOT_OURS)
    return process_group


def check_apart(process_group: ProcessGroup, others: Collection[int], what: str) -> None:
    """Raises ValueError where a group of ranks that hold other parameters has ranks that hold the same ones: each would count."""
    shared = sorted({*distributed.get_process_group_ranks(process_group)} & {*others} - {distributed.get_rank()})
    if shared:
        raise ValueError(
            f"SAM: process_group has the ranks {shared}, over which {what} lie or are replicated already, so that those would count "
            "several times in a norm; give the group of the ranks that hold other parameters of the model, one of each stage, or none"
        )
