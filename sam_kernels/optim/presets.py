"""Named members of the family: :class:`SAM` with a radius, a direction and a descent rule of their own.

All take :class:`SAM`'s other arguments. Defaults are those of the authors' code where a docstring says so; a method whose authors tune its
radius has :class:`SAM`'s, 0.05.
"""

from __future__ import annotations

from typing import Any

import torch

from sam_kernels._validate import check_number, check_number_or_tensor
from sam_kernels.optim import descents, directions
from sam_kernels.optim._types import Keywords
from sam_kernels.optim.sam import SAM
from sam_kernels.schedules import LRProportional
from sam_kernels.schedules._at_step import RhoSchedule, Schedule

__all__ = [
    "ASAM",
    "CRSAM",
    "GCSAM",
    "GSAM",
    "RSAM",
    "S2SAM",
    "SAMSPS",
    "USAM",
    "WSAM",
    "Extragradient",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "UnifiedSAM",
    "VaSSO",
]


def _is_given(name: str, part: str, kwargs: Keywords) -> None:
    if part in kwargs:
        raise TypeError(f"{name}: its {part} is what makes it {name}; combine directions and descent rules with SAM(direction=, descent=)")


class USAM(SAM):
    """Unnormalised SAM, e = ρ g: :class:`SAM` with ``lambd=0`` (arXiv 2503.02225). Memory and bytes: SAM's.

    The length of the perturbation follows the gradient's, so the useful ρ is another than SAM's, usually larger: tune it. ρ = 0.05 is
    SAM's.
    """

    def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
        if "lambd" in kwargs:
            raise TypeError("USAM: lambd is 0 by definition; use UnifiedSAM to choose it")
        super().__init__(params, base_optimizer, lambd=0.0, **kwargs)


class UnifiedSAM(SAM):
    """SAM and USAM mixed, e = ρ (1 - λ + λ / ‖g‖) g (arXiv 2503.02225). Memory and bytes: SAM's.

    λ is a number in [0, 1], ``'1/t'``, ``'1-1/t'`` or a callable t → λ. λ = 0.5 is ours, ρ = 0.05 is SAM's.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, lambd: Schedule = 0.5, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, lambd=lambd, **kwargs)


class ASAM(SAM):
    """Adaptive SAM (arXiv 2102.11600): e = ρ T² g / ‖T g‖ with T = |w| + eta, so that ρ does not depend on the weights' scale.

    Memory and bytes: SAM's. ρ = 0.5 and eta = 0.01 in the authors' code, which takes T = 1 for parameters that are no weights (biases,
    normalisation): give those a group with ``adaptive=False``.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: RhoSchedule = 0.5, eta: float = 0.01, **kwargs: Any) -> None:
        if "adaptive" in kwargs:
            raise TypeError("ASAM: adaptive is True by definition; set it in a parameter group to leave that out")
        super().__init__(params, base_optimizer, rho=rho, eta=eta, adaptive=True, **kwargs)


class Extragradient(SAM):
    """The extragradient method, w <- w - lr ∇f(w - ρ ∇f(w)): λ = 0 and a step downhill (arXiv 2401.08060). Memory beside SAM's: none.

    With λ > 0 the extrapolation is normalised. ρ < 1 / L and a small enough lr make f decrease at every step
    (:func:`sam_kernels.theory.descent_step`). λ = 0 is the paper's, ρ = 0.05 is SAM's. Bytes: SAM's.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, lambd: Schedule = 0.0, **kwargs: Any) -> None:
        _is_given("Extragradient", "direction", kwargs)
        super().__init__(params, base_optimizer, lambd=lambd, direction=directions.Extragradient(), **kwargs)


class VaSSO(SAM):
    """Variance-suppressed SAM (arXiv 2309.15639): the ascent goes along m <- (1 - theta) m + theta g. Memory beside SAM's: m, N s.

    ``theta`` in (0, 1] is 0.9 in the authors' code (0.2 and 0.4 are tried too); 1 is SAM. See :class:`directions.VarianceSuppressed`.
    ρ = 0.05 is SAM's. Bytes: 13 N s a step with SGD and momentum (SAM: 11). A skipped step may have moved m, which stays finite.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, theta: float = 0.9, **kwargs: Any) -> None:
        _is_given("VaSSO", "direction", kwargs)
        super().__init__(params, base_optimizer, direction=directions.VarianceSuppressed(theta), **kwargs)


class FriendlySAM(SAM):
    """Friendly SAM, F-SAM (arXiv 2403.12350): the ascent goes along g - sigma m, m <- lmbda m + (1 - lmbda) g. Memory beside SAM's: m, N s.

    ``sigma`` = 1, ``lmbda`` = 0.6 in the authors' code; ρ = 0.05 is SAM's. See :class:`directions.Friendly`. Bytes: 14 N s a step with SGD
    and momentum (SAM: 11). A skipped step may have moved m, which stays finite.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, sigma: float = 1.0, lmbda: float = 0.6, **kwargs: Any) -> None:
        _is_given("FriendlySAM", "direction", kwargs)
        super().__init__(params, base_optimizer, direction=directions.Friendly(sigma, lmbda), **kwargs)


class RSAM(SAM):
    """Random SAM: the ascent goes along Δ + c ∇f(w + Δ), Δ ~ N(0, sigma²) fresh at every step. Memory beside SAM's: none.

    Source: Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022.
    Two gradients a step, as SAM: the first is the one at w + Δ, and the loss that ``step`` returns is the one there. ``sigma``, ``c``: no
    published values are known here; 0.01 and 1 are ours; ρ = 0.05 is SAM's. See :class:`directions.Randomized`. Bytes: 16 N s a step
    with SGD and momentum. The two-step API begins with :meth:`random_step`.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, sigma: float = 0.01, c: float = 1.0, seed: int = 0, **kwargs: Any) -> None:
        _is_given("RSAM", "direction", kwargs)
        super().__init__(params, base_optimizer, direction=directions.Randomized(sigma, c, seed), **kwargs)


class GCSAM(SAM):
    """SAM with centralised gradients (arXiv 2501.11584): the mean over all dimensions but the first is taken off both gradients.

    Gradient centralisation: arXiv 2004.01461. Memory beside SAM's: none. ρ = 0.05 is SAM's. See :class:`directions.Centralized`.
    Bytes: 13 N s a step with SGD and momentum (SAM: 11).
    """

    def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
        _is_given("GCSAM", "direction", kwargs)
        super().__init__(params, base_optimizer, direction=directions.Centralized(), **kwargs)


class GSAM(SAM):
    """Surrogate gap guided SAM (arXiv 2203.08065): the step goes along g_p - alpha g_⊥, with g = ∇f(w), g_p = ∇f(w + e) and
    g_⊥ = g - (⟨g, g_p⟩ / ‖g_p‖²) g_p. Memory beside SAM's: g, N s, between the passes.

    The radius follows the learning rate: from ``rho_min`` at ``lr_min`` to ``rho_max`` at ``lr_max``, linearly
    (:class:`sam_kernels.schedules.LRProportional`). All four are needed, unless ``rho`` gives a radius of your own. ``alpha`` is 0.4 in the
    authors' code. See :class:`descents.SurrogateGap`. Bytes: 15 N s a step with SGD and momentum (SAM: 11).
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        *,
        alpha: float = 0.4,
        rho_max: float | None = None,
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float | None = None,
        rho: RhoSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        _is_given("GSAM", "descent", kwargs)
        schedule = {"rho_max": rho_max, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        missing = [name for name, value in schedule.items() if value is None]
        if rho is None and missing:
            raise ValueError(f"GSAM: its radius follows the learning rate: give {', '.join(missing)}, or rho for a radius of your own")
        if rho is not None and len(missing) < len(schedule):
            raise ValueError(f"GSAM: rho and {', '.join(name for name in schedule if name not in missing)} are two radii; give one")
        radius = LRProportional(**schedule) if rho is None else rho  # type: ignore[arg-type]  # none is missing
        super().__init__(params, base_optimizer, rho=radius, descent=descents.SurrogateGap(alpha), **kwargs)


class CRSAM(SAM):
    """Curvature-regularised SAM, CR-SAM (arXiv 2312.13555): the step goes along g_+ + gamma (g_+ + g_- - 2 g) + beta (g_+ - g_-), with
    g = ∇f(w) and g_± = ∇f(w ± e). Memory beside SAM's: g and g_+, 2 N s, between the passes.

    g_+ + g_- - 2 g is the gradient of f(w + e) + f(w - e) - 2 f(w), the curvature along e, and g_+ - g_- that of f(w + e) - f(w - e), the
    slope. The paper regularises by the trace of the Hessian over the gradient's norm, from finite differences; this is the step of the
    authors' code, which weights these two gradients and divides by nothing. ``gamma`` = 0.1, ``beta`` = 0.01 and ρ = 0.1 are its values.

    ``step`` calls the closure three times, at w, w + e and w - e. The two-step API, ``backward``, several micro-batches, ``capturable``
    and :class:`directions.Centralized` are refused.
    With ``preserve_rng_state`` all three passes have the same random numbers. See :class:`descents.Curvature`. Bytes: 17 N s a step with
    SGD and momentum (SAM: 11).
    """

    def __init__(
        self, params: Any, base_optimizer: Any, *, gamma: float = 0.1, beta: float = 0.01, rho: RhoSchedule = 0.1, **kwargs: Any
    ) -> None:
        _is_given("CRSAM", "descent", kwargs)
        super().__init__(params, base_optimizer, rho=rho, descent=descents.Curvature(gamma, beta), **kwargs)


class WSAM(SAM):
    """Weighted SAM (arXiv 2305.15817): the step goes along g + k (g_p - g), k = kappa / (1 - kappa). Memory beside SAM's: g, N s, between
    the passes.

    ``decoupled`` (the authors' default): the base steps along g, and the sharpness is stepped down by lr beside it. ``kappa`` is 0.9 in the
    authors' code, where it is called gamma; ρ = 0.05 is SAM's. See :class:`descents.WeightedSharpness`. Bytes of a step with SGD and
    momentum: 13 N s coupled, 15 N s decoupled.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, kappa: float = 0.9, decoupled: bool = True, **kwargs: Any) -> None:
        _is_given("WSAM", "descent", kwargs)
        super().__init__(params, base_optimizer, descent=descents.WeightedSharpness(kappa, decoupled), **kwargs)


class LookSAM(SAM):
    """LookSAM (arXiv 2203.02714): SAM on every ``k``-th step, which keeps g_v = g_p - ⟨g_p, ĝ⟩ ĝ with ĝ = g / ‖g‖; between, a step along
    g + alpha (‖g‖ / ‖g_v‖) g_v. Memory beside SAM's: g_v, N s, and g, N s, between the passes.

    ``k`` = 5 and ``alpha`` = 0.7 are the paper's usual values, ρ = 0.05 is SAM's. See :class:`descents.Look`. Needs closures, one call
    between and two on the k-th. Bytes with SGD and momentum: 15 N s on the k-th step, 10 N s between.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, k: int = 5, alpha: float = 0.7, **kwargs: Any) -> None:
        _is_given("LookSAM", "descent", kwargs)
        super().__init__(params, base_optimizer, descent=descents.Look(k, alpha), **kwargs)


class MomentumSAM(SAM):
    """Momentum-SAM (arXiv 2401.12033): e = -ρ v / ‖v‖ along the base's momentum v, before the only forward and backward pass.

    ``step`` calls the closure once. Bytes: 11 N s a step with SGD and momentum. Between steps the weights are where they belong, for
    evaluation too. With the two-step API: :meth:`first_step`, forward, backward, :meth:`second_step`.
    ρ = 0.3 in the authors' code for SGD, 1 for AdamW. See :class:`directions.Momentum`. Memory beside SAM's: none.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: RhoSchedule = 0.3, **kwargs: Any) -> None:
        _is_given("MomentumSAM", "direction", kwargs)
        super().__init__(params, base_optimizer, rho=rho, direction=directions.Momentum(), **kwargs)


class S2SAM(SAM):
    """Single-step SAM, S²-SAM: e = ρ d / ‖d‖ with d the gradient of the step before, before the only forward and backward pass.

    Source: Ji et al., A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse Training,
    NeurIPS 2024. The authors' code is not known here: d is the gradient that the last step was made along, the one at its perturbed
    weights, and the first step is a plain one. ρ = 0.05 is SAM's.

    ``step`` calls the closure once. Memory beside SAM's: d, N s. Bytes: 11 N s a step with SGD and momentum where the gradients can be
    taken over: ``param.grad`` is then None after ``step(closure)``. Otherwise they are copied, 2 N s more. With the two-step API:
    :meth:`first_step`, forward, backward, :meth:`second_step`. See :class:`directions.Stale`.
    """

    def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
        _is_given("S2SAM", "direction", kwargs)
        super().__init__(params, base_optimizer, direction=directions.Stale(), **kwargs)


class SAMSPS(SAM):
    """SAM with the stochastic Polyak step size, for every λ: lr is found at each step, at most ``gamma_b``::

        gamma = min{ max{ f(w + e) - f_star - ⟨g_p, e⟩, 0 } / ‖g_p‖², gamma_b },   w = w - gamma (g_p + weight_decay w)

    Source: arXiv 2606.01827; defaults are those of its package, PyPI ``sam-sps``: ``f_star`` = 0, ``gamma_b`` = 1, ρ = 0.1,
    ``weight_decay`` = 5e-4. ``gamma_b`` is the groups' ``lr``, so that schedulers apply to it. The base is ``torch.optim.SGD``, with or
    without momentum; the closure must return the loss. See :class:`descents.Polyak`. Memory beside SAM's: none. Bytes of a step: 11 N s,
    with momentum 16 N s.
    """

    _shared_keywords = (*SAM._shared_keywords, "weight_decay")  # passed on to SGD

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        *,
        f_star: float = 0.0,
        gamma_b: float | torch.Tensor = 1.0,
        rho: RhoSchedule = 0.1,
        weight_decay: float = 5e-4,
        **kwargs: Any,
    ) -> None:
        _is_given("SAMSPS", "descent", kwargs)
        if "lr" in kwargs:
            raise TypeError("SAMSPS: lr is found at each step; gamma_b bounds it")
        check_number_or_tensor("SAMSPS", "gamma_b", gamma_b, low=0.0)
        check_number("SAMSPS", "weight_decay", weight_decay, low=0.0)
        super().__init__(params, base_optimizer, rho=rho, descent=descents.Polyak(f_star), lr=gamma_b, weight_decay=weight_decay, **kwargs)

    @property
    def last_step_sizes(self) -> list[torch.Tensor | None]:
        """() float64 on the device for each group: γ of the last step, times 1 - momentum; None where the group had no gradient."""
        return [self._step_sizes.get(i) for i in range(len(self.param_groups))]
