"""Shards that a step cannot be made of: FSDP1's, and those of an optimizer that shards its parameters."""

from __future__ import annotations

import sys
from types import FrameType

from torch import Tensor

from sam_kernels.optim._types import ParamGroup

__all__ = ["check_no_sharding_optimizer", "check_whole"]

_INSTEAD = (
    "wrap the model in DistributedDataParallel and shard the optimizer's state alone: SAM(ddp.parameters(), ZeroRedundancyOptimizer, "
    "optimizer_class=torch.optim.AdamW, lr=...)"
)
_FRAMES_LOOKED_AT = 32


def check_whole(param: Tensor, name: str) -> None:
    """Raises TypeError for a parameter of which a rank has a part, as an ordinary tensor: of FSDP1, or of DDP over tensor parallelism."""
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):  # torch's own marks
        raise TypeError(
            f"SAM: parameter {name} is sharded by FullyShardedDataParallel (FSDP1); the norm of a shard is not the norm of the gradient, "
            f"so every rank would perturb differently; {_INSTEAD}"
        )
    if hasattr(param, "_st_info"):  # torch's own mark
        raise TypeError(
            f"SAM: parameter {name} is a part of a DTensor that DistributedDataParallel has made an ordinary tensor of (tensor parallelism "
            "inside of it); the norm of a part is not the norm of the gradient: use fully_shard on the other dimension of the mesh in the "
            "place of DistributedDataParallel"
        )


def check_no_sharding_optimizer(group: ParamGroup) -> None:
    """Raises TypeError where an optimizer that shards its parameters is making SAM for one of the shards.

    Such optimizers (``ZeroRedundancyOptimizer``, fairscale's ``OSS``) put the keywords of the inner optimizer into every group, SAM's
    ``base_optimizer`` among them. Where they are bound beforehand (``functools.partial``) the arguments show nothing, and the caller is
    looked for: a few frames, once for each group.
    """
    if "base_optimizer" in group or _is_made_by_zero(sys._getframe(1)):
        raise TypeError(
            "SAM: made inside ZeroRedundancyOptimizer, which gives every rank a part of the parameters; the norm of a part is not the norm "
            f"of the gradient; {_INSTEAD}"
        )


def _is_made_by_zero(frame: FrameType | None) -> bool:
    """``ZeroRedundancyOptimizer`` makes the inner optimizer in this method. (Its class is not imported here: it may not be there.)"""
    for _ in range(_FRAMES_LOOKED_AT):
        if frame is None:
            return False
        if frame.f_code.co_name == "_init_local_optimizer" and frame.f_globals.get("__name__", "").startswith("torch.distributed.optim"):
            return True
        frame = frame.f_back
    return False
