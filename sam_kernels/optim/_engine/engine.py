"""What a step of a sharpness-aware optimizer is made of: how it begins, its two passes, its descent, and the way back from an exception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from sam_kernels._validate import describe
from sam_kernels.optim._base.options import check_group_options
from sam_kernels.optim._base.wrapper import Wrapper
from sam_kernels.optim._batches.closures import Closure
from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.ascent import Move, PerturbOptions
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.closure_watch import ClosureWatch, HalvesWatch
from sam_kernels.optim._engine.failed_rank import note_failure
from sam_kernels.optim._engine.first_pass import FirstPass
from sam_kernels.optim._engine.kept_grads import KeptGrads
from sam_kernels.optim._engine.last_grads import LastGrads
from sam_kernels.optim._engine.lists import GroupGrads, device_of
from sam_kernels.optim._engine.observing import check_observer, observe
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.replay import BufferGuard, RandomState
from sam_kernels.optim._engine.skip_warning import SkipWatch
from sam_kernels.optim._part import FirstGradient
from sam_kernels.optim._replicas.hybrid import replicas_of
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
    freeze_unperturbed: bool = False  # copies of earlier versions have none
    _guard: BufferGuard
    _replicas: Replicas

    def _link(self) -> None:
        super()._link()
        self._next_plan: StepPlan | None = None  # of the step to come, where it was needed early
        self._random_state: RandomState | None = None  # recorded before a first forward pass
        self._replayed_state: RandomState | None = None  # of the step under way
        self._scale_is_known = False  # first_step was given the scaler
        self._kept_grads, self._kept_at_ascent = KeptGrads(), KeptGrads()
        self._first_pass = FirstPass(self.freeze_unperturbed, self._replicas, self._identity)
        self._last_grads: LastGrads | None = None
        if self.direction.keeps_last_grads:
            self._last_grads = LastGrads(self._memory, self.direction.keeps[0], is_fixed=self.capturable)
        self._hands_over = False  # the caller does not need the gradients after the step
        self._skips, self._halves = SkipWatch(), HalvesWatch()
        self._loss: Any = None  # of the last pass, for rules that need it
        self._step_sizes: dict[int, Tensor] = {}  # by group, of the last step, where a rule has chosen them
        self._plain_steps = 0  # in a row
        self._awaits_ascent = False  # moved to where the first gradient is taken, and not yet further
        self._is_counted = False  # a step under way, which an exception would undo
        self._lacks_gradient: str | None = None  # words of an error, where the last pass left this rank no gradient: others may have one

    def _use_replicas(self, modules: Sequence[DistributedDataParallel], *, local_ascent: bool) -> None:
        """From the next step on as if ``modules``, which have been put around parameters of this optimizer since, were in ``model=``.
        Raises ValueError for modules that the optimizer would refuse."""
        self._require_unperturbed("another model")
        self._replicas = replicas_of(
            list(modules), self.direction, self.descent, self.process_group, local_ascent=local_ascent, freezes=self.freeze_unperturbed
        )
        self._first_pass = FirstPass(self.freeze_unperturbed, self._replicas, self._identity)

    # --- begin, and undo ---

    def _new_plan(self, *, ahead: bool) -> StepPlan:
        check_group_options(self.param_groups, self.base_optimizer)
        last, others = self._passes.plan, self.process_group is not None
        plan = StepPlan(self.param_groups, self._keys, self.base_optimizer, ahead=ahead, last=last, have_others=others)
        check_observer(plan, self.direction, ascends_locally=self._replicas.ascends_locally, is_weighted="beta" in self._keys)
        return plan

    def _plan_ahead(self) -> StepPlan:
        """Return the plan of the next step. Values needed before the step begins come from this plan, and the step then uses it."""
        if self._next_plan is None or not self._next_plan.is_of(self.param_groups, self._keys):
            self._next_plan = self._new_plan(ahead=True)
        return self._next_plan

    def _plan_of_first_pass(self) -> StepPlan:
        return self._passes.ascent_plan if self._awaits_ascent else self._plan_ahead()

    def _prepare(self) -> torch.device:
        """The device of the step to come. Raises TypeError or RuntimeError where it cannot be made there."""
        self._passes.lists.shards.check_usable()
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
        self._lacks_gradient, self._hands_over = None, False

    def _advance(self, steps: int) -> None:
        t = self._keys["sam_step"]
        for group in self.base_optimizer.param_groups:
            group[t] += steps  # a tensor in place

    def _undo(self, error: BaseException) -> None:
        """After an exception (out of memory, Ctrl-C: whatever it was): weights, buffers and t are those of before the step, and the next
        step has this one's plan. Waits for no other rank."""
        if self._is_counted:
            self._advance(-1)
            self._next_plan, self._is_counted = self._passes.plan, False
        self._restore()
        self._forget_first_pass()
        if (shards := self._passes.lists.shards) or self._replicas:
            note_failure(error, shards.abandon_pass())

    def _restore(self) -> None:
        """Back to the weights and buffers of before the ascent, where there was one. A checkpoint that was loaded since stays."""
        self._awaits_ascent = self._is_counted = False
        if self._passes.is_perturbed:
            self._halves.end()
            if self._passes.abandon():
                self._guard.restore()
            self._passes.lists.shards.abandon_pass()  # whose gathered weights are perturbed ones

    def _forget_first_pass(self) -> None:
        self._kept_grads.forget()
        self._kept_at_ascent.forget()
        self._first_pass.forget()
        self._loss = None

    # --- two passes ---

    def _two_passes(
        self,
        step: AscentStep,
        ascent: Closure,
        descent: Closure,
        scaler: GradScaler | None,
        call: Callable[[Closure], Any],
        *,
        share: float = 1.0,
    ) -> Any:
        """First pass, ascent, second pass. Returns the loss of the first. ``call`` calls a closure and checks what it has done. ``share``:
        what the losses have been multiplied by."""
        if self.direction.first_gradient is FirstGradient.NONE:
            self._ascend(step, None)
            return call(descent)
        random_state = RandomState(self._devices()) if self.preserve_rng_state else None
        self.direction.begin(step)
        with self._first_pass.around(self._passes.ascent_plan):
            loss = call(ascent)
        follows_loss = any(isinstance(each.rho, Radius) for each in step.groups)  # alike on all ranks, whatever the closures return
        followed = loss
        if follows_loss:
            own = loss / share if share != 1.0 and isinstance(loss, Tensor | int | float) else loss
            followed = self._loss_of_all_ranks(own, within_replica=step.within_replica)
        self._ascend(step, amp.scale_of(scaler, share, self._passes.found_inf.device), followed, hand_over=True)
        with nullcontext() if random_state is None else random_state.replayed():
            call(descent)
        if self.descent.reflects and self._passes.has_ascended:
            self._kept_at_ascent.keep(self._passes.lists.group_grads(self.param_groups), hand_over=True)
            self._passes.reflect()
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
        with ClosureWatch(self.param_groups, may_lack_gradients=bool(self._passes.lists.shards)) as watch:
            loss = self._called(closure)
        self._lacks_gradient = watch.lacks_gradient
        return loss

    def _ascend(self, step: AscentStep, grad_scale: Tensor | None, loss: Any = None, *, hand_over: bool = False) -> None:
        """Saves the weights and writes w + e. ``hand_over``: gradients may be taken from their parameters, to be kept without a copy."""
        if self.direction.first_gradient is not FirstGradient.NONE:  # otherwise the only forward pass is yet to come
            self._guard.save()
        group_grads = self.direction.group_grads(step)
        if not self._passes.is_perturbed:
            for current in group_grads:
                self._passes.follow_weights(current.key, current.lists)
        norm, moves = self._moves(step, group_grads, grad_scale)
        self._passes.ascend(moves, norm, eps=self.norm_eps, grad_scale=grad_scale, loss=loss, micro_batch=step.micro_batch)
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

    # --- the descent ---

    def _rewrite(self, grad_scale: Tensor | None) -> tuple[Outcome, Tensor | None]:
        """Makes the gradients of the second pass what the base is to step along. Returns the rule's outcome, and their norm if known."""
        norm, has_ascended = None, self._passes.has_ascended
        if has_ascended:
            self._first_pass.compare()
            self._kept_grads.check_scale(grad_scale is not None)
            if self.direction.rewrites:
                norm = self.direction.descent_norm(AscentStep(self._passes, is_descent=True))
        if not self.descent.rewrites:
            return UNCHANGED, norm
        self._passes.skips.forget_last_step()  # where there was no ascent, nothing has yet
        loss = self._loss_of_all_ranks(self._loss) if self.descent.needs_loss else self._loss
        step = DescentStep(self._passes, self.param_groups, self._kept_grads, has_ascended, grad_scale, loss, self._kept_at_ascent)
        outcome = self.descent.rewrite(step) if step.group_grads or self._passes.lists.shards else UNCHANGED
        return outcome, norm if outcome.norm is None else outcome.norm

    def _loss_of_all_ranks(self, loss: Any, *, within_replica: bool = False) -> Any:
        device = self._passes.found_inf.device
        return self._passes.lists.shards.mean_loss(self._replicas.mean_loss(loss, device), device, within_replica=within_replica)

    def _agree(self, found_inf: Tensor, *, was_looked_for: bool = True) -> None:  # ()
        """Replicas and shards skip a step together. ``was_looked_for``: by this rank alone, beside the norms that all shards have."""
        self._replicas.agree(found_inf)
        lacks = self._lacks_gradient
        if was_looked_for and not self._passes.lists.shards.agree(found_inf, has_gradient=lacks is None):
            raise RuntimeError(lacks)
        self._is_counted = False  # the update follows, which cannot be undone

    def _descend_or_undo(self, *args: Any, **kwargs: Any) -> None:
        """:meth:`_descend`, undone after an exception where there are other ranks, which may have failed. (In one process another try
        may follow.)"""
        try:
            self._descend(*args, **kwargs)
        except BaseException as error:
            if self._passes.lists.shards or self._replicas:
                self._undo(error)
            raise

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
        was_looked_for = self.check_finite or grad_scale is not None or found_inf is not None or outcome is not UNCHANGED
        was_looked_for = was_looked_for or self._replicas.has_groups  # norms of the ascents are those of one group
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
            leaves_grads=outcome.finish is not None,
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
