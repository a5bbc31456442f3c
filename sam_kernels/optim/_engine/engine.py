"""The steps of every sharpness-aware optimizer, out of pairs of passes, out of two half steps, or as a gradient to be accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from sam_kernels._memory_of import why_no_memory
from sam_kernels.optim._base.wrapper import Wrapper
from sam_kernels.optim._batches.closures import Closure, TwoPasses
from sam_kernels.optim._batches.micro_batches import mean_loss
from sam_kernels.optim._compatibility import check_gradient, check_passes
from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.ascent import ascent_of
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.closure_watch import ClosureWatch, HalvesWatch
from sam_kernels.optim._engine.kept_grads import KeptGrads
from sam_kernels.optim._engine.lists import param_name
from sam_kernels.optim._engine.oracle import OuterGrads, add_not_finite, still_not_finite
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.replay import BufferGuard, RandomState
from sam_kernels.optim._engine.skip_warning import SkipWatch
from sam_kernels.optim._engine.warn import warn_user
from sam_kernels.optim._replicas.replicas import Replicas, is_blank
from sam_kernels.optim.descents import UNCHANGED, DescentStep
from sam_kernels.schedules import Radius

__all__ = ["Engine"]


class Engine(Wrapper):
    """What :class:`sam_kernels.SAM` does, without its options and its documentation."""

    norm_eps: float
    max_grad_norm: float | None
    preserve_rng_state: bool
    check_finite: bool
    _guard: BufferGuard
    _replicas: Replicas

    def _link(self) -> None:
        self._plan: StepPlan | None = None  # of the step under way
        self._next_plan: StepPlan | None = None  # of the step to come, where it was needed early
        super()._link()
        self._random_state: RandomState | None = None  # recorded before a first forward pass
        self._replayed_state: RandomState | None = None  # of the step under way
        self._scale_is_known = False  # first_step was given the scaler
        self._kept_grads = KeptGrads()
        self._skips, self._halves = SkipWatch(), HalvesWatch()
        self._loss: Any = None  # of the last pass, for rules that need it
        self._step_sizes: dict[int, Tensor] = {}  # by group, of the last step, where a rule has chosen them
        self._awaits_ascent = False  # moved to where the first gradient is taken, and not yet further
        self._gradients_made = 0  # by backward(), since the last step
        self._not_finite: Tensor | None = None  # () whether the ascent of one of those was not finite
        self._plain_steps = 0  # in a row
        self._has_warned = False
        self._is_counted = False  # a step under way, which an exception would undo

    def _new_plan(self, *, ahead: bool) -> StepPlan:
        return StepPlan(self.param_groups, self._keys, self.base_optimizer, ahead=ahead, last=self._plan)

    def _plan_ahead(self) -> StepPlan:
        """The plan of the next step. What is needed of it before the step begins (a gradient, a forward pass) asks no schedule again."""
        if self._next_plan is None or not self._next_plan.is_of(self.param_groups, self._keys):
            self._next_plan = self._new_plan(ahead=True)
        return self._next_plan

    def _prepare(self) -> torch.device:
        """The device of the step to come. Raises TypeError or RuntimeError where it cannot be made there."""
        device = self._device()
        if capturable.is_recording(device):
            if not self.capturable:
                raise capturable.not_recordable("the optimizer was made without capturable=True: rho, lambd and t would be constants")
            if self.preserve_rng_state:
                raise capturable.not_recordable("preserve_rng_state=True reads the states of random generators, which waits")
        if self.capturable:
            for group in self.param_groups:
                capturable.to_tensors(group, self._keys)
        return device

    def _begin(self, *, counts: bool = True) -> StepPlan | None:
        """``counts``: a step of SAM, with a plan; otherwise one of the base alone."""
        device, groups, plan = self._prepare(), self.param_groups, None
        if counts:
            plan = self._next_plan if self._next_plan is not None and self._next_plan.is_of(groups, self._keys) else None
            if plan is None and not self.capturable:
                plan = self._new_plan(ahead=True)  # before anything is written
            self._advance(1)
            if plan is None:  # made of the tensors that count, which a graph goes on counting
                try:
                    plan = self._new_plan(ahead=False)
                except BaseException:
                    self._advance(-1)
                    raise
            self._next_plan, self._is_counted = None, True
            self._plain_steps = 0
        self._plan = plan
        self._passes.begin(device, plan)
        self._guard.begin()
        return plan

    def _advance(self, steps: int) -> None:
        t = self._keys["sam_step"]
        for group in self.base_optimizer.param_groups:
            group[t] += steps  # a tensor in place

    def _take_back(self) -> None:
        """After an exception: a step that was begun and not made is not counted, and the next one has its plan."""
        if self._is_counted:
            self._advance(-1)
            self._next_plan, self._is_counted = self._plan, False

    def _device(self) -> torch.device:
        """That of the first trainable parameter. Raises TypeError for one that has no memory yet."""
        for i, group in enumerate(self.param_groups):
            for j, param in enumerate(group["params"]):
                if param.requires_grad:
                    if param.is_meta:
                        raise TypeError(f"SAM: parameter {param_name(group, i, j)} {why_no_memory(param)}")
                    return cast(torch.device, param.device)
        return self._passes.found_inf.device

    # --- a step out of pairs of passes ---

    def _make_step(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        """A whole step."""
        if "found_inf" in self.__dict__:
            raise RuntimeError(
                "SAM.step was given a closure by GradScaler.step, which cannot tell the scaler about gradients computed inside it; "
                "call optimizer.step(closure, grad_scaler=scaler) and scaler.update()"
            )
        check_passes(self.direction, self.descent, passes)
        self._restore()
        self._forget_gradients()
        self._random_state = self._replayed_state = None  # of a step that was given up
        try:
            return self._step_with_closures(passes, scaler)
        except BaseException:  # out of memory, Ctrl-C: whatever it was, the weights must be the caller's
            self._take_back()
            self._restore()
            self._forget_first_pass()
            raise

    def _step_with_closures(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        mean = self._replicas.mean(len(passes), self._passes)
        passes = self._replicas.arranged(passes, mean, self.param_groups)
        plan = self._begin()
        assert plan is not None
        ascends = plan.ascends and self.descent.ascends(plan.groups[0].t)
        losses = []
        for i, (ascent, descent) in enumerate(passes):
            if ascends:
                step = AscentStep(self._passes, plan, self._replicas.index_of(i, len(passes)))
                losses.append(self._two_passes(step, ascent, descent, scaler))
            else:
                with self._watch() if mean is not None else nullcontext():  # of one batch it is the base's own step
                    losses.append(self._called(descent))
            if mean is not None:
                mean.add(self.param_groups)
                if i < len(passes) - 1:  # the last time the descent does it
                    self._guard.restore()
                    self._passes.restore()
        norm = None if mean is None else mean.put(self.param_groups)
        self._descend(amp.scale_of(scaler), None, scaler, norm)
        return losses[0] if len(losses) == 1 else mean_loss(losses)

    def _two_passes(self, step: AscentStep, ascent: Closure, descent: Closure, scaler: GradScaler | None) -> Any:
        """The loss of the first."""
        if self.direction.needs_no_gradient:
            self._ascend(step, None)
            with self._watch():
                return self._called(descent)
        random_state = RandomState(self._devices()) if self.preserve_rng_state else None
        self.direction.begin(step)
        with self._watch():
            loss = self._called(ascent)
        self._ascend(step, amp.scale_of(scaler), loss, hand_over=True)
        with self._watch(), nullcontext() if random_state is None else random_state.replayed():
            self._called(descent)
        return loss

    def _watch(self) -> AbstractContextManager[Any]:
        return nullcontext() if capturable.is_recording(self._passes.found_inf.device) else ClosureWatch(self.param_groups)

    def _called(self, closure: Closure) -> Any:
        with torch.enable_grad():
            loss = closure()
        if not self.descent.is_plain:
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    # --- a gradient ---

    def _add_gradient(self, ascent: Closure, descent: Closure, scaler: GradScaler | None) -> Any:
        """Adds SAM's gradient to ``.grad``. Returns the loss of the first pass."""
        self._require_unperturbed("backward")
        made, known = self._calls_made(), self._not_finite
        check_gradient(self.direction, self.descent, made)
        device, groups = self._prepare(), self.param_groups
        plan = self._plan_ahead()
        if not plan.ascends:
            loss = self._called(descent)
            self._gradients_made = made + 1
            return loss
        outer = OuterGrads(groups)
        if outer.are_shared and not (self.descent.is_plain and not self.direction.rewrites_descent):
            outer.put_back()
            name = self.direction.name if self.direction.rewrites_descent else self.descent.name
            raise ValueError(
                f"SAM.backward: {name!r} rewrites the gradient of one call, and with several processes gradients are accumulated before "
                "they are reduced; call backward once a step"
            )
        self._passes.begin(device, plan)
        self._guard.begin()
        try:
            step = AscentStep(self._passes, plan, self._replicas.index_of_call(made))
            is_replayed = self.preserve_rng_state and not self.direction.needs_no_gradient
            random_state = RandomState(self._devices()) if is_replayed else None
            loss = None
            if self.direction.needs_no_gradient:
                self._ascend(step, None)
            else:
                self.direction.begin(step)
                with self._replicas.without_averaging():
                    loss = outer.called(lambda: self._called(ascent))
                self._replicas.check_first_pass()
                self._ascend(step, amp.scale_of(scaler), loss, hand_over=True)
            outer.before_second_pass()
            with nullcontext() if random_state is None else random_state.replayed():
                second_loss = outer.called(lambda: self._called(descent))
            self._kept_grads.check_scale(amp.scale_of(scaler) is not None)
            if self.direction.rewrites_descent:
                self.direction.descent_norm(step)
            if not self.descent.is_plain:
                self.descent.rewrite(DescentStep(self._passes, groups, self._kept_grads, True, amp.scale_of(scaler), self._loss))
            self._guard.restore()
            self._passes.restore()
            self._passes.skips.forget_last_step()
            found_inf = self._passes.found_inf
            self._agree(found_inf)
            outer.add()
            add_not_finite(groups, found_inf)
        except BaseException:
            self._restore()
            self._forget_first_pass()
            outer.put_back()
            raise
        # It is the step that is skipped, and counted, once.
        self._gradients_made, self._not_finite = made + 1, found_inf.clone() if known is None else known.logical_or_(found_inf)
        found_inf.zero_()
        self._forget_first_pass()
        return second_loss if self.direction.needs_no_gradient else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's. What :meth:`backward` has added is forgotten."""
        super().zero_grad(set_to_none=set_to_none)
        self._forget_gradients()

    def _calls_made(self) -> int:
        """Of :meth:`backward`, since the last step or ``zero_grad()``."""
        if self._gradients_made and not any(param.grad is not None for param in self._all_params()):
            self._forget_gradients()
        return self._gradients_made

    def _forget_gradients(self) -> None:
        self._gradients_made, self._not_finite = 0, None

    # --- halves of a step ---

    def _finish(self, scaler: GradScaler | None) -> None:
        """``step()`` without a closure: the descent after :meth:`first_step` or :meth:`backward`, otherwise a plain step of the base."""
        is_sam = self._passes.is_perturbed
        if self._awaits_ascent:
            raise RuntimeError("SAM.step: call first_step after random_step, or give a closure")
        if self.descent.needs_loss and (is_sam or not is_blank(self.param_groups)):
            self.descent.check_loss(self._loss, self._passes.found_inf.device)
        grad_scale = self.__dict__.get("grad_scale") if scaler is None else amp.scale_of(scaler)  # GradScaler.step sets them
        found_inf = self.__dict__.get("found_inf")
        found_inf = found_inf if isinstance(found_inf, Tensor) else None
        if is_sam:
            self._halves.check()
            self._passes.check_unwritten()
            amp.check_order(self._scale_is_known, grad_scale, found_inf)
            self._descend(grad_scale, found_inf, scaler)
            return
        has_gradient = self._gradients_made > 0
        if has_gradient:
            self._begin()
            known = self._not_finite
            if known is not None:
                known = still_not_finite(self.param_groups, known)
                found_inf = known if found_inf is None else known.logical_or_(found_inf.to(known.device))
            self._forget_gradients()
        else:
            if not is_blank(self.param_groups):
                self._warn_of_plain_steps()
            self._begin(counts=False)  # t counts steps of SAM; torch.distributed.checkpoint makes plain ones of its own
        self._descend(grad_scale, found_inf, scaler, is_sam=has_gradient, rewrites=False)

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

    def _ascend(self, step: AscentStep, grad_scale: Tensor | None, loss: Any = None, *, hand_over: bool = False) -> None:
        if not self.direction.needs_no_gradient:  # the only forward pass is yet to come
            self._guard.save()
        plan = self._passes.plan
        assert plan is not None
        if loss is not None:
            loss = self._replicas.loss_for_radii(loss, [each.rho for each in plan.groups], self._passes.found_inf.device)
            if any(isinstance(each.rho, Radius) for each in plan.groups):
                loss = self._identity.shards.mean_loss(loss, self._passes.found_inf.device)
        group_grads, ascent = ascent_of(self.direction, step, grad_scale)
        self._passes.ascend(ascent, plan, eps=self.norm_eps, grad_scale=grad_scale, loss=loss)
        self._skips.after_ascent(self._passes.found_inf)
        if self.descent.keeps_grads and self._passes.has_ascended:  # its direction is made from gradients
            self._kept_grads.keep(group_grads, hand_over=hand_over, are_scaled=grad_scale is not None)

    def _descend(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scaler: GradScaler | None,
        known_norm: Tensor | None = None,
        *,
        is_sam: bool = True,
        rewrites: bool = True,
    ) -> None:
        """``is_sam``: the step is one of SAM, fused where it can be. ``rewrites``: the gradients are those of the second pass, still to be
        made what the base is to step along."""
        has_ascended = self._passes.has_ascended
        if has_ascended:
            self._kept_grads.check_scale(grad_scale is not None)
        if self._passes.is_perturbed:
            self._guard.restore()
        if has_ascended and self.direction.rewrites_descent:
            assert self._plan is not None
            centralized = self.direction.descent_norm(AscentStep(self._passes, self._plan))
            known_norm = known_norm if centralized is None else centralized
        outcome = UNCHANGED
        if rewrites and not self.descent.is_plain:
            self._passes.skips.forget_last_step()  # where there was no ascent, nothing has yet
            loss = self._replicas.loss_for_descent(self._loss, self._passes.found_inf.device)
            if self.descent.needs_loss:
                loss = self._identity.shards.mean_loss(loss, self._passes.found_inf.device)
            step = DescentStep(self._passes, self.param_groups, self._kept_grads, has_ascended, grad_scale, loss)
            outcome = self.descent.rewrite(step)
        is_gradient = is_sam and not rewrites and self._plan is not None and self._plan.ascends  # SAM's own, by backward()
        self._is_counted = False
        is_unscaled = self._passes.descend(
            self.param_groups,
            max_norm=self.max_grad_norm,
            check_finite=not outcome.is_checked and (self.check_finite or grad_scale is not None),
            grad_scale=grad_scale if outcome.is_scaled else None,
            found_inf=found_inf,
            known_norm=known_norm if outcome.norm is None else outcome.norm,
            options=outcome.options,
            agree=self._agree if is_sam or not is_blank(self.param_groups) else None,
            scaler_has_checked=outcome is UNCHANGED and not self.direction.rewrites_descent and amp.has_just_checked(self),
            # Not momentum's direction before there is one, nor where another rank may have ascended: the base's step has other last bits.
            is_plain=outcome is UNCHANGED
            and not (is_gradient or self._replicas.ascends_locally or (has_ascended and self.direction.needs_no_gradient)),
        )
        if outcome.finish is not None:
            outcome.finish(is_unscaled)
        self._step_sizes = outcome.step_sizes
        self._forget_first_pass()
        self._has_stepped = True
        self._settle_random_state()
        self._random_state = None
        self._skips.after_step(self._passes.found_inf, self._passes.skips.skipped)
        amp.report_step(scaler, self, self._passes.found_inf)

    def _agree(self, found_inf: Tensor) -> None:  # ()
        """Replicas and shards skip a step together."""
        self._replicas.agree(found_inf)
        self._identity.shards.agree(found_inf)

    def _settle_random_state(self) -> None:
        """The two-step API's: its second forward pass is over."""
        if self._replayed_state is not None:
            self._replayed_state.settle()
            self._replayed_state = None

    def _forget_first_pass(self) -> None:
        self._kept_grads.forget()
        self._loss = None

    def _restore(self) -> None:
        """Back to the weights and buffers of before the ascent, where there was one. A checkpoint that was loaded since stays."""
        self._awaits_ascent = self._is_counted = False
        if self._passes.is_perturbed:
            self._halves.end()
            if self._passes.abandon():
                self._guard.restore()
