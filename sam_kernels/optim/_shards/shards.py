"""What an optimizer over DTensors does on all ranks alike: norms, sums, the agreement on a skipped step, and what follows a write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from sam_kernels._validate import describe
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._shards.layout import WHOLE, Layout, Meshes, layout_of
from sam_kernels.optim._shards.modules import GatheredModules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shards", "check_process_group", "loss_value"]


class Shards:
    """Of all parameters of an optimizer. False where a rank has all of them whole: every method is then the single process's.

    Args:
        params: all parameters, group by group.
        process_group: ranks that have other parameters of the same model, such as the stages of a pipeline; None: there are none.
    """

    def __init__(self, params: Sequence[Tensor] = (), process_group: ProcessGroup | None = None) -> None:
        self._layouts = list(dict.fromkeys(map(layout_of, params)))
        self._meshes = Meshes(self._layouts)
        self._modules = GatheredModules(params)
        self._process_group = process_group

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

    def sum(self, parts: Sequence[tuple[Layout, Tensor]], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Sums over all elements of all ranks, float64, of the rank's own sums. One all-reduce a mesh, and one of the process group."""
        total = self._meshes.sum(parts, torch.empty(shape, dtype=torch.float64, device=device))
        if self._process_group is not None:
            distributed.all_reduce(total, group=self._process_group)
        return total

    def norm(self, parts: Sequence[tuple[Layout, Tensor]], device: torch.device) -> Tensor:  # ()
        """The norm over all elements of all ranks, of the rank's own norms: float64 where one of them is, otherwise float32."""
        dtype = torch.float64 if any(norm.dtype is torch.float64 for _, norm in parts) else torch.float32
        if device.type == "cpu" and self._process_group is None:  # Python's numbers: the same arithmetic in a tenth of the time
            square = self._meshes.sum_of_numbers([(layout, norm.item() * norm.item()) for layout, norm in parts])
            return torch.tensor(math.sqrt(square), dtype=dtype)
        squares = [(layout, norm.to(torch.float64).square()) for layout, norm in parts]
        return self.sum(squares, (), device).sqrt().to(dtype)

    def mean_loss(self, loss: Any, device: torch.device) -> Any:  # () float64
        """The mean of the losses of the ranks of a mesh; a loss that is no number is returned as it is."""
        value = loss_value(loss, device) if self._meshes else None
        return loss if value is None else self._meshes.mean(value)

    def agree(self, found_inf: Tensor) -> None:  # ()
        """Sets ``found_inf`` where it is set on any rank. 4 bytes a mesh, and 4 of the process group."""
        self._meshes.agree(found_inf)
        if self._process_group is not None:
            distributed.all_reduce(found_inf, op=distributed.ReduceOp.MAX, group=self._process_group)

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
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"SAM: process_group must be a torch.distributed.ProcessGroup, got {describe(process_group)}")
    if distributed.get_rank(process_group) < 0:
        raise ValueError("SAM: process_group has other ranks than this one; give the group of the ranks that hold the rest of the model")
    return process_group
