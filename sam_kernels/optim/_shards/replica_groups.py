"""HSDP's replica groups: a gradient that is reduced over the ranks that together hold one copy of the parameters, and not over the copies.

FSDP2 has no public call for it: ``set_requires_all_reduce(False)`` keeps the gradient to itself, and ``.grad`` stays None. FSDP2 reduces
over the mesh that a group of its parameters refers to. During a first pass that is the mesh's dimension of shards alone, so that dtypes,
padding, offloading and hooks remain FSDP2's own. No other file of the package uses these attributes of torch, which are not public.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["ReplicaGroups"]

_USED = ("fsdp_params", "mesh_info", "post_forward_mesh_info", "gradient_divide_factor", "_partial_reduce_output", "_is_hsdp")
_USED_OF_MESHES = ("mesh", "shard_mesh_dim", "replicate_mesh_size", "reduce_scatter_process_group")


class ReplicaGroups:
    """Of modules that are sharded on one mesh (replicate, shard). ``index``: that of this rank's group, of ``count``.

    Raises ValueError for modules on other meshes, RuntimeError for a torch whose FSDP2 is another one.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        meshes: dict[Any, None] = {}
        for module, group in self._param_groups():
            _check_mesh(module, group)
            meshes[group.mesh_info.mesh] = None
        if len(meshes) != 1:
            raise ValueError(
                f"SAM: local_ascent=True needs all modules on one mesh (replicate, shard), got {list(meshes) or 'no parameter'}"
            )
        (mesh,) = meshes
        self.index: int = mesh.get_local_rank(0)
        self.count: int = mesh.size(0)

    def owns(self) -> set[int]:
        """``id()`` of every parameter that the modules reduce; right after a forward pass, which takes note of parameters put in since."""
        return {id(param.sharded_param) for _, group in self._param_groups() for param in group.fsdp_params}

    @contextmanager
    def without_all_reduce(self) -> Iterator[None]:
        """Within it, a backward pass leaves the mean over the samples of this rank's group in ``.grad``.

        Raises RuntimeError where a module holds a gradient that was reduce-scattered and is still to be all-reduced.
        """
        with ExitStack() as stack:
            for module, group in self._param_groups():
                stack.enter_context(_reduced_over_shards(module, group))
            yield

    def _param_groups(self) -> list[tuple[nn.Module, Any]]:
        """Each once: ``fully_shard`` may have been given several modules together."""
        return list({id(group): (module, group) for module in self._modules for group in _param_groups(module)}.values())


@contextmanager
def _reduced_over_shards(module: nn.Module, group: Any) -> Iterator[None]:
    whole, factor = group.mesh_info, group.gradient_divide_factor
    if group._partial_reduce_output is not None:
        raise RuntimeError(
            f"SAM: {type(module).__name__} holds a gradient of a backward pass with set_requires_all_reduce(False), which a local ascent "
            "would lose; all-reduce it in a backward pass with set_requires_all_reduce(True) first, or leave the call out"
        )
    part = _mesh_of_shards(whole)
    group.mesh_info = part
    if group.post_forward_mesh_info is whole:  # compared with the other one: resharding to the same mesh
        group.post_forward_mesh_info = part
    if factor is not None:  # of the sum over all ranks
        group.gradient_divide_factor = factor / whole.replicate_mesh_size
    try:
        if group._is_hsdp:
            raise _other_torch("a group of parameters does not follow its mesh_info")
        yield
    finally:
        group.mesh_info, group.gradient_divide_factor = whole, factor
        if group.post_forward_mesh_info is part:  # the first forward pass of all may have set another one
            group.post_forward_mesh_info = whole


def _mesh_of_shards(whole: Any) -> Any:
    """What FSDP2 would have of the mesh, if there were one copy."""
    try:
        common = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_common"]
        part: Any = common.FSDPMeshInfo(mesh=whole.mesh, shard_mesh_dim=whole.shard_mesh_dim)
    except (KeyError, AttributeError, TypeError) as error:
        raise _other_torch(repr(error)) from error
    part.reduce_scatter_process_group = whole.reduce_scatter_process_group
    return part


def _param_groups(module: Any) -> list[Any]:
    try:
        groups = list(module._get_fsdp_state()._fsdp_param_groups)
        for group in groups:
            for name in _USED:
                getattr(group, name)
            for name in _USED_OF_MESHES if group._is_hsdp else ():
                getattr(group.mesh_info, name)
    except AttributeError as error:
        raise _other_torch(str(error)) from error
    return groups


def _other_torch(why: str) -> RuntimeError:
    return RuntimeError(
        f"SAM: local_ascent=True over HSDP needs FSDP2 as it is in torch 2.13, and torch {torch.__version__} has another one ({why}); "
        "leave local_ascent out"
    )


def _check_mesh(module: nn.Module, group: Any) -> None:
    name = type(module).__name__
    if not group._is_hsdp:
        raise ValueError(
            f"SAM: local_ascent=True needs replica groups, and the mesh of {name} is {group.mesh_info.mesh}, not one of two dimensions "
            "(replicate, shard): with shards alone no rank has a gradient of the whole model before it is averaged; shard the model on "
            "such a mesh, or leave local_ascent out"
        )
    for param in group.fsdp_params:
        sharded = param.sharded_param
        if sharded.device_mesh.ndim != 2 or not sharded.placements[0].is_replicate() or sharded.placements[1].is_replicate():
            raise ValueError(
                f"SAM: local_ascent=True over HSDP is for meshes (replicate, shard), and {name} has a parameter with placements "
                f"{sharded.placements} on {sharded.device_mesh}; leave local_ascent out"
            )
