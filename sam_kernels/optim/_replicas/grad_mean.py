"""The mean over replicas of the gradients of some parameters, where ``DistributedDataParallel`` cannot take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["average_grads_"]


@torch.no_grad()
def average_grads_(params: Sequence[Tensor], process_group: Any, *, may_differ: bool) -> None:
    """Makes gradients their means over the ranks of ``process_group``, in their own dtype, as ``DistributedDataParallel`` does.

    One all-reduce for each device and dtype, over n bytes of gradients. A parameter without a gradient on this rank counts as zero.
    ``may_differ``: ranks may use different parameters. One that no rank has used then keeps no gradient: one more all-reduce, of a byte a
    parameter, for which the host waits.
    """
    used = _used_by_any(params, process_group) if may_differ and params else [True] * len(params)
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param, is_used in zip(params, used, strict=True):
        if is_used:
            batches.setdefault((param.device, param.dtype), []).append(param)
    for batch in batches.values():
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in batch]
        flat = torch.cat([grad.reshape(-1) for grad in grads]).div_(distributed.get_world_size(process_group))
        distributed.all_reduce(flat, group=process_group)
        for param, grad, mean in zip(batch, grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view(grad.shape))
            param.grad = grad


def _used_by_any(params: Sequence[Tensor], process_group: Any) -> list[bool]:
    used = torch.tensor([param.grad is not None for param in params], dtype=torch.uint8, device=params[0].device)
    distributed.all_reduce(used, op=distributed.ReduceOp.MAX, group=process_group)
    return list(map(bool, used.tolist()))
