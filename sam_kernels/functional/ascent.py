"""The ascent and the way back."""

from __future__ import annotations

from torch import Tensor

from sam_kernels import _validate
from sam_kernels.functional._common import Tensors, check_amp, checked, device_of, on
from sam_kernels.functional._library import operation

__all__ = ["perturb_", "restore_"]


@operation(written=("params", "old_params"), scheduled=("rho", "lambd"))
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
    check_amp(op, grad_scale, found_inf)
    for rows in checked(op, {"params": params, "grads": grads, "old_params": old_params}, written=("params", "old_params")):
        device = device_of(rows)
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
            grad_scale=on(grad_scale, device),
            found_inf=on(found_inf, device),
            from_old=from_old,
        )
        rows.finish()


@operation(written=("params",))
def restore_(params: Tensors, old_params: Tensors) -> None:
    """p <- old_p, bit for bit where the dtypes agree. Reads old_p; writes p: 2 N s bytes."""
    for rows in checked("restore_", {"params": params, "old_params": old_params}, written=("params",)):
        rows.backend.restore_(rows.lists["params"], rows.lists["old_params"])
        rows.finish()
