"""How parameters lie on ranks, and sums over the elements of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from sam_kernels._local_parts import is_dtensor

__all__ = ["WHOLE", "Layout", "Meshes", "layout_of", "sharded_dims", "why_no_layout"]


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
    for dim, (placement, place) in enumerate(zip(owner.placements, mesh.get_coordinate(), strict=True)):
        if placement.is_replicate():
            copies *= mesh.size(dim)
        else:
            part = part * mesh.size(dim) + place
    return Layout(mesh, copies, part)


def sharded_dims(param: Tensor) -> set[int]:
    """The dimensions along which a parameter is cut into parts."""
    owner: Any = param
    return {each.dim for each in owner.placements if not each.is_replicate()} if is_dtensor(param) else set()


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
    """The meshes of an optimizer's parameters, in the order of the parameters, which is the same on all ranks.

    Every rank of a mesh calls :meth:`sum` and :meth:`agree` equally often, whatever gradients it has.
    """

    def __init__(self, layouts: Sequence[Layout] = ()) -> None:
        self._meshes = list(dict.fromkeys(layout.mesh for layout in layouts if layout.mesh is not None))
        self._has_others = {mesh: mesh.size() > 1 for mesh in self._meshes}  # asked once: a mesh takes a microsecond to answer

    def __bool__(self) -> bool:
        return bool(self._meshes)

    def sum(self, parts: Sequence[tuple[Layout, Tensor]], like: Tensor) -> Tensor:
        """Sum over all elements of all ranks of what the parts are the rank's own sums of: float64, of the shape of ``like``.

        ``parts``: by layout, float64 tensors of the shape of ``like``, an empty one. Elements that several ranks hold count once. One
        all-reduce a mesh.
        """
        total = like.new_zeros(like.shape, dtype=torch.float64)
        for mesh in (None, *self._meshes):
            own = [part.to(total.device) / layout.copies for layout, part in parts if layout.mesh is mesh or layout.mesh == mesh]
            share = torch.stack(own).sum(0) if own else total.new_zeros(total.shape)
            if mesh is not None:
                self._all_reduce_(share, mesh, distributed.ReduceOp.SUM)
            total = total + share
        return total

    def sum_of_numbers(self, parts: Sequence[tuple[Layout, float]]) -> float:
        """:meth:`sum` of numbers, for tensors on the CPU."""
        shares: dict[Any, float] = dict.fromkeys((None, *self._meshes), 0.0)
        for layout, part in parts:
            shares[layout.mesh] += part / layout.copies
        total = 0.0
        for mesh, share in shares.items():
            if mesh is not None and self._has_others[mesh]:
                reduced = torch.scalar_tensor(share, dtype=torch.float64, device="cpu")
                self._all_reduce_(reduced, mesh, distributed.ReduceOp.SUM)
                share = reduced.item()
            total += share
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean of what the ranks of the largest mesh have, float64."""
        mesh = max(self._meshes, key=lambda mesh: mesh.size())
        ranks: int = mesh.size()
        total = value.to(torch.float64, copy=True)
        self._all_reduce_(total, mesh, distributed.ReduceOp.SUM)
        return total / ranks

    def agree(self, found_inf: Tensor) -> None:
        """Sets ``found_inf``, () float32, where it is set on any rank of any mesh. 4 bytes a mesh."""
        for mesh in self._meshes:
            self._all_reduce_(found_inf, mesh, distributed.ReduceOp.MAX)

    def _all_reduce_(self, tensor: Tensor, mesh: Any, operation: Any) -> None:
        """Over all ranks of a mesh, on the mesh's type of device. One collective where the mesh has one dimension, or covers all ranks."""
        if not self._has_others[mesh]:
            return
        is_elsewhere = tensor.device.type != mesh.device_type
        moved = tensor.to(mesh.device_type) if is_elsewhere else tensor
        covers_all = mesh.size() == distributed.get_world_size()
        for group in [None] if covers_all else mesh.get_all_groups():
            distributed.all_reduce(moved, op=operation, group=group)
        if is_elsewhere:
            tensor.copy_(moved)
