"""Each operation as a call on lists of tensors: through ``sam_kernels`` on a backend, and as the best torch offers for the same work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sam_kernels
from bench.byte_model import CALLS
from bench.workloads import Shape
from sam_kernels import functional as F
from sam_kernels._tensor_list import TensorList

__all__ = ["ADAMW", "SGD", "Lists", "describe_once", "make_lists", "ours", "torch_call"]

Lists = dict[str, list[Tensor]]
Call = Callable[[Lists], object]

_SLICE = 1000  # elements, where a workload has no matrices

SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


def make_lists(op: str, shapes: tuple[Shape, ...], dtype: torch.dtype, device: str = "cpu") -> Lists:
    """Return the lists of an entry of :data:`bench.byte_model.CALLS`, positive everywhere (second moments must be), and its scalars."""
    if op == "centralize_":
        shapes = tuple(map(_with_slices, shapes))
    drawn = [torch.rand(shape, device=device).to(dtype) for shape in shapes]  # once: drawing takes longer than what is measured
    first, *others = CALLS[op].lists
    lists = {first: drawn} | {name: [tensor.clone() for tensor in drawn] for name in others}
    if op.startswith("perturb_"):
        lists["norm"] = [torch.tensor(3.0, device=device)]
    if op == "check_finite_":
        lists["found_inf"] = [torch.zeros((), device=device)]
    if op == "adamw_step_":
        lists["state_steps"] = [torch.tensor(1.0, device=device) for _ in shapes]
    return lists


def _with_slices(shape: Shape) -> Shape:
    """One dimension more where there is one: a vector would not be written, and the byte model count too many."""
    if len(shape) != 1:
        return shape
    return (shape[0] // _SLICE, _SLICE) if shape[0] % _SLICE == 0 else (1, shape[0])


def describe_once(lists: Lists) -> Lists:
    """The same tensors in trusted lists, which is how the optimizers call the operations."""
    return {name: TensorList(tensors) for name, tensors in lists.items()}


_OURS: dict[str, Call] = {
    "grad_norm": lambda b: F.grad_norm(b["grads"]),
    "grad_norm adaptive": lambda b: F.grad_norm(b["grads"], b["params"], adaptive=True),
    "check_finite_": lambda b: F.check_finite_(b["grads"], b["found_inf"][0]),
    "centralize_": lambda b: F.centralize_(b["grads"]),
    "direction_norm_": lambda b: F.direction_norm_(b["grads"], b["ema"], kind="friendly"),
    "grad_dots": lambda b: F.grad_dots(b["lefts"], b["rights"]),
    "combine_": lambda b: F.combine_(b["outs"], b["lefts"], b["rights"], left_weight=1.5, right_weight=-0.5),
    "combine_ three lists": lambda b: F.combine_(
        b["outs"], b["outs"], b["rights"], b["origins"], left_weight=1.0, right_weight=1e-6, origin_weight=-1e-6
    ),
    "perturb_": lambda b: F.perturb_(b["params"], b["grads"], b["old_params"], b["norm"][0], rho=1e-6),
    "perturb_ from backups": lambda b: F.perturb_(b["params"], b["grads"], b["old_params"], b["norm"][0], rho=1e-6, from_old=True),
    "perturb_ along averages": lambda b: F.perturb_(
        b["params"], b["ema"], b["old_params"], b["norm"][0], rho=1e-6, ema=b["ema"], kind="vasso"
    ),
    "random_perturb_": lambda b: F.random_perturb_(b["params"], b["old_params"], seed=1, scale=1e-6, distribution="normal"),
    "restore_": lambda b: F.restore_(b["params"], b["old_params"]),
    "sgd_step_": lambda b: F.sgd_step_(b["params"], b["grads"], b["momentum_buffers"], old_params=b["old_params"], **SGD),
    "sgd_step_ in place": lambda b: F.sgd_step_(b["params"], b["grads"], b["momentum_buffers"], **{**SGD, "lr": 1e-6}),
    "adamw_step_": lambda b: F.adamw_step_(
        b["params"], b["grads"], b["exp_avgs"], b["exp_avg_sqs"], b["state_steps"], old_params=b["old_params"], decoupled=True, **ADAMW
    ),
}


def ours(op: str, backend: str) -> Call:
    def run(lists: Lists) -> None:
        with sam_kernels.use_backend(backend):
            _OURS[op](lists)

    return run


def _torch_adaptive_norm(b: Lists) -> object:
    return torch.nn.utils.get_total_norm(torch._foreach_mul(torch._foreach_abs(b["params"]), b["grads"]))


def _torch_centralize(b: Lists) -> object:
    for grad in b["grads"]:
        if grad.dim() > 1:
            grad.sub_(grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True))
    return torch.nn.utils.get_total_norm(b["grads"])


def _torch_direction_norm(b: Lists) -> object:
    directions = torch._foreach_sub(b["grads"], b["ema"])
    torch._foreach_mul_(b["ema"], 0.6)
    torch._foreach_add_(b["ema"], b["grads"], alpha=0.4)
    return torch.nn.utils.get_total_norm(directions)


def _torch_dots(b: Lists) -> object:
    """torch has no inner product of lists: one of all products' sums, and two norms."""
    products = torch._foreach_mul(b["lefts"], b["rights"])
    return [torch.stack([product.sum() for product in products]).sum(), *map(torch.nn.utils.get_total_norm, (b["lefts"], b["rights"]))]


def _torch_combine(b: Lists) -> object:
    torch._foreach_copy_(b["outs"], b["lefts"])
    torch._foreach_mul_(b["outs"], 1.5)
    torch._foreach_add_(b["outs"], b["rights"], alpha=-0.5)
    return torch.nn.utils.get_total_norm(b["outs"])


def _torch_combine_three(b: Lists) -> object:
    torch._foreach_add_(b["outs"], b["rights"], alpha=1e-6)
    torch._foreach_add_(b["outs"], b["origins"], alpha=-1e-6)
    return torch.nn.utils.get_total_norm(b["outs"])


def _torch_perturb(b: Lists) -> None:
    torch._foreach_copy_(b["old_params"], b["params"])
    torch._foreach_add_(b["params"], b["grads"], alpha=(1e-6 / b["norm"][0]).item())


def _torch_perturb_again(b: Lists) -> None:
    torch._foreach_copy_(b["params"], b["old_params"])
    torch._foreach_add_(b["params"], b["grads"], alpha=(1e-6 / b["norm"][0]).item())


def _torch_perturb_along(b: Lists) -> None:
    torch._foreach_copy_(b["old_params"], b["params"])
    torch._foreach_add_(b["params"], b["ema"], alpha=(1e-6 / b["norm"][0]).item())


def _torch_random_perturb(b: Lists) -> None:
    torch._foreach_copy_(b["old_params"], b["params"])
    for param in b["params"]:
        param.add_(torch.randn_like(param), alpha=1e-6)


def _torch_sgd(b: Lists) -> None:
    torch._foreach_copy_(b["params"], b["old_params"])
    torch._fused_sgd_(b["params"], b["grads"], b["momentum_buffers"], is_first_step=False, **SGD)


def _torch_sgd_in_place(b: Lists) -> None:
    torch._fused_sgd_(b["params"], b["grads"], b["momentum_buffers"], is_first_step=False, **{**SGD, "lr": 1e-6})


def _torch_adamw(b: Lists) -> None:
    torch._foreach_copy_(b["params"], b["old_params"])
    torch._foreach_add_(b["state_steps"], 1)
    options = {name: value for name, value in ADAMW.items() if name != "betas"}
    torch._fused_adamw_(
        b["params"], b["grads"], b["exp_avgs"], b["exp_avg_sqs"], [], b["state_steps"],
        beta1=ADAMW["betas"][0], beta2=ADAMW["betas"][1], amsgrad=False, **options,
    )  # fmt: skip


_TORCH: dict[str, Call] = {
    "grad_norm": lambda b: torch.nn.utils.get_total_norm(b["grads"]),
    "grad_norm adaptive": _torch_adaptive_norm,
    "check_finite_": lambda b: torch.nn.utils.get_total_norm(b["grads"]).isfinite(),
    "centralize_": _torch_centralize,
    "direction_norm_": _torch_direction_norm,
    "grad_dots": _torch_dots,
    "combine_": _torch_combine,
    "combine_ three lists": _torch_combine_three,
    "perturb_": _torch_perturb,
    "perturb_ from backups": _torch_perturb_again,
    "perturb_ along averages": _torch_perturb_along,
    "random_perturb_": _torch_random_perturb,
    "restore_": lambda b: torch._foreach_copy_(b["params"], b["old_params"]),
    "sgd_step_": _torch_sgd,
    "sgd_step_ in place": _torch_sgd_in_place,
    "adamw_step_": _torch_adamw,
}


def torch_call(op: str) -> Call:
    """get_total_norm, ``_foreach_copy_`` and ``_foreach_add_``, and torch's fused optimizers after a restoring ``_foreach_copy_``."""
    return _TORCH[op]
