"""Directions of the ascent, ``SAM(..., direction=...)``. The named optimizers set these.

With g = ∇f(w) the ascent is e = ρ (1 - λ + λ / (‖d‖ + eps)) d, or T² d and ‖T d‖ in their places where a group is adaptive. Radius, mix,
normalisation, base optimizer and descent rule are independent of d. Directions hold options alone and may be shared by optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels._validate import check_number, check_seed
from sam_kernels.optim._base.options import store_plain
from sam_kernels.optim._engine.ascent import PerturbOptions
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.lists import GroupGrads, param_name
from sam_kernels.optim._part import FirstGradient, Part, Use
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.optim._shards.layout import sharded_dims
from sam_kernels.optim._types import ParamGroup

__all__ = [
    "Centralized",
    "Direction",
    "Extragradient",
    "FirstGradient",
    "Friendly",
    "Gradient",
    "Momentum",
    "PerturbOptions",
    "Randomized",
    "Stale",
    "Use",
    "VarianceSuppressed",
]


_USUAL, _UNSCALED = PerturbOptions(), PerturbOptions(is_scaled=False)


class Direction(Part):
    """The gradient, d = g, unless a subclass overrides a method. Memory: none.

    A subclass overrides :meth:`norm`, and :meth:`perturb_options` or :meth:`group_grads` where d is not the gradient. All it may use is the
    :class:`~sam_kernels.optim._engine.ascent_step.AscentStep` that it is given; beginning and skipping steps is the optimizer's.
    """

    role = "direction"
    name: ClassVar[str] = "gradient"
    first_gradient: ClassVar[FirstGradient] = FirstGradient.AT_WEIGHTS
    keeps_last_grads: ClassVar[bool] = False  # of each step's last pass, by the optimizer, under the first name in ``keeps``

    def is_downhill(self, maximize: bool) -> bool:
        """Whether the ascent is w - ρ d. ``maximize``: that of the group, with which a step along the gradient goes to better points."""
        return maximize

    @property
    def rewrites(self) -> bool:
        """Whether :meth:`descent_norm` is overridden: the gradients of the second pass are written."""
        return type(self).descent_norm is not Direction.descent_norm

    def check_shards(self, groups: Sequence[ParamGroup]) -> None:
        """Raises ValueError, by name, for a parameter that is cut into parts of which the direction cannot be made."""

    def begin(self, step: AscentStep) -> None:
        """Called before the first forward pass of a micro-batch."""

    def group_grads(self, step: AscentStep) -> list[GroupGrads]:
        """What d is made from, by group: ``index``, ``group``, ``lists.params`` and ``grads``."""
        return step.grads()

    def norm(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> Tensor:  # ()
        """‖d‖, or ‖T d‖, over the groups that participate. A norm that is not finite skips the step, as does setting ``step.found_inf``."""
        return step.norm(group_grads)

    def perturb_options(self, step: AscentStep, current: GroupGrads) -> PerturbOptions:
        """How :func:`sam_kernels.functional.perturb_` finds d of one group again."""
        return _USUAL

    def descent_norm(self, step: AscentStep) -> Tensor | None:  # ()
        """Rewrites the gradients of the second pass in place. Returns their norm where that is then known."""
        return None


class Gradient(Direction):
    """d = g: SAM, USAM and what lies between. Memory: none."""


class Extragradient(Direction):
    """d = -g: the point where the gradient is taken lies downhill, w - ρ g with λ = 0 (arXiv 2401.08060). Memory: none."""

    name = "extragradient"

    def is_downhill(self, maximize: bool) -> bool:
        return not maximize


class _MovingAverage(Direction):
    """d from the gradient and a moving average m of earlier ones, by ``direction_norm_`` (3 N s) and ``perturb_``.

    ``kind`` decides which of the three numbers those operations read.
    """

    keeps = ("direction_average",)
    kind: ClassVar[str]
    theta: float = 0.9
    sigma: float = 1.0
    lmbda: float = 0.6

    def norm(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> Tensor:
        norms = []
        for lists, grads, scaling in step.joined(group_grads):
            averages = step.kept(self.keeps[0], lists)
            is_whole = isinstance(averages, TensorList)  # which none of them is missing from
            new = [] if is_whole else [param for param, average in zip(lists.params, averages, strict=True) if average is None]
            norm = functional.direction_norm_(
                grads,
                averages,
                lists.weights,
                kind=self.kind,
                theta=self.theta,
                sigma=self.sigma,
                lmbda=self.lmbda,
                grad_scale=grad_scale,
                found_inf=step.found_inf,
                **scaling,
            )
            norms.append((lists, norm))
            if new:
                step.keep(self.keeps[0], lists, cast("list[Tensor]", averages))
        return step.combined(norms)

    def perturb_options(self, step: AscentStep, current: GroupGrads) -> PerturbOptions:
        averages = step.kept(self.keeps[0], current.lists)
        if step.begun:  # those have d = g
            averages = [None if param in step.begun else m for param, m in zip(current.lists.params, averages, strict=True)]
        return PerturbOptions(ema=averages, kind=self.kind, sigma=self.sigma, lmbda=self.lmbda)


@dataclass(frozen=True)
class VarianceSuppressed(_MovingAverage):
    """VaSSO (arXiv 2309.15639): d = m with m <- (1 - theta) m + theta g, m = g on the first step. Memory: m, N s.

    ``theta`` in (0, 1], 0.9 in the authors' code, which tries 0.2 and 0.4 too. 1 is SAM.
    """

    theta: float = 0.9
    name = kind = "vasso"

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("VaSSO", "theta", self.theta, low=0.0, high=1.0, open_low=True)


@dataclass(frozen=True)
class Friendly(_MovingAverage):
    """Friendly SAM (arXiv 2403.12350): d = g - sigma m, and then m <- lmbda m + (1 - lmbda) g; d = m = g on the first step. Memory: m, N s.

    ``sigma`` = 1 and ``lmbda`` = 0.6 in the authors' code; ``lmbda`` in (0, 1]. sigma = 0 is SAM.
    """

    sigma: float = 1.0
    lmbda: float = 0.6
    name = kind = "friendly"

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("FriendlySAM", "sigma", self.sigma)
        check_number("FriendlySAM", "lmbda", self.lmbda, low=0.0, high=1.0, open_low=True)


class Centralized(Direction):
    """GCSAM: d = g minus its mean over all dimensions but the first, for parameters of more than one dimension; so is the descent
    gradient (gradient centralisation, arXiv 2004.01461). Memory: none.

    ``param.grad`` is centralised in place, 2 N s with its norm; before the descent this takes the place of the look for NaN.
    """

    name = "centralized"

    def check_shards(self, groups: Sequence[ParamGroup]) -> None:
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if param.dim() > 1 and (cut := sharded_dims(param) - {0}):
                    raise ValueError(
                        f"GCSAM: parameter {param_name(group, i, j)} is sharded along dimension {min(cut)}, so that a slice whose mean is "
                        "to be subtracted lies on several ranks; shard it along dimension 0, or use SAM"
                    )

    def norm(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> Tensor:
        return self._centralize(step, group_grads, normalised=True)

    def descent_norm(self, step: AscentStep) -> Tensor | None:
        return self._centralize(step, step.grads(), normalised=False)

    def _centralize(self, step: AscentStep, group_grads: list[GroupGrads], *, normalised: bool) -> Tensor:  # ()
        parts = step.joined(group_grads, normalised=normalised)
        norms = [
            (lists, functional.centralize_(grads, lists.weights, found_inf=step.found_inf, **scaling)) for lists, grads, scaling in parts
        ]
        return step.combined(norms)


@dataclass(frozen=True)
class Randomized(Direction):
    """RSAM: d = Δ + c ∇f(w + Δ) with Δ ~ N(0, sigma²), fresh at every step; the first gradient is the one at w + Δ. Memory: none.

    Δ is drawn from ``seed``, the step and the group, so that a run continues from a checkpoint with the same ones. It is not kept: it is
    what the weights have moved by. Bytes: 3 N s to move there, 4 for d in the place of the gradient, with its norm (SAM: 1), and 3 for the
    perturbation, which starts from the saved weights (SAM: 4).
    """

    sigma: float = 0.01
    c: float = 1.0
    seed: int = 0
    name = "randomized"
    first_gradient = FirstGradient.ELSEWHERE

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("RSAM", "sigma", self.sigma, low=0.0)
        check_number("RSAM", "c", self.c)
        check_seed("RSAM", "seed", self.seed)

    def is_downhill(self, maximize: bool) -> bool:
        return False  # d is that of the function to be minimised

    def refuses(self, use: Use) -> bool:
        return use is Use.CAPTURE  # the host makes the seeds

    def begin(self, step: AscentStep) -> None:
        seeds = [derived_seed(self.seed, int(group.t), step.micro_batch, i) for i, group in enumerate(step.groups)]
        step.perturb_randomly(step.trainable(), seeds, scale=self.sigma, distribution="normal")

    def norm(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> Tensor:
        norms = []
        for current in group_grads:
            lists, grads, group = current.lists, current.grads, step.options(current)
            c = -self.c if group.maximize else self.c  # of the function to be minimised
            weight = c if grad_scale is None else c / grad_scale.to(torch.float64)  # float32 would round c
            origins = step.origins(current) or lists.weights  # frozen ones that still have a gradient were not moved
            lefts, rights, found_inf = grads, lists.params, step.found_inf  # c g + (p - origin)
            norm = functional.combine_(
                grads, lefts, rights, origins, left_weight=weight, right_weight=1.0, origin_weight=-1.0, found_inf=found_inf
            )
            if group.scaling["adaptive"]:
                norm = functional.grad_norm(grads, origins, **group.scaling)
            norms.append((lists, norm))
        step.restore_others(group_grads)
        return step.combined(norms)

    def perturb_options(self, step: AscentStep, current: GroupGrads) -> PerturbOptions:
        return _UNSCALED  # d is that of the loss itself


class Momentum(Direction):
    """Momentum-SAM (MSAM, arXiv 2401.12033): e = -ρ v / ‖v‖ with v the base's momentum before the step. Memory: none of its own.

    The perturbation needs no gradient: one forward and one backward pass a step. On the first step there is no momentum and nothing is
    perturbed. v is ``momentum_buffer`` of SGD and the first moment ``exp_avg`` of Adam and AdamW, as in the authors' code. That code takes
    the weight decay of SGD at the perturbed weights; here, as everywhere in this library, it is taken at w.
    """

    name = "momentum"
    first_gradient = FirstGradient.NONE

    def is_downhill(self, maximize: bool) -> bool:
        return True  # the base's momentum is made of gradients that it has negated for maximize

    def check_base(self, base: Optimizer) -> None:
        if type(base) in (torch.optim.Adam, torch.optim.AdamW):
            return
        if type(base) is not torch.optim.SGD:
            raise ValueError(f"MomentumSAM: {type(base).__name__} keeps no momentum that is known here; use SGD, Adam or AdamW")
        for i, group in enumerate(base.param_groups):
            if not group["momentum"]:
                raise ValueError(f"MomentumSAM: param_groups[{i}] has momentum=0; the perturbation goes along the momentum")

    def group_grads(self, step: AscentStep) -> list[GroupGrads]:
        key = "momentum_buffer" if type(step.base) is torch.optim.SGD else "exp_avg"
        found = []
        for i, group in enumerate(step.groups):
            state = step.base.state
            params = [param for param in group.group["params"] if param.requires_grad and state.get(param, {}).get(key) is not None]
            for place, lists in step.lists_of(i, params) if params else ():
                found.append(GroupGrads(place, group.group, lists, lists.state(key, [state[param][key] for param in lists.owners])))
        return found

    def perturb_options(self, step: AscentStep, current: GroupGrads) -> PerturbOptions:
        return _UNSCALED


class Stale(Direction):
    """d is the gradient that the last step was made along, g_p = ∇f(w + e) of that step. Memory: d, N s.

    The perturbation needs no gradient of its own: one forward and one backward pass a step. On the first step there is no d and nothing is
    perturbed; so it is on the step after a skipped one, whose gradient is not finite. d is g_p before clipping and without weight decay,
    momentum or a loss scale; 0 for a parameter that had no gradient. Plain steps of a radius that rests keep theirs too, so that d is
    always one step old; a group whose radius is the number 0 keeps nothing.

    Bytes: none for keeping d where the gradients are the optimizer's to take over: in ``step(closure)`` and ``second_step(zero_grad=True)``
    with a fused base. ``param.grad`` is then None after the step. Otherwise 2 N s for a copy, 3 N s with a loss scale.
    """

    name = "stale"
    keeps = ("last_grad",)
    keeps_last_grads = True
    first_gradient = FirstGradient.NONE

    def group_grads(self, step: AscentStep) -> list[GroupGrads]:
        return step.kept_as_grads(self.keeps[0])

    def norm(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> Tensor:
        norms, spoiled = [], step.spoiled
        for lists, grads, scaling in step.joined(group_grads):
            norm = functional.grad_norm(grads, lists.weights, **scaling)
            norms.append((lists, norm if spoiled is None else norm.masked_fill(spoiled.to(norm.device) != 0, 0.0)))
        return step.combined(norms)

    def perturb_options(self, step: AscentStep, current: GroupGrads) -> PerturbOptions:
        return PerturbOptions(is_scaled=False, rests=step.spoiled)
