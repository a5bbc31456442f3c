"""How parameters lie on ranks, and sums over the elements of all ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from sam_kernels._reading import Reading
from sam_kernels._sharding import is_dtensor

__all__ = ["WHOLE", "Layout", "Meshes", "layout_of", "mean_of_ranks", "sharded_dims", "why_no_layout", "within_replica_of"]


# Relative deviation of the squared norms of equal gradients. A kernel's sums are cut by the kind of processor: ranks of one kind have the
# same bits, those of several kinds two errors. With k float32 additions on the way of a term a norm errs by ((k + 5) / 2 + 1) 2^-24
# (validation.tolerance.norm_bound), its square by twice that, and the deviation from the mean is no larger. (That of n equal squares, out
# of float64 sums over n ranks, errs by 4 (n + 1) 2^-53 in its square, which is nothing beside it for n below a million.)
ADDITIONS = 1024  # k, of any backend's norm of up to 2^32 elements
_ALIKE = (ADDITIONS + 7) * 2.0**-24
_SUMS_WAITED_FOR = 2  # of a run, on a device
_SUMS_LATE = 2  # how many later sums are queued when one of a device is compared: most often it has long been there


@dataclass(frozen=True)
class Layout:
    """``mesh``: a DeviceMesh, None for ordinary tensors. ``copies``: ranks of the mesh that hold the same elements as this rank.
    ``part``: the number of this rank's part among the parts of a tensor."""

    mesh: Any
    copies: int
    part: int


WHOLE = Layout(None, 1, 0)


def layout_of(param: Tensor) -> Layout:
    """The layout of a parameter."""
    if not is_dtensor(param):
        return WHOLE
    owner: Any = param
    mesh, copies, part = owner.device_mesh, 1, 0
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # of a mesh without this rank, which why_no_layout refuses
        return Layout(mesh, 1, 0)
    for dim, (placement, place) in enumerate(zip(owner.placements, coordinate, strict=True)):
        if placement.is_replicate():
            copies *= mesh.size(dim)
        else:
            part = part * mesh.size(dim) + place
    return Layout(mesh, copies, part)


def within_replica_of(layout: Layout) -> Layout:
    """The layout on the ranks that together hold one copy: for a mesh (replicate, shard) its dimension of shards.

    :data:`WHOLE` for any other layout: it is that of a frozen parameter, which has no part in an ascent.
    """
    mesh = layout.mesh
    if mesh is None or mesh.ndim != 2 or layout.copies != mesh.size(0):
        return WHOLE
    return Layout(mesh[mesh.mesh_dim_names[1]], 1, layout.part)


def sharded_dims(param: Tensor) -> set[int]:
    """The dimensions along which a parameter is cut into parts."""
    owner: Any = param
    return {each.dim for each in owner.placements if not each.is_replicate() and not each.is_partial()} if is_dtensor(param) else set()


def why_no_layout(param: Tensor) -> str | None:
    """Why a step cannot be made of a DTensor, and what to do; None for one of which it can. The end of a sentence about the parameter."""
    if not is_dtensor(param):
        return None
    owner: Any = param
    if any(each.is_partial() for each in owner.placements):
        return (
            f"is a DTensor with placements {owner.placements}: its values are sums that no rank has; redistribute it to Replicate or Shard"
        )
    if owner.device_mesh.get_coordinate() is None:
        return (
            f"is a DTensor on {owner.device_mesh}, which this rank is no part of; give this rank's optimizer the parameters of its own mesh"
        )
    return None


class Meshes:
    """The meshes of an optimizer's parameters, the largest last. The order of the parameters is the same on all ranks, so this one is too.

    Every rank of a mesh calls :meth:`sum` and :meth:`agree` equally often, whatever gradients it has.
    """

    def __init__(self, layouts: Sequence[Layout] = ()) -> None:
        meshes = dict.fromkeys(layout.mesh for layout in layouts if layout.mesh is not None and layout.mesh.get_coordinate() is not None)
        self._meshes = sorted(meshes, key=lambda mesh: mesh.size())
        self._compares = any(not _is_on(layout, self._meshes[-1]) for layout in layouts) if meshes else False
        self._to_wait_for = _SUMS_WAITED_FOR
        self._readings: deque[Reading] = deque()
        self._has_others = {mesh: mesh.size() > 1 for mesh in self._meshes}  # asked once: a mesh takes a microsecond to answer
        self._groups = {mesh: _groups_of(mesh) for mesh in self._meshes}
        self.have_others = any(self._has_others.values())

    def __bool__(self) -> bool:
        return bool(self._meshes)

    @property
    def ranks(self) -> set[int]:
        """Of all meshes, as the default process group numbers them."""
        return {rank for mesh in self._meshes for rank in mesh.mesh.flatten().tolist()}

    def sum(self, parts: Sequence[tuple[Layout, Tensor]], like: Tensor) -> Tensor:
        """Sum over all elements of all ranks of what the parts are the rank's own sums of: float64, of the shape of ``like``.

        ``parts``: by layout, float64 tensors of the shape of ``like``, an empty one. Elements that several ranks hold count once. One
        all-reduce a mesh, of 8 bytes for each sum.

        What ordinary tensors and smaller meshes add must be the same on all ranks of the largest mesh: the mean is taken, and RuntimeError
        raised on all of them where it is not (16 bytes more). On a device the first sums wait for that, later ones are compared two sums
        late.
        """
        total = like.new_zeros(like.shape, dtype=torch.float64)
        for mesh in (None, *self._meshes):
            own = [part.to(total.device) / layout.copies for layout, part in parts if _is_on(layout, mesh)]
            share = torch.stack(own).sum(0) if own else total.new_zeros(total.shape)
            compares = mesh is not None and self._compares and mesh is self._meshes[-1] and self._has_others[mesh]
            if compares:
                share = torch.stack([share, total, total.square()])
            if mesh is not None:
                self._all_reduce_(share, mesh, distributed.ReduceOp.SUM)
            if compares:
                share, total, square = share[0], share[1] / mesh.size(), share[2] / mesh.size()
                if total.dim() == 0:
                    self._compare(Reading(torch.stack([total, square])), mesh, late=0 if total.is_cpu else _SUMS_LATE)
            total = total + share
        return total

    def _compare(self, mean_and_square: Reading, mesh: Any, *, late: int) -> None:
        """Raises RuntimeError, on all ranks at the same sum, where the sum ``late`` sums ago had not the same parts on all of them."""
        self._readings.append(mean_and_square)
        if self._to_wait_for > 0:
            self._to_wait_for -= 1
            late = 0
        while len(self._readings) > late:
            mean, square = self._readings.popleft().value()
            _check_alike(mean, square, mesh)

    def sum_of_numbers(self, parts: Sequence[tuple[Layout, float]]) -> float:
        """:meth:`sum` of numbers, for tensors on the CPU."""
        shares: dict[Any, float] = dict.fromkeys((None, *self._meshes), 0.0)
        for layout, part in parts:
            shares[layout.mesh] += part / layout.copies
        total = 0.0
        for mesh, share in shares.items():
            if mesh is not None and self._has_others[mesh]:
                compares = self._compares and mesh is self._meshes[-1]
                numbers = [share, total, total * total] if compares else [share]
                reduced = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                self._all_reduce_(reduced, mesh, distributed.ReduceOp.SUM)
                share = reduced[0].item()
                if compares:
                    total = reduced[1].item() / mesh.size()
                    _check_alike(total, reduced[2].item() / mesh.size(), mesh)
            total += share
        return total

    def mean(self, value: Tensor | None, device: torch.device) -> Tensor | None:  # () float64
        """:func:`mean_of_ranks` over the largest mesh."""
        mesh = self._meshes[-1]

        def sum_over_ranks(sums: Tensor) -> Tensor:
            self._all_reduce_(sums, mesh, distributed.ReduceOp.SUM)
            return sums

        return mean_of_ranks(value, device, mesh.size(), sum_over_ranks)

    def agree(self, flag: Tensor) -> None:  # ()
        """The largest ``flag`` of any rank of any mesh. 4 bytes a mesh."""
        for mesh in self._meshes:
            self._all_reduce_(flag, mesh, distributed.ReduceOp.MAX)

    def _all_reduce_(self, tensor: Tensor, mesh: Any, operation: Any) -> None:
        """Over all ranks of a mesh, on the mesh's type of device."""
        if not self._has_others[mesh]:
            return
        is_elsewhere = tensor.device.type != mesh.device_type
        moved = tensor.to(mesh.device_type) if is_elsewhere else tensor
        for group in self._groups[mesh]:
            distributed.all_reduce(moved, op=operation, group=group)
        if is_elsewhere:
            tensor.copy_(moved)


def mean_of_ranks(value: Tensor | None, device: torch.device, ranks: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The mean of the ranks' values, () float64; None where no rank has one. All ranks call it, whatever they have. 16 bytes.

    Raises RuntimeError where some ranks have a value and others have none. (On a device those with a value get NaN: to know it would wait.)
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if value is not None:
        sums = torch.stack([value.to(torch.float64), torch.ones_like(sums[0])])
    total, count = sum_over_ranks(sums)
    if (value is None or count.is_cpu) and 0 < (found := int(count.item())) < ranks:
        raise RuntimeError(
            f"SAM: the closure returned a loss, a number or a tensor of one element, on {found} of {ranks} ranks; a radius or a rule that "
            "follows the loss needs that of all ranks: return it from the closure on every rank"
        )
    return None if value is None else torch.where(count == ranks, total / ranks, torch.nan)


def _groups_of(mesh: Any) -> list[Any]:
    """Process groups whose sums one after another are over all ranks of a mesh: one where it has one dimension, or covers all ranks."""
    covers_all = mesh.ndim > 1 and mesh.size() == distributed.get_world_size()
    return [None] if covers_all else list(mesh.get_all_groups())  # with one dimension the mesh's own, which may have another timeout


def _is_on(layout: Layout, mesh: Any) -> bool:
    return layout.mesh is mesh or bool(layout.mesh == mesh)


def _check_alike(mean: float, mean_square: float, mesh: Any) -> None:
    """Of what every rank of a mesh should have alike. Raises RuntimeError on all of them where the values differ."""
    if mean_square - mean * mean > (_ALIKE * mean) ** 2:
        raise RuntimeError(
            "SAM: gradients of ordinary tensors (or of DTensors on smaller meshes) beside those sharded over the ranks "
            f"{mesh.mesh.flatten().tolist()} are not the same on these ranks, so that a norm would not be: their squared norms have the "
            f"mean {mean:.3g} and the standard deviation {math.sqrt(mean_square - mean * mean):.3g}; average them over the ranks before "
            "the closure returns (a parameter that one rank does not use has the gradient zero there), or shard them too. Ranks that hold "
            "other parameters of the model need process_group="
        )
