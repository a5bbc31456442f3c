"""How noisy gradients are, and the gap that SAM climbs.

Notation: f_i the loss of sample i, V the covariance of ∇f_i over the samples, I a micro-batch of m samples, f_I the mean of its losses.
Of b micro-batches, ``norms`` holds ‖∇f_I‖ (as :func:`sam_kernels.functional.grad_norms` gives them) and ``mean_grad_norm`` is ‖ḡ‖, the norm
of the mean of their gradients.

Sources: m-sharpness, arXiv 2509.18001, for what m-SAM's regularisers are made of (tr V and E‖∇f_I‖); An Empirical Model of Large-Batch
Training, McCandlish et al. 2018, arXiv 1812.06162, for the noise scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels._validate import check_count, check_flag, check_number, check_tensor, describe

__all__ = ["expected_grad_norm", "gradient_noise_scale", "gradient_variance", "sharpness"]


def gradient_variance(
    norms: Tensor,  # (b,)
    mean_grad_norm: Tensor | float,  # ()
    *,
    micro_batch: int = 1,
    population: int | None = None,
) -> Tensor:  # ()
    """tr V of the gradient of one sample: m (mean_j ‖g_j‖² - ‖ḡ‖²) / (1 - 1/b), unbiased for independent samples.

    The covariance of the mean of m independent samples is V / m. With ``population`` = N each micro-batch is drawn without replacement out
    of N samples (and independently of the other ones): that covariance is (V / m) (N - m) / (N - 1), V being the covariance over the N,
    and the estimate is divided by (N - m) / (N - 1). Disjoint pieces of one batch out of N are no such draws: for them leave
    ``population`` out, which overestimates by a factor of N / (N - 1) only.

    Args:
        norms: ‖g_j‖ of b ≥ 2 micro-batches, floating point.
        mean_grad_norm: ‖ḡ‖ of the mean of the same gradients: a number or a tensor of one element.
        micro_batch: m, the samples in each of them.
        population: N > m, the size of the data where each micro-batch is drawn without replacement. None: independent samples.

    Raises:
        TypeError, ValueError: for what is none of these. Rounding may make the result slightly negative where gradients hardly differ.
    """
    name = "gradient_variance"
    variance, _, _, m = _variance(name, norms, mean_grad_norm, micro_batch)
    if population is not None:
        n = check_count(name, "population", population, low=m + 1)
        variance = variance / ((n - m) / (n - 1))
    return _finish(variance, norms)


def gradient_noise_scale(
    norms: Tensor,  # (b,)
    mean_grad_norm: Tensor | float,  # ()
    *,
    micro_batch: int = 1,
) -> Tensor:  # ()
    """B_simple = tr V / ‖∇f‖² (arXiv 1812.06162), in samples: batches much smaller than it are mostly noise.

    tr V as :func:`gradient_variance` gives it, ‖∇f‖² by its unbiased estimate ‖ḡ‖² - tr V / (m b). Where the noise drowns the gradient that
    estimate is not positive, and the result is inf: the batch is too small to tell. Averaging numerator and denominator over steps before
    dividing, as the authors do, needs :func:`gradient_variance` alone. Arguments and errors as there.
    """
    variance, mean, b, m = _variance("gradient_noise_scale", norms, mean_grad_norm, micro_batch)
    squared_norm = mean.square() - variance / (m * b)
    return _finish(torch.where(squared_norm <= 0, math.inf, variance / squared_norm), norms)


def expected_grad_norm(norms: Tensor) -> tuple[Tensor, Tensor]:  # (b,) -> (), ()
    """E‖∇f_I‖ for the micro-batch size of ``norms``, which normalised m-SAM regularises (arXiv 2509.18001), and its standard error.

    The mean of the norms, and their standard deviation over √b, for independent micro-batches; NaN where b is 1. Errors: TypeError,
    ValueError for what is no floating-point tensor of one dimension with an element.
    """
    wide = _check_norms("expected_grad_norm", norms, low=1)
    deviation = wide.std() if len(wide) > 1 else torch.full_like(wide[0], math.nan)
    return _finish(wide.mean(), norms), _finish(deviation / math.sqrt(len(wide)), norms)


@torch.no_grad()
def sharpness(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    rho: float,
    lambd: float = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:  # ()
    """f(w + e) - f(w), e the ascent of :func:`sam_kernels.functional.perturb_`: by default ρ g / ‖g‖, SAM's own (arXiv 2010.01412).

    Afterwards the parameters are what they were bit for bit, also where the closure raises, and ``grad`` is what the closure's second
    call left: that at the perturbed point. Parameters without a gradient do not move. Where the gradient is not finite nothing moves and
    the result is f(w) - f(w): 0, or NaN. Buffers (running statistics) are updated by both calls.

    Memory: a copy of the parameters while it runs. Bytes beside the closure: norm 1, copy 2, perturb 3, restore 2: 8 N s.

    Args:
        closure: zeroes the gradients, runs forward and backward and returns the loss, a tensor of one element; called twice.
        params: the parameters to perturb, together.
        rho, lambd, adaptive, eta, eps: as for :func:`sam_kernels.functional.perturb_`.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, or a loss that is no tensor of one element.
    """
    name = "sharpness"
    if not callable(closure):
        raise TypeError(f"{name}: closure must be a callable, got {describe(closure)}")
    if isinstance(params, Tensor | str | dict) or not isinstance(params, Iterable):
        raise TypeError(f"{name}: params must be tensors in a list, got {describe(params)}")
    everything = [check_tensor(name, f"params[{i}]", param) for i, param in enumerate(params)]
    rho = check_number(name, "rho", rho, low=0.0)
    lambd = check_number(name, "lambd", lambd, low=0.0, high=1.0)
    adaptive = check_flag(name, "adaptive", adaptive)
    eta = check_number(name, "eta", eta, low=0.0)
    eps = check_number(name, "eps", eps, low=0.0)
    first = _loss(name, closure)
    moving = [param for param in dict.fromkeys(everything) if param.grad is not None]
    grads = [param.grad for param in moving if param.grad is not None]
    old_params = [param.detach().clone() for param in moving]
    try:
        if moving:
            norm = functional.grad_norm(grads, moving, adaptive=adaptive, eta=eta)
            functional.perturb_(moving, grads, old_params, norm, rho=rho, lambd=lambd, adaptive=adaptive, eta=eta, eps=eps, from_old=True)
        second = _loss(name, closure)
    finally:
        functional.restore_(moving, old_params)
    return second - first


def _loss(name: str, closure: Callable[[], Any]) -> Tensor:
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"{name}: closure must return the loss, a tensor of one element, got {describe(loss)}")
    return loss.detach().reshape(()).clone()


def _check_norms(name: str, norms: Tensor, *, low: int) -> Tensor:
    """``norms`` in float64."""
    check_tensor(name, "norms", norms)
    if norms.dim() != 1 or len(norms) < low:
        raise ValueError(f"{name}: norms must have one dimension and at least {low} elements, got {describe(norms)}")
    return norms.detach().to(torch.float64)


def _variance(name: str, norms: Tensor, mean_grad_norm: Tensor | float, micro_batch: int) -> tuple[Tensor, Tensor, int, int]:
    """tr V for independent samples and the norm of the mean, b and m. In float64: a difference of squares has few digits in float32."""
    wide = _check_norms(name, norms, low=2)
    m = check_count(name, "micro_batch", micro_batch, low=1)
    if isinstance(mean_grad_norm, Tensor):
        check_tensor(name, "mean_grad_norm", mean_grad_norm)
        if mean_grad_norm.numel() != 1:
            raise ValueError(f"{name}: mean_grad_norm must have one element, got {describe(mean_grad_norm)}")
        mean = mean_grad_norm.detach().to(wide.device, torch.float64).reshape(())
    else:
        mean = wide.new_full((), check_number(name, "mean_grad_norm", mean_grad_norm, low=0.0))
    return m * (wide.square().mean() - mean.square()) / (1 - 1 / len(wide)), mean, len(wide), m


def _finish(result: Tensor, norms: Tensor) -> Tensor:
    return result.to(torch.float64 if norms.dtype is torch.float64 else torch.float32)
