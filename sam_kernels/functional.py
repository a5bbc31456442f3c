"""The operations, over lists of tensors: each docstring is the contract that every backend keeps and ``sam_kernels.reference`` specifies.

Lists hold one tensor per parameter; ``N`` is their total number of elements, ``s`` bytes each. dtypes are float32, float64, bfloat16 and
float16, mixed freely between lists and rows. Arithmetic is float32 (float64 for a row that has a float64 tensor) with one rounding to
storage. Tensors may be non-contiguous, unaligned or empty. A trailing ``_`` means in place: data pointers never change.

Errors, common to all: ``TypeError`` for a wrong type, layout (sparse) or dtype (complex, integer), ``ValueError`` for lists whose lengths,
shapes or devices do not fit, for a tensor written twice, and for a number out of range. They name the operation, the list and the index,
and are raised before any memory is touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import Rows, split
from sam_kernels._tensor_list import TensorList

__all__ = ["adamw_step_", "combine_norms", "grad_norm", "grad_norms", "perturb_", "restore_", "sgd_step_"]

Tensors = Sequence[Tensor]
Number = float | Tensor
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_autograd(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """``torch.no_grad()`` where it is needed: an optimizer calls operations with autograd already off."""

    @functools.wraps(op)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return op(*args, **kwargs)
        with torch.no_grad():
            return op(*args, **kwargs)

    return wrapper


def grad_norm(
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Global 2-norm of the gradients: sqrt(sum g^2), or of T_w g with T_w = |p| + eta when ``adaptive`` (ASAM).

    Sums in float64 on the CPU. The order is fixed: bits depend neither on the number of threads nor on the instruction set.
    ``found_inf`` is set to 1 where the norm is not finite, and left alone otherwise.
    Reads g (and p): N s bytes.
    """
    return _grad_norms("grad_norm", [grads], params, adaptive=adaptive, eta=eta, found_inf=found_inf)[0]


def grad_norms(
    grad_groups: Sequence[Tensors],  # M groups of n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> Tensor:  # (M,) float32, float64 where a gradient is float64
    """:func:`grad_norm` of every group (one micro-batch's gradients each) in one pass. Reads M N s bytes."""
    if not isinstance(grad_groups, list | tuple):
        raise TypeError(f"grad_norms: grad_groups must be a list of lists of tensors, got {_validate.describe(grad_groups)}")
    return _grad_norms("grad_norms", grad_groups, params, adaptive=adaptive, eta=eta, found_inf=None)


@_without_autograd
def _grad_norms(
    op: str, groups: Sequence[Tensors], params: Tensors | None, *, adaptive: bool, eta: float, found_inf: Tensor | None
) -> Tensor:
    _validate.check_flag(op, "adaptive", adaptive)
    eta = _validate.check_number(op, "eta", eta, low=0.0)
    if adaptive and params is None:
        raise ValueError(f"{op}: adaptive=True needs params")
    if found_inf is not None:
        _validate.check_scalar_tensor(op, "found_inf", found_inf)
    used_params = params if adaptive else None
    for j, group in enumerate(groups):
        if not (isinstance(group, TensorList) and (used_params is None or isinstance(used_params, TensorList))):
            name = "grads" if op == "grad_norm" else f"grad_groups[{j}]"
            _validate.check_lists(op, {name: group, "params": used_params})
    grads = groups[0] if len(groups) == 1 else [grad for group in groups for grad in group]
    repeated = used_params if used_params is None or len(groups) == 1 else [param for _ in groups for param in used_params]
    group_of_row = [j for j, group in enumerate(groups) for _ in group] if len(groups) != 1 else None
    norms = []
    for rows in split({"grads": grads, "params": repeated}):
        sizes = [len(rows.indices)] if group_of_row is None else _count(group_of_row, rows.indices, len(groups))
        norms.append(rows.backend.grad_norms(rows.lists["grads"], rows.lists["params"], sizes, adaptive=adaptive, eta=eta))
    result = combine_norms(norms) if norms else torch.zeros(len(groups))
    if found_inf is not None:
        _mark_not_finite(result[0], found_inf)
    return result


def _mark_not_finite(norm: Tensor, found_inf: Tensor) -> None:
    if norm.device.type != "cpu":
        found_inf.logical_or_(~torch.isfinite(norm).to(found_inf.device))
    elif not math.isfinite(norm.item()):  # five small torch operations less than the line above
        found_inf.fill_(1.0)


def combine_norms(norms: Sequence[Tensor]) -> Tensor:
    """sqrt(sum of squares) of norms over disjoint parts, elementwise, on the first one's device. float64 where one of them is."""
    if len(norms) == 1:
        return norms[0]
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    wide = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    return cast(Tensor, torch.linalg.vector_norm(wide, dim=0)).to(dtype)


def _count(group_of_row: Sequence[int], indices: Sequence[int], groups: int) -> list[int]:
    counts = [0] * groups
    for i in indices:
        counts[group_of_row[i]] += 1
    return counts


@_without_autograd
def perturb_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    old_params: Tensors,  # n tensors
    norm: Tensor,  # () norm of the gradients as given
    *,
    rho: float,
    lambd: float = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    from_old: bool = False,
) -> None:
    """The ascent of Unified SAM (arXiv 2503.02225): old_p <- p, then p <- p + rho (1 - lambd + lambd / (norm + eps)) g.

    ``lambd`` = 1 is SAM, 0 is USAM. ``adaptive``: g is replaced by T_w^2 g, T_w = |p| + eta, and ``norm`` is that of T_w g (ASAM).
    ``from_old``: p <- old_p + ..., without saving again. ``grad_scale``: gradients and norm are those of a loss multiplied by it; the
    perturbation is that of the loss itself. Where ``found_inf`` is set or the norm is not finite, parameters are only saved (``from_old``:
    restored).
    Reads p, g; writes old_p, p: 4 N s bytes (``from_old``: reads old_p, g; writes p: 3 N s).
    """
    op = "perturb_"
    rho = _validate.check_number(op, "rho", rho, low=0.0)
    lambd = _validate.check_number(op, "lambd", lambd, low=0.0, high=1.0)
    eta = _validate.check_number(op, "eta", eta, low=0.0)
    eps = _validate.check_number(op, "eps", eps, low=0.0)
    _validate.check_flag(op, "adaptive", adaptive)
    _validate.check_flag(op, "from_old", from_old)
    _validate.check_scalar_tensor(op, "norm", norm)
    _check_amp(op, grad_scale, found_inf)
    for rows in _checked(op, {"params": params, "grads": grads, "old_params": old_params}, written=("params", "old_params")):
        device = _device(rows)
        rows.backend.perturb_(
            rows.lists["params"],
            rows.lists["grads"],
            rows.lists["old_params"],
            norm.to(device),
            rho=rho,
            lambd=lambd,
            adaptive=adaptive,
            eta=eta,
            eps=eps,
            grad_scale=_on(grad_scale, device),
            found_inf=_on(found_inf, device),
            from_old=from_old,
        )
        rows.finish()


@_without_autograd
def restore_(params: Tensors, old_params: Tensors) -> None:
    """p <- old_p, bit for bit where the dtypes agree. Reads old_p; writes p: 2 N s bytes."""
    for rows in _checked("restore_", {"params": params, "old_params": old_params}, written=("params",)):
        rows.backend.restore_(rows.lists["params"], rows.lists["old_params"])
        rows.finish()


@_without_autograd
def sgd_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    momentum_buffers: list[Tensor | None] | TensorList | None,  # n tensors
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () norm of the gradients as given
    max_norm: float | None = None,
) -> None:
    """Restore and ``torch.optim.SGD`` in one pass: the step is made from ``old_params`` (where given) and written to ``params``.

    ``momentum_buffers`` is ignored where ``momentum`` is 0. An entry that is None is a first step: the buffer becomes the update itself,
    without dampening, and is put into the list (where a skip cannot be known without waiting for a device: as zeros if there was one).
    ``grad_scale`` divides the gradients; ``max_norm`` (needs ``norm``) multiplies them by
    min(1, max_norm / (norm / grad_scale + 1e-6)). Where ``found_inf`` is set or ``norm`` is not finite, parameters are restored and nothing
    else happens. Reads old_p (else p), g, m; writes p, m: 5 N s bytes.
    """
    op = "sgd_step_"
    lr = _validate.check_number(op, "lr", lr, low=0.0)
    momentum = _validate.check_number(op, "momentum", momentum, low=0.0)
    dampening = _validate.check_number(op, "dampening", dampening)
    weight_decay = _validate.check_number(op, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(op, "nesterov", nesterov)
    _validate.check_flag(op, "maximize", maximize)
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError(f"{op}: nesterov=True needs momentum > 0 and dampening = 0, got momentum={momentum}, dampening={dampening}")
    max_norm = _check_clip(op, norm, max_norm)
    _check_amp(op, grad_scale, found_inf)
    buffers: list[Tensor | None] | TensorList | None = momentum_buffers if momentum != 0.0 else None
    if buffers is None and momentum != 0.0:
        raise TypeError(f"{op}: momentum_buffers must be a list of tensors or None, got {_validate.describe(momentum_buffers)}")
    # Whole lists before they are cut into parts: messages carry the caller's indices.
    _check_sgd_lists(op, params, grads, buffers, old_params)
    first = [] if buffers is None or isinstance(buffers, TensorList) else [i for i, buffer in enumerate(buffers) if buffer is None]
    parts: list[tuple[bool, list[int] | None]] = [(False, None)]
    if first:
        later = sorted(set(range(len(params))) - set(first))
        parts = [(True, first), *([(False, later)] if later else [])]
    checked = []
    for first_step, indices in parts:
        # Zeros, for a device on which a skipped first step is not known of without waiting: the buffer then stays, and must hold something.
        fresh = [torch.zeros_like(params[i]) for i in first] if first_step else None
        lists = {
            "params": _pick(params, indices),
            "grads": _pick(grads, indices),
            "old_params": _pick(old_params, indices),
            "momentum_buffers": fresh if fresh is not None else _pick(cast("Tensors | None", buffers), indices),
        }
        checked.append((first_step, fresh, split(lists, written=("params", "momentum_buffers"))))
    for first_step, fresh, row_groups in checked:
        stepped = True
        for rows in row_groups:
            device = _device(rows)
            stepped = rows.backend.sgd_step_(
                rows.lists["params"],
                rows.lists["grads"],
                rows.lists["momentum_buffers"],
                old_params=rows.lists["old_params"],
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                first_step=first_step,
                grad_scale=_on(grad_scale, device),
                found_inf=_on(found_inf, device),
                norm=_on(norm, device),
                max_norm=max_norm,
            )
            rows.finish()
        if fresh is not None and stepped:
            for i, buffer in zip(first, fresh, strict=True):
                cast("list[Tensor | None]", buffers)[i] = buffer


@_without_autograd
def adamw_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    exp_avgs: Tensors,  # n tensors
    exp_avg_sqs: Tensors,  # n tensors
    state_steps: Tensors,  # n () float32: steps made so far
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () norm of the gradients as given
    max_norm: float | None = None,
) -> None:
    """Restore and ``torch.optim.AdamW`` (``decoupled``) or ``Adam`` in one pass, from ``old_params`` (where given) to ``params``.

    Adds one to every ``state_steps``. ``grad_scale``, ``found_inf``, ``norm`` and ``max_norm`` as in :func:`sgd_step_`.
    Reads old_p (else p), g, m, v; writes p, m, v: 7 N s bytes.
    """
    op = "adamw_step_"
    lr = _validate.check_number(op, "lr", lr, low=0.0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{op}: betas must be a pair of numbers, got {_validate.describe(betas)}")
    checked_betas = tuple(
        _validate.check_number(op, f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True) for i, beta in enumerate(betas)
    )
    eps = _validate.check_number(op, "eps", eps, low=0.0)
    weight_decay = _validate.check_number(op, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(op, "decoupled", decoupled)
    _validate.check_flag(op, "maximize", maximize)
    max_norm = _check_clip(op, norm, max_norm)
    _check_amp(op, grad_scale, found_inf)
    lists = {"params": params, "grads": grads, "old_params": old_params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    row_groups = _checked(op, lists, written=("params", "exp_avgs", "exp_avg_sqs"))
    if not isinstance(state_steps, TensorList):
        if not isinstance(state_steps, list | tuple):
            raise TypeError(f"{op}: state_steps must be a list or tuple of tensors, got {_validate.describe(state_steps)}")
        for i, step in enumerate(state_steps):
            _validate.check_scalar_tensor(op, f"state_steps[{i}]", step)
        _validate.check_distinct(op, {"state_steps": state_steps})
    if len(state_steps) != len(params):
        raise ValueError(f"{op}: state_steps has {len(state_steps)} tensors, params has {len(params)}")
    for rows in row_groups:
        device = _device(rows)
        rows.backend.adamw_step_(
            rows.lists["params"],
            rows.lists["grads"],
            rows.lists["exp_avgs"],
            rows.lists["exp_avg_sqs"],
            state_steps if len(rows.indices) == len(params) else [state_steps[i] for i in rows.indices],
            old_params=rows.lists["old_params"],
            lr=lr,
            betas=checked_betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            grad_scale=_on(grad_scale, device),
            found_inf=_on(found_inf, device),
            norm=_on(norm, device),
            max_norm=max_norm,
        )
        rows.finish()


def _checked(op: str, lists: dict[str, Tensors | None], *, written: tuple[str, ...]) -> list[Rows]:
    if not all(tensors is None or isinstance(tensors, TensorList) for tensors in lists.values()):
        _validate.check_lists(op, lists, written=written)
    return split(lists, written=written)


def _check_sgd_lists(
    op: str, params: Tensors, grads: Tensors, buffers: list[Tensor | None] | TensorList | None, old_params: Tensors | None
) -> None:
    """A buffer that is None fits every parameter."""
    if buffers is not None and not isinstance(buffers, list):
        raise TypeError(f"{op}: momentum_buffers must be a list of tensors or None, got {_validate.describe(buffers)}")
    given = [tensors for tensors in (params, grads, buffers, old_params) if tensors is not None]
    if all(isinstance(tensors, TensorList) for tensors in given):
        return
    _validate.check_lists(op, {"params": params, "grads": grads, "old_params": old_params})
    if buffers is not None:
        if len(buffers) != len(params):
            raise ValueError(f"{op}: momentum_buffers has {len(buffers)} tensors, params has {len(params)}")
        stand_ins = [param if buffer is None else buffer for param, buffer in zip(params, buffers, strict=True)]
        _validate.check_lists(op, {"params": params, "momentum_buffers": stand_ins})
    _validate.check_distinct(op, {"params": params, "momentum_buffers": buffers or []})


def _check_amp(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if grad_scale is not None:
        _validate.check_scalar_tensor(op, "grad_scale", grad_scale)
    if found_inf is not None:
        _validate.check_scalar_tensor(op, "found_inf", found_inf)


def _check_clip(op: str, norm: Tensor | None, max_norm: float | None) -> float | None:
    if norm is not None:
        _validate.check_scalar_tensor(op, "norm", norm)
    if max_norm is None:
        return None
    if norm is None:
        raise ValueError(f"{op}: max_norm needs norm, the norm of the gradients as given")
    return _validate.check_number(op, "max_norm", max_norm, low=0.0)


def _device(rows: Rows) -> torch.device:
    params = rows.lists["params"]
    assert params is not None
    return params[0].device


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _pick(tensors: Tensors | None, indices: list[int] | None) -> Tensors | None:
    return tensors if tensors is None or indices is None else [tensors[i] for i in indices]
