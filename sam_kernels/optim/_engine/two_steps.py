"""The two-step API: the caller runs forward and backward passes, the optimizer ascends and descends in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.added_gradients import AddedGradients
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.replay import RandomState
from sam_kernels.optim._part import FirstGradient, Use

__all__ = ["TwoStepAPI"]


class TwoStepAPI(AddedGradients):
    """``first_step`` and ``second_step``, and what some options need around them."""

    @torch.no_grad()
    def random_step(self) -> None:
        """For the two-step API of :class:`RSAM`, before the first forward pass: moves the weights to w + Δ, where :meth:`first_step` goes
        on. Called again before that, it moves them from w by the same Δ. Raises RuntimeError where the direction begins at w.
        """
        if self.direction.first_gradient is not FirstGradient.ELSEWHERE:
            raise RuntimeError(f"SAM.random_step: direction {self.direction.name!r} begins at the weights; call first_step")
        self._replicas.check_two_steps()
        is_same_step = self._awaits_ascent  # called again
        self._restore()
        if not is_same_step:
            self._begin()
        try:
            self.direction.begin(AscentStep(self._passes, self._replicas.index_of(0, 1)))
        except BaseException as error:
            self._undo(error)
            raise
        self._awaits_ascent = True

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """Around the first forward and backward pass of the two-step API; :meth:`first_step` follows. ``freeze_unperturbed`` needs it, and
        with ``local_ascent`` it stands for ``ddp.no_sync()``. Raises RuntimeError between the two steps."""
        if not self._awaits_ascent:
            self._require_unperturbed("ascent")
        with self._replicas.without_averaging(), self._first_pass.of_halves(self._plan_of_first_pass()):
            yield

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The ascent, from the gradients as they are. Follow with forward, backward and :meth:`second_step`.

        ``grad_scaler``: the gradients are still scaled by it. Needed for λ < 1, for radii that follow the norm, for every direction but
        the gradient's own (VaSSO, F-SAM, RSAM) and for rules that keep the gradients (GSAM, WSAM); what SAM with λ = 1 ascends along does
        not depend on the scale. :class:`MomentumSAM` takes this step before the only forward and backward pass.
        """
        scaler = amp.check_scaler(grad_scaler)
        if self.direction.refuses(Use.TWO_STEPS) or self.descent.refuses(Use.TWO_STEPS):
            raise RuntimeError(f"SAM.first_step: {type(self).__name__} needs step(closure): not every step has two passes")
        self._replicas.check_two_steps()
        first_gradient = self.direction.first_gradient
        if first_gradient is FirstGradient.ELSEWHERE and not self._awaits_ascent:
            raise RuntimeError(f"SAM.first_step: {type(self).__name__} needs random_step() before the first forward pass, or step(closure)")
        if self.preserve_rng_state and self._random_state is None and first_gradient is not FirstGradient.NONE:
            raise RuntimeError("SAM.first_step: preserve_rng_state=True needs record_rng_state() before the first forward pass")
        amp.check_unscaled(scaler, self)
        if self._calls_made():
            raise RuntimeError("SAM.first_step: .grad holds what backward(closure) has added; call step(), or zero_grad() to drop it")
        if self.freeze_unperturbed:
            self._first_pass.check_halves(self._plan_of_first_pass())
        if first_gradient is not FirstGradient.ELSEWHERE:
            self._restore()
            self._begin()
        self._awaits_ascent = False
        self._forget_first_pass()
        try:
            self._replicas.check_first_pass(self.param_groups)
            scale = None if first_gradient is FirstGradient.NONE else amp.scale_of(scaler)
            self._ascend(AscentStep(self._passes), scale, hand_over=zero_grad)
            self._passes.watch_weights()
        except BaseException as error:
            self._undo(error)
            raise
        self._scale_is_known = scaler is not None
        if self._random_state is not None:
            self._random_state.replay()
            self._replayed_state, self._random_state = self._random_state, None
        if zero_grad:
            self.zero_grad()
        elif not (first_gradient is FirstGradient.NONE or capturable.is_recording(self._passes.found_inf.device)):
            self._halves.begin(self.param_groups)

    def second_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None, loss: Any = None) -> None:
        """The descent: weights are restored and stepped along the gradients as they are. ``loss``: that at the perturbed weights, for rules
        that need it (:class:`SAMSPS`).

        Raises RuntimeError without a :meth:`first_step` before it; TypeError or RuntimeError for a loss that the rule cannot do with:
        nothing has been touched then, and it can be called again with the loss.
        """
        if not self._passes.is_perturbed or self._awaits_ascent:
            raise RuntimeError("SAM.second_step: call first_step first")
        self.descent.check_loss(loss, self._passes.found_inf.device)
        self._loss, self._hands_over = loss, zero_grad
        step: Any = self.step  # SAM's
        step(grad_scaler=grad_scaler)  # through step(), so that hooks and schedulers see one step
        if zero_grad:
            self.zero_grad()

    def record_rng_state(self) -> None:
        """With ``preserve_rng_state`` and the two-step API: call before the first forward pass."""
        self._random_state = RandomState(self._devices())
