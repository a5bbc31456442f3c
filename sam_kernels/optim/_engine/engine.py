"""What a step of a sharpness-aware optimizer is made of: how it begins, its two passes, its descent, and the way back from an exception."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from sam_kernels._validate import describe
from sam_kernels.optim._base.wrapper import Wrapper
from sam_kernels.optim._batches.closures import Closure
from sam_kernels.optim._compatibility import check_gradient
from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.ascent import Move, PerturbOptions
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.closure_watch import ClosureWatch, HalvesWatch
from sam_kernels.optim._engine.kept_grads import KeptGrads
from sam_kernels.optim._engine.last_grads import LastGrads
from sam_kernels.optim._engine.lists import GroupGrads, device_of
from sam_kernels.optim._engine.observing import check_observed, check_observer, observe
from sam_kernels.optim._engine.oracle import OuterGrads, add_not_finite, still_not_finite
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.replay import BufferGuard, RandomState
from sam_kernels.optim._engine.skip_warning import SkipWatch
from sam_kernels.optim._engine.warn import warn_user
from sam_kernels.optim._part import FirstGradient
from sam_kernels.optim._replicas.replicas import Replicas, is_blank
from sam_kernels.optim.descents import UNCHANGED, DescentStep, Outcome
from sam_kernels.schedules import Radius

__all__ = ["Engine"]


class Engine(Wrapper):
    """The parts that :class:`sam_kernels.SAM` makes its steps of.

    A step is begun (:meth:`_begin`), which makes its plan and counts it; makes its two passes (:meth:`_two_passes`: first pass, ascent,
    second pass), once for each micro-batch; and descends (:meth:`_descend`). An exception in between undoes all of it (:meth:`_undo`).
    """

    norm_eps: float
    max_grad_norm: float | None
    preserve_rng_state: bool
    check_finite: bool
    _guard: BufferGuard
    _replicas: Replicas

    def _link(self) -> None:
        super()._link()
        self._next_plan: StepPlan | None = None  # of the step to come, where it was needed early
        self._random_state: RandomState | None = None  # recorded before a first forward pass
        self._replayed_state: RandomState | None = None  # of the step under way
        self._scale_is_known = False  # first_step was given the scaler
        self._kept_grads = KeptGrads()
        self._last_grads: LastGrads | None = None
        if self.direction.keeps_last_grads:
            self._last_grads = LastGrads(self._memory, self.direction.keeps[0], is_fixed=self.capturable)
        self._hands_over = False  # the caller does not need the gradients after the step
        self._skips, self._halves = SkipWatch(), HalvesWatch()
        self._loss: Any = None  # of the last pass, for rules that need it
        self._step_sizes: dict[int, Tensor] = {}  # by group, of the last step, where a rule has chosen them
        self._awaits_ascent = False  # moved to where the first gradient is taken, and not yet further
        self._gradients_made = 0  # by backward(), since the last step
        self._not_finite: Tensor | None = None  # () whether the ascent of one of those was not finite
        self._plain_steps = 0  # in a row
        self._has_warned = False
        self._is_counted = False  # a step under way, which an exception would undo

    # --- begin, and undo ---

    def _new_plan(self, *, ahead: bool) -> StepPlan:
        plan = StepPlan(self.param_groups, self._keys, self.base_optimizer, ahead=ahead, last=self._passes.plan)
        check_observer(plan, self.direction, ascends_locally=self._replicas.ascends_locally, is_weighted="beta" in self._keys)
        return plan

    def _plan_ahead(self) -> StepPlan:
        """Return the plan of the next step. Values needed before the step begins come from this plan, and the step then uses it."""
        if self._next_plan is None or not self._next_plan.is_of(self.param_groups, self._keys):
            self._next_plan = self._new_plan(ahead=True)
        return self._next_plan

    def _prepare(self) -> torch.device:
        """The device of the step to come. Raises TypeError or RuntimeError where it cannot be made there."""
        device = device_of(self.param_groups, self._passes.found_inf.device)
        if capturable.is_recording(device):
            if not self.capturable:
                raise capturable.not_recordable("the optimizer was made without capturable=True: rho, lambd and t would be constants")
            if self.preserve_rng_state:
                raise capturable.not_recordable("preserve_rng_state=True reads the states of random generators, which waits")
        if self.capturable:
            for group in self.param_groups:
                capturable.to_tensors(group, self._keys)
        return device

    def _begin(self) -> StepPlan:
        """Begins a step of SAM and counts it. Raises TypeError or ValueError for an option that is none: nothing has changed then."""
        device, plan = self._prepare(), self._next_plan
        if plan is None or not plan.is_of(self.param_groups, self._keys):
            plan = None if self.capturable else self._new_plan(ahead=True)  # before anything is written
        self._advance(1)
        if plan is None:  # made of the tensors that count, which a graph goes on counting
            try:
                plan = self._new_plan(ahead=False)
            except BaseException:
                self._advance(-1)
                raise
        self._next_plan, self._is_counted, self._plain_steps = None, True, 0
        self._enter(device, plan)
        return plan

    def _enter(self, device: torch.device, plan: StepPlan | None) -> None:
        self._passes.begin(device, plan)
        self._guard.begin()
        self._hands_over = False

    def _advance(self, steps: int) -> None:
        t = self._keys["sam_step"]
        for group in self.base_optimizer.param_groups:
            group[t] += steps  # a tensor in place

    def _undo(self) -> None:
        """After an exception (out of memory, Ctrl-C: whatever it was): weights, buffers and t are those of before the step, and the next
        step has this one's plan."""
        if self._is_counted:
            self._advance(-1)
            self._next_plan, self._is_counted = self._passes.plan, False
        self._restore()
        self._forget_first_pass()

    def _restore(self) -> None:
        """Back to the weights and buffers of before the ascent, where there was one. A checkpoint that was loaded since stays."""
        self._awaits_ascent = self._is_counted = False
        if self._passes.is_perturbed:
            self._halves.end()
            if self._passes.abandon():
                self._guard.restore()

    def _forget_first_pass(self) -> None:
        self._kept_grads.forget()
        self._loss = None

    # --- two passes ---

    def _two_passes(
        self, step: AscentStep, ascent: Closure, descent: Closure, scaler: GradScaler | None, call: Callable[[Closure], Any]
    ) -> Any:
        """First pass, ascent, second pass. Returns the loss of the first. ``call`` calls a closure and checks what it has done."""
        if self.direction.first_gradient is FirstGradient.NONE:
            self._ascend(step, None)
            return call(descent)
        random_state = RandomState(self._devices()) if self.preserve_rng_state else None
        self.direction.begin(step)
        loss = call(ascent)
        self._ascend(step, amp.scale_of(scaler), loss, hand_over=True)
        with nullcontext() if random_state is None else random_state.replayed():
            call(descent)
        return loss

    def _called(self, closure: Closure) -> Any:
        with torch.enable_grad():
            loss = closure()
        if self.descent.rewrites:
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    def _watched(self, closure: Closure) -> Any:
        """Call the closure. Raises RuntimeError for one that adds to older gradients, or computes none."""
        if capturable.is_recording(self._passes.found_inf.device):
            return self._called(closure)
        with ClosureWatch(self.param_groups):
            return self._called(closure)

    def _ascend(self, step: AscentStep, grad_scale: Tensor | None, loss: Any = None, *, hand_over: bool = False) -> None:
        """Saves the weights and writes w + e. ``hand_over``: gradients may be taken from their parameters, to be kept without a copy."""
        if self.direction.first_gradient is not FirstGradient.NONE:  # otherwise the only forward pass is yet to come
            self._guard.save()
        if loss is not None and any(isinstance(each.rho, Radius) for each in step.groups):
            loss = self._loss_of_all_ranks(loss)
        group_grads = self.direction.group_grads(step)
        norm, moves = self._moves(step, group_grads, grad_scale)
        self._passes.ascend(moves, norm, eps=self.norm_eps, grad_scale=grad_scale, loss=loss)
        self._skips.after_ascent(self._passes.found_inf)
        if self.descent.keeps_grads and self._passes.has_ascended:  # its direction is made from gradients
            self._kept_grads.keep(group_grads, hand_over=hand_over, are_scaled=grad_scale is not None)

    def _moves(self, step: AscentStep, group_grads: list[GroupGrads], grad_scale: Tensor | None) -> tuple[Tensor, list[Move]]:
        """The direction's norm, and the moves of the groups that participate. Raises TypeError for a result of another type."""
        participating = [each for each in group_grads if step.options(each).participates]
        norm: Any = self.direction.norm(step, participating, grad_scale)
        if not isinstance(norm, Tensor) or norm.numel() != 1 or not norm.is_floating_point():
            kind = type(self.direction).__name__
            raise TypeError(f"SAM: {kind}.norm must return a floating-point tensor of one element, got {describe(norm)}")
        moves = []
        for each in participating:
            along: Any = self.direction.perturb_options(step, each)
            if not isinstance(along, PerturbOptions):
                raise TypeError(
                    f"SAM: {type(self.direction).__name__}.perturb_options must return a directions.PerturbOptions, got {describe(along)}"
                )
            moves.append(Move(each, along, self.direction.is_downhill(step.options(each).maximize)))
        return norm, moves

    # --- a gradient ---

    def _add_gradient(self, ascent: Closure, descent: Closure, scaler: GradScaler | None) -> Any:
        """Adds SAM's gradient to ``.grad``. Returns the loss of the first pass."""
        self._require_unperturbed("backward")
        made, known = self._calls_made(), self._not_finite
        check_gradient(self.direction, self.descent, made)
        device, plan = self._prepare(), self._plan_ahead()
        check_observed(plan, made == 0)
        if not plan.ascends:
            loss = self._called(descent)
            self._gradients_made = made + 1
            return loss
        outer = OuterGrads(self.param_groups)

        def second() -> Any:
            outer.before_second_pass()
            return descent()

        def call(closure: Closure) -> Any:
            return outer.called(partial(self._called, closure))

        try:
            if outer.are_shared and self._rewriter is not None:
                raise ValueError(
                    f"SAM.backward: {self._rewriter.name!r} rewrites the gradient of one call, and with several processes gradients are "
                    "accumulated before they are reduced; call backward once a step"
                )
            self._enter(device, plan)
            step = AscentStep(self._passes, self._replicas.index_of_call(made))
            loss = self._two_passes(step, self._replicas.first_pass(ascent), second, scaler, call)
            self._rewrite(amp.scale_of(scaler))
            self._guard.restore()
            self._passes.restore()
            self._passes.skips.forget_last_step()
            found_inf = self._passes.found_inf
            self._agree(found_inf)
            outer.add()
            add_not_finite(self.param_groups, found_inf)
        except BaseException:
            self._undo()
            outer.put_back()
            raise
        # It is the step that is skipped, and counted, once.
        self._gradients_made, self._not_finite = made + 1, found_inf.clone() if known is None else known.logical_or_(found_inf)
        found_inf.zero_()
        self._forget_first_pass()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's. Gradients that :meth:`backward` has added no longer count as a step's."""
        super().zero_grad(set_to_none=set_to_none)
        self._forget_gradients()

    def _calls_made(self) -> int:
        """Of :meth:`backward`, since the last step or ``zero_grad()``."""
        if self._gradients_made and not any(param.grad is not None for param in self._all_params()):
            self._forget_gradients()
        return self._gradients_made

    def _forget_gradients(self) -> None:
        self._gradients_made, self._not_finite = 0, None

    # --- the descent ---

    def _finish(self, scaler: GradScaler | None) -> None:
        """``step()`` without a closure: the descent after :meth:`first_step` or :meth:`backward`, otherwise a plain step of the base."""
        if self._awaits_ascent:
            raise RuntimeError("SAM.step: call first_step after random_step, or give a closure")
        is_second_half = self._passes.is_perturbed
        if self.descent.needs_loss and (is_second_half or not is_blank(self.param_groups)):
            self.descent.check_loss(self._loss, self._passes.found_inf.device)
        grad_scale = self.__dict__.get("grad_scale") if scaler is None else amp.scale_of(scaler)  # GradScaler.step sets them
        found_inf = self.__dict__.get("found_inf")
        found_inf = found_inf if isinstance(found_inf, Tensor) else None
        if is_second_half:
            self._halves.check()
            self._passes.check_unwritten()
            amp.check_order(self._scale_is_known, grad_scale, found_inf)
            self._descend(grad_scale, found_inf, scaler)
        elif self._gradients_made > 0:
            self._begin()
            known = self._not_finite
            if known is not None:
                known = still_not_finite(self.param_groups, known)
                found_inf = known if found_inf is None else known.logical_or_(found_inf.to(known.device))
            self._forget_gradients()
            self._descend(grad_scale, found_inf, scaler, is_rewritten=True)
        else:
            if not is_blank(self.param_groups):
                self._warn_of_plain_steps()
            self._enter(self._prepare(), None)  # not counted; torch.distributed.checkpoint makes plain steps of its own
            self._descend(grad_scale, found_inf, scaler, is_rewritten=True)

    def _warn_of_plain_steps(self) -> None:
        """Two steps in a row with nothing perturbed, where a radius is positive."""
        self._plain_steps += 1
        if self._has_warned or self._plain_steps < 2 or capturable.is_recording(self._passes.found_inf.device):
            return
        if not self._plan_ahead().ascends:
            return
        self._has_warned = True
        warn_user(
            f"{type(self).__name__}: two steps without an ascent: step() alone is a step of {type(self.base_optimizer).__name__}. For "
            "sharpness-aware steps call step(closure), or first_step and second_step, or optimizer.backward(closure) in the place of "
            "loss.backward(); with rho=0 nothing is said"
        )

    def _rewrite(self, grad_scale: Tensor | None) -> tuple[Outcome, Tensor | None]:
        """Makes the gradients of the second pass what the base is to step along. Returns the rule's outcome, and their norm if known."""
        norm, has_ascended = None, self._passes.has_ascended
        if has_ascended:
            self._kept_grads.check_scale(grad_scale is not None)
            if self.direction.rewrites:
                norm = self.direction.descent_norm(AscentStep(self._passes, is_descent=True))
        if not self.descent.rewrites:
            return UNCHANGED, norm
        self._passes.skips.forget_last_step()  # where there was no ascent, nothing has yet
        loss = self._loss_of_all_ranks(self._loss) if self.descent.needs_loss else self._loss
        step = DescentStep(self._passes, self.param_groups, self._kept_grads, has_ascended, grad_scale, loss)
        outcome = self.descent.rewrite(step) if step.group_grads else UNCHANGED
        return outcome, norm if outcome.norm is None else outcome.norm

    def _loss_of_all_ranks(self, loss: Any) -> Any:
        device = self._passes.found_inf.device
        return self._passes.lists.shards.mean_loss(self._replicas.mean_loss(loss, device), device)

    def _agree(self, found_inf: Tensor, *, was_looked_for: bool = True) -> None:  # ()
        """Replicas and shards skip a step together. ``was_looked_for``: by this rank alone, beside the norms that all shards have."""
        self._replicas.agree(found_inf)
        if was_looked_for:
            self._passes.lists.shards.agree(found_inf)

    def _descend(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scaler: GradScaler | None,
        known_norm: Tensor | None = None,
        *,
        is_rewritten: bool = False,
    ) -> None:
        """Restores the weights and makes the base's step, fused where it can be. ``is_rewritten``: along the gradients as they are."""
        plan, has_ascended = self._passes.plan, self._passes.has_ascended
        if plan is not None and plan.observer is not None and not has_ascended and not (is_rewritten and plan.ascends):
            observe(self._passes, plan, grad_scale)
        keep = None
        if self._last_grads is not None and plan is not None:
            keep = partial(self._last_grads.keep, plan, grad_scale, self._hands_over)
            if self.descent.rewrites and not is_rewritten:
                keep(self._passes.lists.group_grads(self.param_groups), False)
                keep = None
        outcome, norm = (UNCHANGED, None) if is_rewritten else self._rewrite(grad_scale)
        if self._passes.is_perturbed:
            self._guard.restore()
        # Gradients that backward() made, and a local ascent: another rank may have ascended. Not momentum's direction before there is one:
        # the base's own step has other last bits.
        is_ascents = is_rewritten and plan is not None and plan.ascends
        is_ascents = is_ascents or (has_ascended and self.direction.first_gradient is FirstGradient.NONE)
        self._is_counted = False
        was_looked_for = self.check_finite or grad_scale is not None or found_inf is not None or outcome is not UNCHANGED
        is_unscaled = self._passes.descend(
            self.param_groups,
            max_norm=self.max_grad_norm,
            check_finite=not outcome.is_checked and (self.check_finite or grad_scale is not None),
            grad_scale=grad_scale if outcome.is_scaled else None,
            found_inf=found_inf,
            known_norm=known_norm if norm is None else norm,
            options=outcome.options,
            keep=keep,
            agree=partial(self._agree, was_looked_for=was_looked_for) if plan is not None or not is_blank(self.param_groups) else None,
            scaler_has_checked=outcome is UNCHANGED and not self.direction.rewrites and amp.has_just_checked(self),
            is_plain=outcome is UNCHANGED and not (is_ascents or self._replicas.ascends_locally),
        )
        if outcome.finish is not None:
            outcome.finish(is_unscaled)
        self._step_sizes = outcome.step_sizes
        if self._last_grads is not None and plan is not None:
            self._last_grads.note(self._passes.found_inf)
        self._forget_first_pass()
        self._has_stepped = True
        if self._replayed_state is not None:  # the two-step API's: its second forward pass is over
            self._replayed_state.settle()
        self._random_state = self._replayed_state = None
        self._skips.after_step(self._passes.found_inf, self._passes.skips.skipped)
        amp.report_step(scaler, self, self._passes.found_inf)
