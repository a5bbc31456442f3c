"""m-SAM over the replica groups of HSDP: ``fully_shard`` on a mesh (replicate, shard)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from sam_kernels._sharding import sharded_modules
from sam_kernels.optim._batches.closures import TwoPasses
from sam_kernels.optim._batches.micro_batches import GradientMean
from sam_kernels.optim._engine.lists import param_name
from sam_kernels.optim._replicas.replicas import Replicas, modules_of
from sam_kernels.optim._shards.replica_groups import ReplicaGroups
from sam_kernels.optim._types import ParamGroup
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

__all__ = ["HybridReplicas", "replicas_of"]


class HybridReplicas(Replicas):
    """Copies of parameters that are DTensors, with a local ascent.

    First passes reduce gradients within a replica group, second passes over all ranks. Every descent of several micro-batches is
    all-reduced by itself: FSDP2 reduces the new gradient of a backward pass alone, so that the last one cannot carry a mean of the others.
    Skipped steps are agreed on over the meshes of the parameters, as always with shards.
    """

    def __init__(self, modules: Sequence[nn.Module], direction: Direction, descent: Descent) -> None:
        super().__init__(None, direction, descent, local_ascent=False)
        self.ascends_locally = self.has_groups = True
        self._check_parts()
        self._groups = ReplicaGroups(modules)

    @contextmanager
    def without_averaging(self) -> Iterator[None]:
        """Within it, backward leaves the gradient of the replica group's samples."""
        with self._groups.without_all_reduce():
            yield

    def arranged(self, passes: Sequence[TwoPasses], mean: GradientMean | None, groups: list[ParamGroup]) -> Sequence[TwoPasses]:
        """The passes of a step."""
        return [(self.first_pass(ascent, groups), descent) for ascent, descent in passes]

    def index_of(self, micro_batch: int, count: int) -> int:
        """The place of this replica group's micro-batch among those of all groups: group by group, ``count`` each."""
        return self._groups.index * count + micro_batch

    def index_of_call(self, made: int) -> int:
        """The place of this replica group's call of ``backward`` among those of all groups."""
        return made * self._groups.count + self._groups.index

    def check_first_pass(self, groups: list[ParamGroup]) -> None:
        """After the first pass. Raises ValueError, by name, for a parameter whose gradient another module has reduced, or none."""
        ours = self._groups.owns()
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if param.requires_grad and id(param) not in ours:
                    raise ValueError(
                        f"SAM: local_ascent=True over HSDP, and parameter {param_name(group, i, j)} is none that the modules in model= "
                        "shard on their mesh (replicate, shard), so that its gradient is not that of a replica group; pass the root module "
                        "of fully_shard as model=, or make another optimizer for the parameter"
                    )

    def check_two_steps(self) -> None:
        """Raises RuntimeError: FSDP2 averages what the caller's own backward passes compute."""
        raise RuntimeError(
            "SAM: local_ascent=True over HSDP needs step(closure) or backward(closure): FSDP2 has averaged the gradient over all replicas "
            "where first_step would take it; leave local_ascent out for the two-step API"
        )


def replicas_of(
    model: nn.Module | Sequence[nn.Module] | None,
    direction: Direction,
    descent: Descent,
    process_group: Any,
    *,
    local_ascent: bool | None,
    freezes: bool,
) -> Replicas:
    """The replicas among the optimizer's ``model``. Raises ValueError for a local ascent of what has none."""
    modules = [each for module in modules_of(model) for each in sharded_modules(module)] if local_ascent is True else []
    if not modules:
        return Replicas(model, direction, descent, local_ascent=local_ascent, process_group=process_group, freezes=freezes)
    if process_group is not None:
        raise ValueError(
            "SAM: local_ascent=True over HSDP and process_group: ranks of the group may belong to several replica groups; leave one out"
        )
    if freezes:
        raise ValueError("SAM: local_ascent=True over HSDP and freeze_unperturbed=True are not supported together; leave one out")
    return HybridReplicas(modules, direction, descent)
