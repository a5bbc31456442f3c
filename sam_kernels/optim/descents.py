"""Descent rules, ``SAM(..., descent=...)``: the gradient that the base optimizer steps along. The named optimizers set these.

With g = ∇f(w) the gradient of the first pass and g_p = ∇f(w + e) that of the second, the step from w is along g_p unless a rule says
otherwise. Rules hold options alone and may be shared by optimizers. What they need beside the gradients of the second pass is made in
few passes over memory: inner products in the one that also looks for NaN (``grad_dots``), sums in place with their norm (``combine_``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels import functional
from sam_kernels._validate import check_count, check_flag, check_number, describe
from sam_kernels.optim._base.options import store_plain
from sam_kernels.optim._engine.capturable import is_recording, not_recordable
from sam_kernels.optim._engine.kept_grads import KeptGrads
from sam_kernels.optim._engine.lists import GroupGrads
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._part import Part, Use
from sam_kernels.optim._types import GroupOptions, ParamGroup

__all__ = [
    "UNCHANGED",
    "Curvature",
    "Descent",
    "DescentStep",
    "Look",
    "Outcome",
    "Plain",
    "Polyak",
    "SurrogateGap",
    "Use",
    "WeightedSharpness",
]

_TINY = torch.finfo(torch.float64).tiny


@dataclass
class DescentStep:
    """What a rule may use. Gradients are still multiplied by ``grad_scale``."""

    passes: Passes
    groups: list[ParamGroup]
    kept: KeptGrads
    has_ascended: bool
    grad_scale: Tensor | None  # ()
    loss: Any  # of the last pass: a number, a tensor, or None where it is not known
    kept_at_ascent: KeptGrads  # those at w + e of a rule that reflects
    group_grads: list[GroupGrads] = field(init=False)

    def __post_init__(self) -> None:
        self.group_grads = self.passes.lists.group_grads(self.groups)

    @property
    def scale(self) -> float | Tensor:
        """What gradients are multiplied by, as something to calculate with."""
        return 1.0 if self.grad_scale is None else self.grad_scale.to(torch.float64)

    def maximizes(self, current: GroupGrads) -> bool:
        """Whether the base optimizer maximises with this group, wherever it keeps the option."""
        plan = self.passes.plan
        return plan is not None and plan.groups[current.index].maximize

    def dots(self, others: Callable[[GroupGrads], list[Tensor]]) -> Tensor:  # (3,) float64
        """Return (Σ g_p², Σ g_p o, Σ o²), with ``others`` returning o for a group; of DTensors over all ranks. Sets ``found_inf`` where an
        element is not finite."""
        found_inf = self.passes.found_inf
        return self.sum_of([functional.grad_dots(current.grads, others(current), found_inf=found_inf) for current in self.group_grads])

    def sum_of(self, parts: list[Tensor]) -> Tensor:  # (3,) float64
        """Sums over all groups, of DTensors over all ranks. ``parts``: one for each of :attr:`group_grads`."""
        device, shards = self.passes.found_inf.device, self.passes.lists.shards
        if shards:
            layouts = [current.lists.layout for current in self.group_grads]
            total = shards.sum(list(zip(layouts, parts, strict=True)), (3,), device)
            self.passes.found_inf.logical_or_(~total.isfinite().all())
            return total
        return torch.stack([part.to(device) for part in parts]).sum(0) if len(parts) != 1 else parts[0]

    def or_zero(self, value: Tensor) -> Tensor:  # () float64
        """``value``, 0 where the step is skipped: it may then be NaN, which no operation takes for a weight."""
        return value.masked_fill(self.passes.found_inf.to(value.device) != 0, 0.0)

    def combine_(
        self,
        others: Callable[[GroupGrads], list[Tensor]],
        weight: Any,
        other_weight: Any,
        thirds: Callable[[GroupGrads], list[Tensor]] | None = None,
        third_weight: Any = 0.0,
    ) -> Tensor:  # ()
        """g_p <- weight g_p + other_weight o (+ third_weight u) in place; returns the norm of that."""
        norms = []
        for current in self.group_grads:
            grads, found_inf = current.grads, self.passes.found_inf
            third = None if thirds is None else thirds(current)
            weights = {"left_weight": weight, "right_weight": other_weight, "origin_weight": third_weight}
            norms.append((current.lists, functional.combine_(grads, grads, others(current), third, found_inf=found_inf, **weights)))
        return self.passes.combined(norms)


@dataclass
class Outcome:
    """What a rule returns: what it has computed, and how the update differs from the usual one."""

    norm: Tensor | None = None  # () of the gradients as they are now
    is_checked: bool = True  # found_inf is set if a gradient is not finite
    is_scaled: bool = True  # the gradients are still multiplied by grad_scale
    options: dict[int, GroupOptions] = field(default_factory=dict)  # by group: options of the base for this step alone
    step_sizes: dict[int, Tensor] = field(default_factory=dict)  # () by group, where the rule has chosen them
    finish: Callable[[bool], None] | None = (
        None  # called after the base's step, with whether that has divided gradients by grad_scale (not those of masters)
    )


UNCHANGED = Outcome(is_checked=False)  # the gradients are as they were


class Descent(Part):
    """Along g_p, unless a subclass overrides :meth:`rewrite`."""

    role = "descent"
    name: ClassVar[str] = "plain"
    keeps_grads: ClassVar[bool] = False  # those of the first pass, until the descent
    reflects: ClassVar[bool] = False  # there is a third pass, at w - e, whose gradients are rewritten; those at w + e are kept

    @property
    def rewrites(self) -> bool:
        """Whether :meth:`rewrite` is overridden: the gradients of the second pass are written."""
        return type(self).rewrite is not Descent.rewrite

    @property
    def needs_loss(self) -> bool:
        """Whether :meth:`check_loss` is overridden: the update follows the loss, which is then that of all replicas."""
        return type(self).check_loss is not Descent.check_loss

    def check_loss(self, loss: Any, device: torch.device) -> None:
        """Raises TypeError or RuntimeError for a loss of the last pass, on ``device``, that the rule cannot use."""

    def ascends(self, t: Any) -> bool:
        """Whether step t = 1, 2, … has an ascent."""
        return True

    def rewrite(self, step: DescentStep) -> Outcome:
        """Rewrites the gradients of the second pass in place; the base steps along the result. Called where there are gradients; with
        shards on every rank, since others may have some: sums over ranks must not depend on it."""
        return UNCHANGED


class Plain(Descent):
    """Along g_p: SAM. Memory: none."""


@dataclass(frozen=True)
class SurrogateGap(Descent):
    """GSAM (arXiv 2203.08065): along g_p - alpha g_⊥, with g_⊥ = g - (⟨g, g_p⟩ / ‖g_p‖²) g_p. Memory: g, N s, between the passes.

    Written (1 + alpha c) g_p - alpha g with c = ⟨g, g_p⟩ / ‖g_p‖²: inner products 2 N s (in the place of the look for NaN, 1), sum 3 N s.
    """

    alpha: float = 0.4
    name = "gsam"
    keeps_grads = True

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("GSAM", "alpha", self.alpha, low=0.0)

    def rewrite(self, step: DescentStep) -> Outcome:
        if not step.has_ascended:
            return UNCHANGED
        squares, along, _ = step.dots(step.kept.of)
        share = step.or_zero(along / squares.clamp_min(_TINY))
        return Outcome(norm=step.combine_(step.kept.of, 1.0 + self.alpha * share, -self.alpha))


@dataclass(frozen=True)
class Curvature(Descent):
    """CR-SAM (arXiv 2312.13555), as in the authors' code: along g_+ + gamma (g_+ + g_- - 2 g) + beta (g_+ - g_-), with g_± = ∇f(w ± e).

    The second term descends e·∇²f e, the third one ‖∇f‖, both by finite differences along e. Memory: g and g_+, 2 N s, between the passes.
    Bytes: 3 N s to move from w + e to w - e (2 w - (w + e), rounded once), sum 4 N s in the place of the look for NaN, 1.
    """

    gamma: float = 0.1
    beta: float = 0.01
    name = "crsam"
    keeps_grads = True
    reflects = True

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("CRSAM", "gamma", self.gamma, low=0.0)
        check_number("CRSAM", "beta", self.beta)

    def refuses(self, use: Use) -> bool:
        return use in (Use.BACKWARD, Use.TWO_STEPS)  # three passes

    def rewrite(self, step: DescentStep) -> Outcome:
        if not step.has_ascended:
            return UNCHANGED
        plus, minus = 1.0 + self.gamma + self.beta, self.gamma - self.beta
        return Outcome(norm=step.combine_(step.kept_at_ascent.of, minus, plus, step.kept.of, -2.0 * self.gamma))


@dataclass(frozen=True)
class WeightedSharpness(Descent):
    """WSAM (arXiv 2305.15817), with k = kappa / (1 - kappa). Memory: g, N s, between the passes.

    Coupled: along g + k (g_p - g), 3 N s for the sum. ``decoupled``: the base steps along g, then w <- w - lr k (g_p - g), 4 N s; the
    sharpness does not enter the base's momentum, and lr is that of each group. ``kappa`` in [0, 1), 0.9 in the authors' code; coupled,
    0.5 is SAM; 0 is the base optimizer.
    """

    kappa: float = 0.9
    decoupled: bool = True
    keeps_grads = True

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("WSAM", "kappa", self.kappa, low=0.0, high=1.0, open_high=True)
        check_flag("WSAM", "decoupled", self.decoupled)

    @property
    def name(self) -> str:  # type: ignore[override]  # what the base's momentum is made of depends on the option
        return "wsam" if self.decoupled else "wsam-coupled"

    def refuses(self, use: Use) -> bool:
        return self.decoupled and use in (Use.CLIPPING, Use.BACKWARD)

    def rewrite(self, step: DescentStep) -> Outcome:
        if not step.has_ascended:
            return UNCHANGED
        k = self.kappa / (1.0 - self.kappa)
        if not self.decoupled:
            return Outcome(norm=step.combine_(step.kept.of, k, 1.0 - k))
        sharp = [(current, current.grads, step.kept.of(current)) for current in step.group_grads]
        for current, grads, kept in sharp:
            functional.check_finite_(grads, step.passes.found_inf)
            if step.passes.origins(current) is None:  # a group that did not ascend was in no norm
                functional.check_finite_(kept, step.passes.found_inf)
            current.lists.put_grads(kept)

        def finish(kept_is_unscaled: bool) -> None:
            found_inf = step.passes.found_inf.clone()  # the step is made: weights that overflow now do not make it a skipped one
            for current, grads, kept in sharp:
                rate = -current.group["lr"] * k if step.maximizes(current) else current.group["lr"] * k
                weights, scaled = current.lists.weights, rate / step.scale
                weight = rate if kept_is_unscaled and current.lists.masters is None else scaled
                with step.passes.weights_written([current.lists]):
                    functional.combine_(
                        weights, weights, grads, kept, left_weight=1.0, right_weight=-scaled, origin_weight=weight, found_inf=found_inf
                    )
                current.lists.put_grads(grads)

        return Outcome(finish=finish)


@dataclass(frozen=True)
class Look(Descent):
    """LookSAM (arXiv 2203.02714): a step of SAM every ``k`` steps, from the first on, which keeps g_v = g_p - ⟨g_p, ĝ⟩ ĝ, ĝ = g / ‖g‖;
    between them one pass, and a step along g + alpha (‖g‖ / ‖g_v‖) g_v. Memory: g_v, N s, and g, N s, between the passes.

    Where there is no g_v yet, as with ρ = 0 or a radius that begins late, a step between is the base's own.

    Bytes: a step of SAM 4 N s more (inner products 2 in the place of the look for NaN, g_v 3), a step between 4 more than the base's
    alone (norms 2 in the place of the look, sum 3).
    """

    k: int = 5
    alpha: float = 0.7
    name = "looksam"
    keeps = ("orthogonal_grad",)
    keeps_grads = True

    def __post_init__(self) -> None:
        store_plain(self)
        check_count("LookSAM", "k", self.k, low=1)
        check_number("LookSAM", "alpha", self.alpha, low=0.0)

    def refuses(self, use: Use) -> bool:
        return use is not Use.CLIPPING

    def ascends(self, t: Any) -> bool:
        return bool((int(t) - 1) % self.k == 0)

    def rewrite(self, step: DescentStep) -> Outcome:
        memory, name = step.passes.memory, self.keeps[0]
        if not step.has_ascended:
            if not memory.has(name) and not step.passes.lists.shards:  # other ranks may keep some; then it is zero here
                return UNCHANGED
            squares, _, kept_squares = step.dots(lambda current: memory.of_or_zeros(name, current.lists))
            ratio = step.or_zero(torch.where(kept_squares > 0, (squares / kept_squares.clamp_min(_TINY)).sqrt(), 0.0))
            return Outcome(norm=step.combine_(lambda current: memory.of_or_zeros(name, current.lists), 1.0, self.alpha * ratio))
        squares, along, ascent_squares = step.dots(step.kept.of)
        along = step.or_zero(along / ascent_squares.clamp_min(_TINY))
        for current in step.group_grads:
            orthogonal, grads, kept = memory.of_or_zeros(name, current.lists), current.grads, step.kept.of(current)
            weight, kept_weight, found_inf = 1.0 / step.scale, -along / step.scale, step.passes.found_inf
            functional.combine_(orthogonal, grads, kept, left_weight=weight, right_weight=kept_weight, found_inf=found_inf)
        return Outcome(norm=squares.sqrt())


@dataclass(frozen=True)
class Polyak(Descent):
    """SAM-SPS (arXiv 2606.01827): SGD with the stochastic Polyak step size at the perturbed point e = w + ρ …::

        gamma = min{ max{ f_S(e) - f_star - ⟨∇f_S(e), e - w⟩, 0 } / ‖∇f_S(e)‖², lr }
        w     = w - gamma (∇f_S(e) + weight_decay w)

    for any radius, mix and direction: e - w is what the weights have moved by, so the inner product costs no memory. ``lr`` is the bound
    gamma_b of the step, and schedulers of lr are schedules of it. ``f_star``: a lower bound of the losses f_S, 0 for most. With momentum β
    it is the heavy ball's, and the step is made (1 - β) times as long (MomSPS_max, arXiv 2406.04142)::

        w_next = w - (1 - β) gamma (∇f_S(e) + weight_decay w) + β (w - w_before)

    The closure must return the loss. Bytes: inner products 3 N s, in the place of the look for NaN; with momentum 3 more. Memory: none.
    """

    f_star: float = 0.0
    name = "polyak"

    def __post_init__(self) -> None:
        store_plain(self)
        check_number("SAMSPS", "f_star", self.f_star)

    def refuses(self, use: Use) -> bool:
        return use in (Use.CLIPPING, Use.BACKWARD)

    def check_base(self, base: Optimizer) -> None:
        if type(base) is not torch.optim.SGD:
            raise ValueError(f"SAMSPS: the Polyak step size is that of SGD, got {type(base).__name__}; use torch.optim.SGD")
        for i, group in enumerate(base.param_groups):
            for option in ("nesterov", "maximize", "dampening"):
                if group[option]:
                    raise ValueError(f"SAMSPS: the Polyak step size is not defined for {option}={group[option]!r} (param_groups[{i}])")

    def rewrite(self, step: DescentStep) -> Outcome:
        passes = step.passes
        parts = []
        for current in step.group_grads:
            moved = passes.origins(current)
            if moved is None:  # this group lies where it was
                dots = functional.grad_dots(current.grads, current.grads, found_inf=passes.found_inf)
                parts.append(torch.cat([dots[:1], dots.new_zeros(2)]))
            else:
                parts.append(functional.grad_dots(current.grads, current.lists.params, moved, found_inf=passes.found_inf))
        squares, along, _ = step.sum_of(parts)
        self.check_loss(step.loss, squares.device)
        loss = torch.as_tensor(step.loss, dtype=torch.float64, device=squares.device).detach().reshape(())
        passes.found_inf.logical_or_(~loss.isfinite().to(passes.found_inf.device))
        gap = loss - self.f_star - along / step.scale
        gamma = step.or_zero(gap.clamp_min(0.0) * step.scale**2 / squares.clamp_min(_TINY))
        steps = {current.index: torch.clamp(gamma, max=current.group["lr"]) for current in step.group_grads}
        if not any(current.group["momentum"] for current in step.group_grads):
            return Outcome(norm=squares.sqrt(), step_sizes=steps, options={i: {"lr": each} for i, each in steps.items()})
        steps = {current.index: (1.0 - current.group["momentum"]) * steps[current.index] for current in step.group_grads}
        for current in step.group_grads:
            each = steps[current.index]
            start = passes.origins(current) or current.lists.weights
            weight, decay, found_inf = each / step.scale, each * current.group["weight_decay"], passes.found_inf
            functional.combine_(current.grads, current.grads, start, left_weight=weight, right_weight=decay, found_inf=found_inf)
        return Outcome(norm=squares.sqrt(), is_scaled=False, step_sizes=steps, options={i: {"lr": 1.0, "weight_decay": 0.0} for i in steps})

    def check_loss(self, loss: Any, device: torch.device) -> None:
        if loss is None:
            raise RuntimeError(
                "SAMSPS: the loss at the perturbed point is needed: return it from the closure, or give second_step(loss=...)"
            )
        is_tensor = isinstance(loss, Tensor) and loss.numel() == 1
        if not is_tensor and (isinstance(loss, bool) or not isinstance(loss, int | float)):
            raise TypeError(f"SAMSPS: the loss must be a number or a tensor of one element, got {describe(loss)}")
        if is_recording(device) and not (is_tensor and loss.device == device):
            raise not_recordable(
                "the loss is a number, or a tensor elsewhere, which would be a constant of the graph; give one on the device"
            )
