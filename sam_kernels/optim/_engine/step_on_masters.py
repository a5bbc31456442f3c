"""The step of a base optimizer that is not fused, made on float32 masters in the place of 16-bit parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._sharding import READS_PLAINLY
from sam_kernels.optim._engine.lists import GroupGrads
from sam_kernels.optim._engine.update import UpdateScalars, plain_step
from sam_kernels.optim._shards.dtensor import as_owner

__all__ = ["step_on_masters"]


def step_on_masters(base: Optimizer, group_grads: Sequence[GroupGrads], scalars: UpdateScalars, *, leaves_grads: bool) -> None:
    """``base.step()`` with masters in the place of the 16-bit parameters that have a gradient.

    The caller rounds those from their masters afterwards. ``param.grad`` is left unscaled and clipped, as by a plain step, rounded to its
    dtype; with ``leaves_grads`` as it is, for a caller who still needs its digits. Memory: a float32 gradient of every such parameter for
    as long as the step takes, 4 bytes a parameter, beside the base's state, which is float32.

    Raises RuntimeError where the base writes the parameters themselves: it has them from elsewhere than its ``param_groups``.
    """
    narrow = [current for current in group_grads if current.lists.masters is not None]
    grads = [grad for current in group_grads if current.lists.masters is None for grad in current.grads]
    wide = [[grad.to(torch.float32) for grad in current.grads] for current in narrow]
    pairs = {}
    for current, wide_grads in zip(narrow, wide, strict=True):
        lists = current.lists
        for owner, master, grad in zip(lists.owners, lists.old_params, wide_grads, strict=True):
            master = as_owner(owner, master).requires_grad_(owner.requires_grad)
            master.grad = as_owner(owner, grad)
            pairs[owner] = master
    owners = list(pairs)
    versions = _versions(owners)
    with _in_the_place_of_params(base, pairs):
        plain_step(base, [*grads, *(grad for each in wide for grad in each)], scalars)
    if _versions(owners) != versions:
        raise RuntimeError(
            f"SAM: master_weights=True: {type(base).__name__}.step() has written the 16-bit parameters and not the masters that its "
            "param_groups held, so it keeps parameters of its own; leave master_weights out"
        )
    if not leaves_grads and (scalars["grad_scale"] is not None or scalars["max_norm"] is not None):
        for current, wide_grads in zip(narrow, wide, strict=True):
            torch._foreach_copy_(list(current.grads), wide_grads)


@contextmanager
def _in_the_place_of_params(base: Optimizer, pairs: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within it the base's groups hold the values of ``pairs`` in the place of its keys, and its state is theirs."""
    before = [group["params"] for group in base.param_groups]
    try:
        for group in base.param_groups:
            group["params"] = [pairs.get(param, param) for param in group["params"]]
        _rename(base, pairs)
        yield
    finally:
        for group, params in zip(base.param_groups, before, strict=True):
            group["params"] = params
        _rename(base, {master: param for param, master in pairs.items()})
        for master in pairs.values():
            master.grad = None
            master.requires_grad_(False)


def _rename(base: Optimizer, names: dict[Tensor, Tensor]) -> None:
    """The state of each key becomes that of its value."""
    for before, after in names.items():
        if before in base.state:
            base.state[after] = base.state.pop(before)


def _versions(params: Sequence[Tensor]) -> list[int]:
    with READS_PLAINLY():
        return [param._version for param in params]
