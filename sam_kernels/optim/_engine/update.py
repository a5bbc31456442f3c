"""The base optimizer's step from the saved parameters: fused for torch's SGD, Adam and AdamW, restore and ``step()`` for the rest."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from sam_kernels import functional
from sam_kernels._memory_of import is_fake
from sam_kernels.optim._engine.capturable import is_recording, not_recordable
from sam_kernels.optim._engine.lists import GroupLists
from sam_kernels.optim._shards.dtensor import as_owner, local_of
from sam_kernels.optim._types import GroupOptions, ParamGroup, ParamState

__all__ = ["UpdateScalars", "can_fuse", "fused_step", "is_fused_type", "plain_step", "with_options"]


class UpdateScalars(TypedDict):
    """What decides about an update beside gradients and options, as keywords of operations.

    An update is skipped where ``found_inf`` is set; its gradients are divided by ``grad_scale`` and clipped to ``max_norm`` by ``norm``.
    """

    found_inf: Tensor  # () float32
    grad_scale: Tensor | None  # ()
    norm: Tensor | None  # () of the gradients as they are
    max_norm: float | None


def is_fused_type(base: Optimizer) -> bool:
    """Whether the base is of a class of torch's own whose update the kernels make."""
    return type(base) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def can_fuse(base: Optimizer, own_hook_ids: set[int]) -> bool:
    """Whether restore and update can be one pass: torch's own class, options the kernels know, nobody listening to ``base.step``. (Global
    hooks listen to SAM's own step.)"""
    if not is_fused_type(base):
        return False
    listeners = len(set(base._optimizer_step_pre_hooks) - own_hook_ids) + len(base._optimizer_step_post_hooks)  # not global ones
    patched = "step" in base.__dict__ and not hasattr(base.step, "_wrapped_by_lr_sched")
    return listeners == 0 and not patched and all(_group_can_fuse(group) for group in base.param_groups)


def _group_can_fuse(group: ParamGroup) -> bool:
    if group.get("amsgrad") or group.get("differentiable"):
        return False
    return not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))


def fused_step(
    base: Optimizer,
    group: ParamGroup,
    lists: GroupLists,
    grads: list[Tensor],
    old_params: list[Tensor] | None,
    scalars: UpdateScalars,
    rounding_seed: int | None,
) -> None:
    """Restore and update of the parameters in ``lists``, in the base's own state, so that its checkpoints stay its own. State that is made
    for a parameter with a master is float32."""
    step = _sgd_step if isinstance(base, torch.optim.SGD) else _adam_step
    to: _Destination = {"old_params": old_params, "to_old": lists.masters is not None, "rounding_seed": rounding_seed}
    step(base, group, lists, grads, to, scalars)


class _Destination(TypedDict):
    """Where an update starts and goes, as keywords of operations."""

    old_params: list[Tensor] | None
    to_old: bool
    rounding_seed: int | None


def _sgd_step(base: Optimizer, group: ParamGroup, lists: GroupLists, grads: list[Tensor], to: _Destination, scalars: UpdateScalars) -> None:
    buffers: Any = None
    is_first = False
    if group["momentum"] != 0:
        states = lists.states(base.state)
        buffers = [state.get("momentum_buffer") for state in states]
        is_first = not all(map(operator.is_not, buffers, repeat(None)))
        if is_first:
            _require_state(lists.params)  # a graph would begin anew at every replay
            buffers = [None if buffer is None else local_of(buffer) for buffer in buffers]
        else:
            buffers = lists.state("momentum_buffer", buffers)
    functional.sgd_step_(
        lists.params,
        grads,
        buffers,
        lr=group["lr"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        **to,
        **scalars,
    )
    if is_first:
        for owner, state, buffer in zip(lists.owners, states, buffers, strict=True):
            if buffer is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = as_owner(owner, buffer)


def _adam_step(
    base: Optimizer, group: ParamGroup, lists: GroupLists, grads: list[Tensor], to: _Destination, scalars: UpdateScalars
) -> None:
    states = lists.states(base.state)
    if not all(states):
        _make_adam_states(group, lists, states)
    steps = [state["step"] for state in states]
    if not lists.has_state("step", steps):
        steps = _steps_on_device(lists.params, states)
    functional.adamw_step_(
        lists.params,
        grads,
        lists.state("exp_avg", [state["exp_avg"] for state in states]),
        lists.state("exp_avg_sq", [state["exp_avg_sq"] for state in states]),
        lists.state("step", steps),
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=isinstance(base, torch.optim.AdamW) or group.get("decoupled_weight_decay", False),
        maximize=group["maximize"],
        **to,
        **scalars,
    )


def _make_adam_states(group: ParamGroup, lists: GroupLists, states: list[ParamState]) -> None:
    """As torch does: of a parameter that has no state at all."""
    for owner, param, state in zip(lists.owners, lists.weights, states, strict=True):
        if len(state) == 0:
            _require_state([param])
            state["step"] = _zero_step(group, param)
            for average in ("exp_avg", "exp_avg_sq"):
                state[average] = as_owner(owner, torch.zeros_like(param, memory_format=torch.preserve_format))


def _steps_on_device(params: list[Tensor], states: list[ParamState]) -> list[Tensor]:
    """The counters, those of a checkpoint of torch's own loop moved from the CPU to their parameters' device."""
    for param, state in zip(params, states, strict=True):
        if not param.is_cpu and state["step"].is_cpu:
            _require_state([param])
            state["step"] = state["step"].to(param.device, torch.float32)
    return [state["step"] for state in states]


def _require_state(params: list[Tensor]) -> None:
    if is_recording(params[0].device):
        raise not_recordable("the base optimizer's state is not there yet; make an eager step with all gradients first")


def _zero_step(group: ParamGroup, param: Tensor) -> Tensor:
    """On the parameter's device: only there is it known whether a step is skipped. (torch keeps it on the CPU unless fused or capturable,
    and takes it either way.)"""
    is_double = param.is_cpu and not group.get("fused") and torch.get_default_dtype() is torch.float64
    return torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=param.device)


def plain_step(base: Optimizer, grads: list[Tensor], scalars: UpdateScalars) -> None:
    """``base.step()`` from restored parameters, gradients unscaled and clipped in place first. Waits for the device to know of a skip."""
    found_inf, grad_scale, norm = scalars["found_inf"], scalars["grad_scale"], scalars["norm"]
    if not is_fake(found_inf):  # of a tensor without values nothing can be read; shapes do not depend on it
        if found_inf.item() != 0.0:
            return
        if grad_scale is not None and grads:
            torch._foreach_div_(grads, grad_scale.item())
        if norm is not None and scalars["max_norm"] is not None and grads:
            unscaled = norm if grad_scale is None else norm / grad_scale
            torch._foreach_mul_(grads, min(1.0, scalars["max_norm"] / (unscaled.item() + 1e-6)))
    with _global_hooks_once():
        base.step()


@contextmanager
def _global_hooks_once() -> Iterator[None]:
    """Global step hooks have been called for the wrapper's step, of which the base's is a part."""
    hooks: tuple[dict[int, Any], ...] = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


@contextmanager
def with_options(groups: list[ParamGroup], options: Mapping[int, GroupOptions]) -> Iterator[None]:
    """Inside of it, groups (by index) have other options."""
    usual = {i: {key: groups[i][key] for key in changed} for i, changed in options.items()}
    for i, changed in options.items():
        groups[i].update({key: value.item() if isinstance(value, Tensor) else value for key, value in changed.items()})
    try:
        yield
    finally:
        for i, before in usual.items():
            groups[i].update(before)
