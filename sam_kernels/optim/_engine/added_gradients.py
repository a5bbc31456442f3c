"""Gradients that are left in ``.grad``, and what ``step()`` without a closure makes of what it finds there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from sam_kernels.optim._batches.closures import Closure
from sam_kernels.optim._compatibility import check_gradient
from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.engine import Engine
from sam_kernels.optim._engine.observing import check_observed
from sam_kernels.optim._engine.oracle import OuterGrads, add_not_finite, still_not_finite
from sam_kernels.optim._engine.skip_warning import warn_of_plain_steps
from sam_kernels.optim._replicas.replicas import is_blank

__all__ = ["AddedGradients"]


class AddedGradients(Engine):
    """SAM's gradient in the place of ``loss.backward()``, and ``step()`` without a closure: the descent after it, or after an ascent of the
    two-step API, otherwise a plain step of the base."""

    def _link(self) -> None:
        super()._link()
        self._gradients_made = 0  # by backward(), since the last step
        self._not_finite: Tensor | None = None  # () whether the ascent of one of those was not finite
        self._has_warned = False

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
            self._descend_or_undo(grad_scale, found_inf, scaler)
        elif self._gradients_made > 0:
            self._begin()
            known = self._not_finite
            if known is not None:
                known = still_not_finite(self.param_groups, known)
                found_inf = known if found_inf is None else known.logical_or_(found_inf.to(known.device))
            self._forget_gradients()
            self._descend_or_undo(grad_scale, found_inf, scaler, is_rewritten=True)
        else:
            if not is_blank(self.param_groups):
                self._warn_of_plain_steps()
            self._enter(self._prepare(), None)  # not counted; torch.distributed.checkpoint makes plain steps of its own
            self._descend(grad_scale, found_inf, scaler, is_rewritten=True)

    def _warn_of_plain_steps(self) -> None:
        """Two steps in a row with nothing perturbed, or a first step, where a radius is positive."""
        self._plain_steps += 1
        if self._has_warned or capturable.is_recording(self._passes.found_inf.device):
            return
        is_first = self._plain_steps == 1 and not self._has_perturbed
        if not (is_first or self._plain_steps == 2) or not self._plan_ahead().ascends:
            return
        self._has_warned = True
        warn_of_plain_steps(type(self).__name__, type(self.base_optimizer).__name__, is_first=is_first)

    @property
    def _has_perturbed(self) -> bool:
        """Whether a step of SAM has been made, before a checkpoint too. A count on a device is not waited for: it may have."""
        counts = [group[self._keys["sam_step"]] for group in self.param_groups]
        return any(count.device.type != "cpu" or count > 0 if isinstance(count, Tensor) else count > 0 for count in counts)

    def _add_gradient(self, ascent: Closure, descent: Closure, scaler: GradScaler | None, *, share: float = 1.0) -> Any:
        """Adds SAM's gradient to ``.grad``. Returns the loss of the first pass. ``share``: what the losses have been multiplied by."""
        self._require_unperturbed("backward")
        made, known = self._calls_made(), self._not_finite
        check_gradient(self.direction, self.descent, made)
        device, plan = self._prepare(), self._plan_ahead()
        check_observed(plan, made == 0)
        if not plan.ascends:
            loss = self._called(descent)
            if self._replicas.ascends_locally:  # another rank may ascend, and agrees with this one
                found_inf, self._lacks_gradient = torch.zeros((), device=device), None
                self._agree(found_inf)
                add_not_finite(self.param_groups, found_inf)
                self._not_finite = found_inf if known is None else known.logical_or_(found_inf)
            self._gradients_made = made + 1
            return loss
        outer = OuterGrads(self.param_groups, may_lack_gradients=bool(self._passes.lists.shards))

        def second() -> Any:
            outer.before_second_pass()
            return descent()

        def call(closure: Closure) -> Any:
            result = outer.called(partial(self._called, closure))
            self._lacks_gradient = outer.lacks_gradient
            return result

        try:
            if outer.are_shared and self._rewriter is not None:
                raise ValueError(
                    f"SAM.backward: {self._rewriter.name!r} rewrites the gradient of one call, and with several processes gradients are "
                    "accumulated before they are reduced; call backward once a step"
                )
            self._enter(device, plan)
            step = AscentStep(self._passes, self._replicas.index_of_call(made), within_replica=self._replicas.has_groups)
            first = self._replicas.first_pass(ascent, self.param_groups, averages=True)
            loss = self._two_passes(step, first, second, scaler, call, share=share)
            self._rewrite(amp.scale_of(scaler, share, device))
            self._guard.restore()
            self._passes.restore()
            self._passes.skips.forget_last_step()
            found_inf = self._passes.found_inf
            self._agree(found_inf)
            outer.add()
            add_not_finite(self.param_groups, found_inf)
        except BaseException as error:
            self._undo(error)
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
