"""The ranks whose batches are one batch: their samples are weighted together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sam_kernels._sharding import is_dtensor, sharded_modules
from sam_kernels.optim._replicas.replicas import replicated_modules
from sam_kernels.optim._shards.layout import layout_of

__all__ = ["SampleRanks", "ranks_of"]


class SampleRanks:
    """The ranks of a mesh.

    Args:
        groups: this rank's process group in each dimension of the mesh.
        replicated: modules that average gradients over these ranks.
    """

    def __init__(self, groups: Sequence[Any], replicated: Sequence[DistributedDataParallel] = ()) -> None:
        self._groups, self._replicated = groups, replicated
        self.check()
        self.count = 1
        self.index = 0
        for group in groups:
            size = distributed.get_world_size(group)
            self.count, self.index = self.count * size, self.index * size + distributed.get_rank(group)

    def check(self) -> None:
        """Raises ValueError for a module that would average wrongly, without an error."""
        if any(module.static_graph for module in self._replicated):
            raise ValueError(
                "RWSAM: local_ascent=False with DistributedDataParallel(static_graph=True): the backward pass that takes norms is none "
                "that it knows, and torch then averages wrongly, without an error; leave static_graph out"
            )

    def gathered(self, own: Tensor) -> Tensor:  # (k,) -> (ranks, k)
        """What all ranks have. One all-gather a dimension of the mesh."""
        rows = own.unsqueeze(0)
        for group in reversed(self._groups):
            parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size(group))]
            distributed.all_gather(parts, rows.contiguous(), group=group)
            rows = torch.cat(parts)
        return rows

    def all_norms(self, own: Tensor) -> tuple[Tensor, slice]:  # (n,) -> (sum of n,)
        """The norms of all ranks, one rank after another, and which of them are this rank's. Waits for the device: ranks may have
        different numbers of samples."""
        counts: list[int] = self.gathered(torch.tensor([len(own)], device=own.device))[:, 0].tolist()
        padded = own.new_zeros(max(counts))
        padded[: len(own)] = own
        rows = self.gathered(padded)
        start = sum(counts[: self.index])
        return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)]), slice(start, start + len(own))


def ranks_of(model: nn.Module, norms: str, *, local_ascent: bool) -> SampleRanks | None:
    """Of a model whose gradients are averaged over ranks; None where the rank's own samples are the batch. With a local ascent over HSDP
    those of the replica group.

    Raises TypeError for a parameter of which layers read a part (tensor parallelism), and for one that is a DTensor with ``norms="jvp"``.
    """
    replicated = [] if local_ascent else replicated_modules(model)
    if replicated:
        return SampleRanks([replicated[0].process_group], replicated)
    meshes = []
    whole = {id(param) for module in sharded_modules(model) for param in module.parameters()}
    for name, param in model.named_parameters():
        if not is_dtensor(param):
            continue
        owner: Any = param
        mesh = layout_of(param).mesh
        if id(param) not in whole or mesh.ndim > 2 or (mesh.ndim == 2 and not owner.placements[0].is_replicate()):
            raise TypeError(
                f"RWSAM: parameter {name!r} is a DTensor with placements {owner.placements}, of which layers read a part (tensor "
                "parallelism): the gradient of a sample lies on several ranks. Supported are fully_shard on a mesh of one dimension, or on "
                "two (HSDP), and DistributedDataParallel"
            )
        if norms == "jvp":
            raise TypeError(
                f"RWSAM: norms='jvp': parameter {name!r} is a DTensor, and fully_shard gathers values without their derivatives; use "
                "norms='exact' or 'finite_difference'"
            )
        meshes.append(mesh)
    if not meshes:
        return None
    largest = max(meshes, key=lambda mesh: mesh.size())
    return SampleRanks(largest.get_all_groups()[1 if local_ascent else 0 :])
