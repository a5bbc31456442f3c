"""SASSHA: steps scaled by the diagonal of the Hessian at the perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_kernels import functional
from sam_kernels._sharding import is_dtensor
from sam_kernels._validate import check_count, check_number, check_seed, describe
from sam_kernels.monitors._products import HessianProducts
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.optim.sam import SAM
from sam_kernels.schedules._at_step import RhoSchedule

__all__ = ["SASSHA", "HessianScaled"]

_REFUSED = {  # keywords of SAM
    "descent": "its step is along the gradient of the second pass",
    "capturable": "Hessians are differentiated by the host",
    "master_weights": "second derivatives of 16-bit parameters have two digits",
    "stochastic_rounding": "second derivatives of 16-bit parameters have two digits",
    "process_group": "the Hessian would be that of one rank's loss",
    "local_ascent": "the Hessian would be that of one rank's loss",
}


class HessianScaled(Optimizer):
    """The base of :class:`SASSHA`, whose docstring has the formula.

    State of a parameter: ``exp_avg`` and ``exp_hessian`` in its shape and dtype, ``step`` and ``hessian_step`` (the step of the last new
    estimate), (). ``estimates``: by parameter, of the step to come; none: that of the step before stays.
    """

    estimates: Mapping[Tensor, Tensor] = MappingProxyType({})

    def __init__(
        self, params: Any, lr: float = 0.15, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-4, weight_decay: float = 0.0
    ) -> None:
        name = "SASSHA"
        check_number(name, "lr", lr, low=0.0)
        check_number(name, "eps", eps, low=0.0)
        check_number(name, "weight_decay", weight_decay, low=0.0)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"{name}: betas must be two numbers, got {describe(betas)}")
        for i, beta in enumerate(betas):
            check_number(name, f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Raises RuntimeError for a parameter without an estimate of its Hessian, and for a closure."""
        if closure is not None:
            raise RuntimeError("HessianScaled.step: the closure is SASSHA's; call SASSHA.step(closure)")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, estimate, (beta1, beta2) = self.state[param], self.estimates.get(param), group["betas"]
        if not state:
            if estimate is None:
                raise RuntimeError("HessianScaled.step: a parameter has no estimate of its Hessian; call SASSHA.step(closure)")
            state["step"], state["hessian_step"] = torch.zeros(()), torch.zeros(())
            state["exp_avg"], state["exp_hessian"] = (torch.zeros_like(param, requires_grad=False) for _ in range(2))
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        if estimate is not None:
            state["exp_hessian"].mul_(beta2).add_(estimate.abs().to(param.dtype), alpha=1 - beta2)
            state["hessian_step"].copy_(state["step"])
        lr, step, hessian_step = float(group["lr"]), state["step"].item(), state["hessian_step"].item()
        scale = (state["exp_hessian"] / (1 - beta2**hessian_step)).sqrt_().add_(group["eps"])
        param.mul_(1 - lr * group["weight_decay"]).addcdiv_(state["exp_avg"], scale, value=-lr / (1 - beta1**step))


class SASSHA(SAM):
    r"""Sharpness-aware adaptive second-order steps (arXiv 2502.18153): SAM's gradient over the root of the Hessian's diagonal.

    With e SAM's ascent, g_p = ∇f(w + e), z of random signs, and t = 1, 2, … the step::

        h = z * ∇²f(w + e) z                                          every ``hessian_every`` steps, from the first on
        m = beta1 m + (1 - beta1) g_p
        D = beta2 D + (1 - beta2) |h|                                 where h is new
        w = (1 - lr weight_decay) w - lr m / (1 - beta1^t) / (sqrt(D / (1 - beta2^s)) + eps)

    h is the mean over ``num_samples`` vectors (Hutchinson, 1990), and s the step of the last new h. So it is in the authors' code: D has
    been averaged over fewer estimates than s, and is small by that in the first steps. Its defaults are lr = 0.15, beta = (0.9, 0.999),
    eps = 1e-4 and 10 steps between estimates; ρ = 0.2 is that of its scripts for CIFAR-10 with wrong labels.

    Memory beside SAM's: m and D, 2 N s, and in a step with a new h the graph of the backward pass and four vectors. Cost of such a step
    beside SAM's: a backward pass through the second one for each sample, about two backward passes. Weights are restored before the step,
    which PyTorch's own operations make.

    The step is skipped where a gradient or h is not finite; an estimate that was due is then made in the next step. z depends on ``seed``,
    the step and the sample, so that a run goes on from a checkpoint with the same ones.

    Args:
        params: as for :class:`SAM`: float32 or float64, in one process.
        lr, betas, eps, weight_decay: of the formula, and options of groups.
        rho: as for :class:`SAM`. With ρ = 0 everywhere the closure is called once, at w.
        hessian_every: steps from an estimate to the next, at least 1.
        num_samples: vectors of an estimate, at least 1.
        seed: of the vectors, in [0, 2^64).
        sam_kwargs: :class:`SAM`'s keywords (``model``, ``lambd``, ``direction``, ``max_grad_norm``, …) but those refused below.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, 16-bit or sharded parameters, a ``DistributedDataParallel``
            module in ``model``, and ``descent``, ``capturable``, ``master_weights``, ``stochastic_rounding``, ``process_group`` and
            ``local_ascent``.
    """

    _shared_keywords = (*SAM._shared_keywords, "lr", "betas", "eps", "weight_decay")  # passed on to the base
    _kept = (*SAM._kept, "hessian_every", "num_samples", "seed")

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        rho: RhoSchedule = 0.2,
        hessian_every: int = 10,
        num_samples: int = 1,
        seed: int = 0,
        **sam_kwargs: Any,
    ) -> None:
        self.hessian_every = check_count("SASSHA", "hessian_every", hessian_every, low=1)
        self.num_samples = check_count("SASSHA", "num_samples", num_samples, low=1)
        self.seed = check_seed("SASSHA", "seed", seed)
        for keyword, reason in _REFUSED.items():
            if sam_kwargs.get(keyword):
                raise ValueError(f"SASSHA: {keyword} is not supported: {reason}")
        models = sam_kwargs.get("model")
        for module in models if isinstance(models, Sequence) else [models]:
            if isinstance(module, nn.Module) and any(isinstance(each, DistributedDataParallel) for each in module.modules()):
                raise ValueError("SASSHA: DistributedDataParallel is not supported: the Hessian would be that of one rank's loss")
        super().__init__(params, HessianScaled, rho=rho, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **sam_kwargs)
        _check_params(self.param_groups)

    @torch.no_grad()
    def step(  # type: ignore[override]  # one closure, of a loss without a backward pass
        self, closure: Callable[[], Tensor], *, grad_scaler: GradScaler | None = None
    ) -> Tensor:
        """One step. Returns the loss of the first pass, without its graph.

        Args:
            closure: runs the forward pass and returns the loss, a floating-point tensor of one element; no ``zero_grad``, no ``backward``:
                gradients are set to None and computed here. Called twice. Its operations need second derivatives: see
                :func:`sam_kernels.monitors.hessian_trace` for what is refused.
            grad_scaler: refused.

        Raises:
            TypeError, ValueError: for what is no closure, for a ``grad_scaler``.
            RuntimeError: with several ranks; for losses without second derivatives.
        """
        if not callable(closure):
            raise TypeError(f"SASSHA.step: closure must be a callable that returns the loss, got {describe(closure)}")
        if grad_scaler is not None or "grad_scale" in self.__dict__:
            raise ValueError("SASSHA.step: grad_scaler is not supported: estimates of the Hessian are those of unscaled losses")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise RuntimeError("SASSHA.step: several ranks are not supported: the Hessian would be that of one rank's loss")
        base: Any = self.base_optimizer
        base.estimates = {}
        try:
            loss: Tensor = self._make_step([(partial(self._plain_pass, closure), partial(self._last_pass, closure))], None)
        finally:
            base.estimates = {}
        return loss

    def first_step(self, *args: Any, **kwargs: Any) -> None:
        """Raises RuntimeError: there is no two-step API."""
        raise RuntimeError("SASSHA.first_step: the second pass is differentiated again; call step(closure)")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises RuntimeError: the step is more than a gradient."""
        raise RuntimeError("SASSHA.backward: the step is more than a gradient; call step(closure)")

    def _plain_pass(self, closure: Callable[[], Tensor]) -> Tensor:
        self.zero_grad()
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"SASSHA.step: closure must return the loss, a tensor of one element, got {describe(loss)}")
        if not loss.requires_grad:
            raise RuntimeError("SASSHA.step: closure returned a loss without a graph; it was detached, or computed under torch.no_grad")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()

    def _last_pass(self, closure: Callable[[], Tensor]) -> Tensor:
        """Leaves the gradient, and in every ``hessian_every``-th step the base's estimates, of the weights as they are."""
        t, params = int(self._passes.ascent_plan.groups[0].t), self._all_trainable()
        if (t - 1) % self.hessian_every and all(self.base_optimizer.state.get(param) for param in params):
            return self._plain_pass(closure)
        _check_params(self.param_groups)
        self.zero_grad()
        losses: list[Tensor] = []

        def noted() -> Tensor:
            losses.append(closure())
            return losses[-1]

        products = HessianProducts("SASSHA", noted, params)
        diagonal = products.diagonal([derived_seed(self.seed, t, k) for k in range(self.num_samples)])
        estimates = {}
        for (param, grad), estimate in zip(products.gradients(), diagonal, strict=True):
            if grad is not None:
                param.grad, estimates[param] = grad.clone(), estimate
        self._passes.skips.forget_last_step()
        functional.check_finite_(list(estimates.values()), self._passes.found_inf)
        base: Any = self.base_optimizer
        base.estimates = estimates
        return losses[-1].detach()

    def _all_trainable(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"] if param.requires_grad]


def _check_params(groups: Sequence[dict[str, Any]]) -> None:
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if is_dtensor(param):
                raise TypeError(f"SASSHA: param_groups[{i}]['params'][{j}] is sharded, which is not supported; use a model of one process")
            if param.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"SASSHA: param_groups[{i}]['params'][{j}] is of {param.dtype}: second derivatives need float32 or float64")
