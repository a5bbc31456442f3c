"""The optimizer: two passes over the caller's closure around the fused operations. It owns no arithmetic and no base state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sam_kernels._validate import check_flag, check_number
from sam_kernels.optim import _amp, _capturable
from sam_kernels.optim._base import make_base
from sam_kernels.optim._closures import Closure, TwoPasses, passes_of
from sam_kernels.optim._family import check_family, check_passes
from sam_kernels.optim._held_still import BufferGuard, RandomState
from sam_kernels.optim._kept_grads import KeptGrads
from sam_kernels.optim._memory import ParamMemory
from sam_kernels.optim._micro_batches import mean_loss
from sam_kernels.optim._replicas import Replicas, is_blank
from sam_kernels.optim._wrapper import Wrapper
from sam_kernels.optim.descents import NOTHING, Descent, DescentStep, Plain
from sam_kernels.optim.directions import Direction, Gradient
from sam_kernels.schedules._at_step import RhoSchedule, Schedule, takes_part

__all__ = ["SAM"]


class SAM(Wrapper):
    r"""Sharpness-aware minimization (arXiv 2010.01412, also the source of ρ = 0.05) around any ``torch.optim`` optimizer.

    One step, with g = ∇f(w) over all parameters and t = 1, 2, … the step (Unified SAM, arXiv 2503.02225)::

        e = rho_t (1 - lambd_t + lambd_t / (‖g‖ + eps)) g            ascent; adaptive: T² g and ‖T g‖ with T = |w| + eta (ASAM)
        w = base_optimizer(w, ∇f(w + e))                              descent, from w restored bit for bit

    Args:
        params: parameters or parameter groups, as for ``torch.optim``; groups may set ``rho``, ``lambd``, ``adaptive`` and ``eta`` of their
            own. float32, float64, bfloat16 or float16; arithmetic is float32 or better. With a base instance: that instance's parameters.
        base_optimizer: an optimizer class, made with ``base_kwargs``, or an instance. Its ``param_groups`` and ``state`` are shared.
        rho: radius ≥ 0: a number, a 0-dim tensor, ``'C/k^p'``, a callable t → ρ or a :class:`sam_kernels.schedules.Radius`, which also
            sees the gradient's norm and the loss. A group with ρ = 0 takes no part in the ascent. With ρ = 0 everywhere the closure runs
            once and the step is the base optimizer's, bit for bit.
        lambd: mix of SAM (1) and USAM (0): a number in [0, 1], a 0-dim tensor, ``'1/t'``, ``'1-1/t'`` or a callable t → λ.
        adaptive, eta: ASAM's normalisation T = |w| + eta.
        direction: what the ascent goes along, of :mod:`sam_kernels.optim.directions`; the gradient unless given.
        descent: what the base steps along, of :mod:`sam_kernels.optim.descents`; the gradient of the second pass unless given.
        eps: added to the norm. (The base's own ``eps``, such as Adam's, is set through a base instance.)
        max_grad_norm: clips the descent gradient to this norm, as ``torch.nn.utils.clip_grad_norm_``, inside the fused step.
        model: module whose normalisation layers keep their running statistics in the second pass; or a list of modules, all of whose
            buffers are kept. Replicas of a ``DistributedDataParallel`` module agree on skipped steps.
        local_ascent: m-SAM over ranks (docs/distributed.md); ``model`` must be, or list, the ``DistributedDataParallel`` module.
        preserve_rng_state: both passes see the same random numbers (dropout masks). With the two-step API call
            :meth:`record_rng_state` before the first forward pass.
        check_finite: the descent gradients are looked at before anything is updated: one more read of them, 1 of 11 N s. False is for those
            who would rather have the time than the net: a gradient of the second pass that is not finite is then stepped along. (One of
            the first pass still skips the step; so does either where a ``GradScaler`` or ``max_grad_norm`` needs the look anyway.)
        capturable: steps can be recorded into a CUDA graph, and a graph that is replayed follows its schedules; see below.
        base_kwargs: passed to the base optimizer's class.

    A step whose gradients are not finite, in either pass, changes nothing and is counted in :attr:`skipped_steps`. (Moving averages of a
    direction may have moved, by what was finite.)

    With ``capturable`` ρ, λ and the step t (``sam_step``) are 0-dim tensors on the device, kept in ``param_groups`` (numbers become
    float64), and schedules are computed from them there; a callable is given t as a tensor and makes a tensor of it. Change ρ and λ between
    replays with ``group["rho"].fill_(0.1)``, and give ``lr`` as a tensor, which schedulers fill. A number put in the place of a tensor is
    followed by eager steps only; all other options are constants of the graph. One tensor given for several groups is shared by them. A
    radius that is the number 0 leaves its group out of the ascent; 0 in a tensor does not move the weights, but their gradients stay in the
    norm and the closure runs twice. Before the capture make at least one eager step on a side stream, as torch asks for, and capture anew
    after ``load_state_dict``. The base must be one that is fused: ``SGD``, ``Adam`` or ``AdamW``.

    Memory: one copy of the parameters, allocated at the first step, freed by :meth:`release_buffers`. Bytes moved for N parameters of
    s bytes with SGD and momentum: norm 1, perturb 4, check 1, restore and update 5: 11 N s.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, sparse or complex parameters, an empty parameter list.
    """

    _kept = (*Wrapper._kept, "eps", "max_grad_norm", "preserve_rng_state", "check_finite", "_guard", "_replicas")
    _step_supports_amp_scaling = True  # GradScaler.step then always calls step() and hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Callable[..., Optimizer] | Optimizer,
        *,
        rho: RhoSchedule = 0.05,
        lambd: Schedule = 1.0,
        adaptive: bool = False,
        eta: float = 0.0,
        direction: Direction | None = None,
        descent: Descent | None = None,
        eps: float = 1e-12,
        max_grad_norm: float | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
        local_ascent: bool | None = False,
        preserve_rng_state: bool = False,
        check_finite: bool = True,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self.eps = check_number("SAM", "eps", eps, low=0.0)
        self.max_grad_norm = None if max_grad_norm is None else check_number("SAM", "max_grad_norm", max_grad_norm, low=0.0)
        self.preserve_rng_state = check_flag("SAM", "preserve_rng_state", preserve_rng_state)
        self.check_finite = check_flag("SAM", "check_finite", check_finite)
        self.capturable = check_flag("SAM", "capturable", capturable)
        own = {"rho": rho, "lambd": lambd, "adaptive": adaptive, "eta": eta, **self._more_defaults}
        self._check_group_values(own)
        self.direction, self.descent = Gradient() if direction is None else direction, Plain() if descent is None else descent
        self._guard = BufferGuard(model)
        self.base_optimizer = make_base(params, base_optimizer, base_kwargs)
        check_family(self.direction, self.descent, self.base_optimizer, clips=self.max_grad_norm is not None, capturable=self.capturable)
        self._replicas = Replicas(self._guard.model, self.direction, self.descent, local_ascent=local_ascent)
        self._memory = ParamMemory((*self.direction.keeps, *self.descent.keeps))
        self._has_stepped = False
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **own, "sam_step": 0})
        self._link()

    def _link(self) -> None:
        super()._link()
        self._random_state: RandomState | None = None
        self._kept_grads = KeptGrads()
        self._loss: Any = None  # of the last pass, for rules that need it
        self._step_sizes: dict[int, Tensor] = {}  # by group, of the last step, where a rule has chosen them
        self._awaits_ascent = False  # moved to where the first gradient is taken, and not yet further

    # --- the step ---

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for non-finite gradients. Reading it waits for the device."""
        return self._passes.skipped_steps

    @torch.no_grad()
    def step(
        self,
        closure: Callable[..., Any] | Sequence[Closure] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
        batch: Sequence[Any] | None = None,
        micro_batches: int | None = None,
        ascent_closure: Closure | None = None,
    ) -> Any:
        """One step. Returns the loss of the first pass (of several micro-batches: the mean of the first losses), None without a closure.

        m-SAM (arXiv 2509.18001) perturbs each micro-batch by its own gradient and descends along the mean of the gradients found there: a
        list of closures, or ``batch`` and ``micro_batches``. For each, the closure is called at the weights and at the perturbed point, and
        the weights are restored between micro-batches: the next ascent gradient is taken at the weights themselves, and taking all of
        them beforehand would cost as many copies of the gradients. Memory is one mean gradient beside the gradients in use. Bytes
        for k > 1 micro-batches with SGD and momentum: norm 1, perturb 3 (4 once), mean 3 (0 once), restore 2 (not after the last), update
        5: 9 k + 1 N s; no pass over the mean is needed to see that it is finite. Between micro-batches ``param.grad`` may be None.
        Buffers that ``model=`` names are updated in the first pass of every micro-batch and in no second pass.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss; called twice. A list of closures: one for each
                micro-batch. None: the second half of the two-step API after :meth:`first_step`, otherwise a plain step of the base
                optimizer.
            grad_scaler: the scaler whose ``scale(loss).backward()`` the closure calls. Call ``grad_scaler.update()`` afterwards, as usual.
            batch: tuple or list of what the closure is called with. Every tensor in it (in tuples, lists and dicts too) is cut along
                dimension 0 into ``micro_batches`` equal pieces (views), anything else is passed on as it is. Equal pieces and losses that
                are means over samples make the mean of the gradients the one over all samples.
            micro_batches: how many pieces, at least 1 (the default), which is SAM on the whole batch.
            ascent_closure: n-SAM, the same paper's limit of one perturbation for all data: as ``closure``, called in its place in the first
                pass, typically for the gradient over all data; ``closure`` is then called once, in the second pass. The loss returned is
                that of ``ascent_closure``. With ρ = 0 everywhere only ``closure`` is called.

        Raises:
            TypeError, ValueError: before anything is called, for a closure that is none, for a batch without tensors or whose tensors have
                no dimension 0, differ in its size or cannot be cut into equal pieces, for arguments that do not go together.
        """
        scaler = _amp.check_scaler(grad_scaler)
        passes = passes_of(closure, batch, micro_batches, ascent_closure)
        return self._finish(scaler) if passes is None else self._make_step(passes, scaler)

    def _make_step(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        """A whole step, out of pairs of passes."""
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "SAM.step was given a closure by GradScaler.step, which cannot tell the scaler about gradients computed inside it; "
                "call optimizer.step(closure, grad_scaler=scaler) and scaler.update()"
            )
        self._restore()
        try:
            return self._step_with_closures(passes, scaler)
        except BaseException:  # out of memory, Ctrl-C: whatever it was, the weights must be the caller's
            self._restore()
            self._forget_first_pass()
            raise

    def _step_with_closures(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        check_passes(self.direction, self.descent, passes)
        mean = self._replicas.mean(len(passes), self._passes)
        passes = self._replicas.arranged(passes, mean, self.param_groups)
        self._begin()
        ascends = any(takes_part(group["rho"], group["sam_step"]) for group in self.param_groups)
        ascends = ascends and self.descent.ascends(self.param_groups[0]["sam_step"])
        losses = []
        for i, (ascent, descent) in enumerate(passes):
            losses.append(self._two_passes(ascent, descent, i, len(passes), scaler) if ascends else self._called(descent))
            if mean is not None:
                mean.add(self.param_groups)
                if i < len(passes) - 1:  # the last time the descent does it
                    self._restore()
        norm = None if mean is None else mean.put(self.param_groups)
        self._descend(_amp.scale_of(scaler), None, scaler, norm)
        return losses[0] if len(losses) == 1 else mean_loss(losses)

    def _two_passes(self, ascent: Closure, descent: Closure, micro_batch: int, count: int, scaler: GradScaler | None) -> Any:
        """The loss of the first."""
        if self.direction.needs_no_gradient:
            self._ascend(None)
            return self._called(descent)
        random_state = RandomState(self._devices()) if self.preserve_rng_state else None
        self.direction.begin(self._passes, self.param_groups, self._replicas.index_of(micro_batch, count))
        loss = self._called(ascent)
        self._ascend(_amp.scale_of(scaler), loss, hand_over=True)
        if random_state is not None:
            random_state.replay()
        self._called(descent)
        return loss

    def _called(self, closure: Closure) -> Any:
        with torch.enable_grad():
            loss = closure()
        if not self.descent.is_plain:
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    @torch.no_grad()
    def random_step(self) -> None:
        """For the two-step API of :class:`RSAM`, before the first forward pass: moves the weights to w + Δ, where :meth:`first_step` goes
        on. Called again before that, it moves them from w by the same Δ. Raises RuntimeError where the direction begins at w.
        """
        if not self.direction.begins_elsewhere:
            raise RuntimeError(f"SAM.random_step: direction {self.direction.name!r} begins at the weights; call first_step")
        is_new = not self._awaits_ascent
        self._restore()
        self._begin(counts=is_new)
        try:
            self.direction.begin(self._passes, self.param_groups, self._replicas.index_of(0, 1))
        except BaseException:
            self._restore()
            raise
        self._awaits_ascent = True

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The ascent, from the gradients as they are. Follow with forward, backward and :meth:`second_step`.

        ``grad_scaler``: the gradients are still scaled by it. Needed for λ < 1, for radii that follow the norm, for every direction but
        the gradient's own (VaSSO, F-SAM, RSAM) and for rules that keep the gradients (GSAM, WSAM); what SAM with λ = 1 ascends along does
        not depend on the scale. :class:`MomentumSAM` takes this step before the only forward and backward pass.
        """
        scaler = _amp.check_scaler(grad_scaler)
        if self.descent.needs_closure:
            raise RuntimeError(f"SAM.first_step: {type(self).__name__} needs step(closure): not every step has two passes")
        if self.direction.begins_elsewhere and not self._awaits_ascent:
            raise RuntimeError(f"SAM.first_step: {type(self).__name__} needs random_step() before the first forward pass, or step(closure)")
        if self.preserve_rng_state and self._random_state is None and not self.direction.needs_no_gradient:
            raise RuntimeError("SAM.first_step: preserve_rng_state=True needs record_rng_state() before the first forward pass")
        if not self.direction.begins_elsewhere:
            self._restore()
            self._begin()
        self._awaits_ascent = False
        self._forget_first_pass()
        try:
            self._replicas.check_first_pass()
            self._ascend(None if self.direction.needs_no_gradient else _amp.scale_of(scaler), hand_over=zero_grad)
        except BaseException:
            self._restore()
            raise
        if self._random_state is not None:
            self._random_state.replay()
            self._random_state = None
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None, loss: Any = None) -> None:
        """The descent: weights are restored and stepped along the gradients as they are. ``loss``: that at the perturbed weights, for rules
        that need it (:class:`SAMSPS`).

        Raises RuntimeError without a :meth:`first_step` before it; TypeError or RuntimeError for a loss that the rule cannot do with:
        nothing has been touched then, and it can be called again with the loss.
        """
        if not self._passes.is_perturbed or self._awaits_ascent:
            raise RuntimeError("SAM.second_step: call first_step first")
        self.descent.check_loss(loss, self._passes.found_inf.device)
        self._loss = loss
        self.step(grad_scaler=grad_scaler)  # through step(), so that hooks and schedulers see one step
        if zero_grad:
            self.zero_grad()

    def record_rng_state(self) -> None:
        """With ``preserve_rng_state`` and the two-step API: call before the first forward pass."""
        self._random_state = RandomState(self._devices())

    def release_buffers(self) -> None:
        """Frees the copies of parameters and, for rules that keep them, of gradients (N s where gradients are not the optimizer's to take
        over: see docs/family.md); a later step allocates them again. Raises RuntimeError between the two passes."""
        self._require_unperturbed("release_buffers")
        self._passes.release()
        self._kept_grads.release()
        self._guard.release()

    def _begin(self, *, counts: bool = True) -> None:
        device = next(param for group in self.param_groups for param in group["params"]).device
        if _capturable.is_recording(device):
            if not self.capturable:
                raise _capturable.not_recordable("the optimizer was made without capturable=True: rho, lambd and t would be constants")
            if self.preserve_rng_state:
                raise _capturable.not_recordable("preserve_rng_state=True reads the states of random generators, which waits")
        for group in self.param_groups:
            self._check_group_values({key: group[key] for key in self._group_keys if not callable(group[key])})
            if self.capturable:
                _capturable.to_tensors(group)
            if counts:
                group["sam_step"] += 1  # a tensor in place
        self._passes.begin(device)
        self._guard.begin()

    def _finish(self, scaler: GradScaler | None) -> None:
        """``step()`` without a closure: the descent after :meth:`first_step`, otherwise a plain step of the base."""
        is_sam = self._passes.is_perturbed
        if self._awaits_ascent:
            raise RuntimeError("SAM.step: call first_step after random_step, or give a closure")
        # torch.distributed.checkpoint makes a step with lr = 0 for the state that it is to fill.
        if self.descent.needs_loss and (is_sam or any(group["lr"] != 0 for group in self.param_groups)):
            self.descent.check_loss(self._loss, self._passes.found_inf.device)
        if not is_sam:
            self._begin(counts=False)  # t counts steps of SAM; torch.distributed.checkpoint makes plain ones of its own
        grad_scale = getattr(self, "grad_scale", None) if scaler is None else _amp.scale_of(scaler)
        found_inf = getattr(self, "found_inf", None)
        self._descend(grad_scale, found_inf if isinstance(found_inf, Tensor) else None, scaler, is_sam=is_sam)

    def _ascend(self, grad_scale: Tensor | None, loss: Any = None, *, hand_over: bool = False) -> None:
        if not self.direction.needs_no_gradient:  # the only forward pass is yet to come
            self._guard.save()
        loss = self._replicas.loss_for_radii(loss, self.param_groups, self._passes.found_inf.device)
        currents = self._passes.ascend(self.param_groups, self.direction, eps=self.eps, grad_scale=grad_scale, loss=loss)
        if self.descent.keeps_grads and self._passes.has_ascended:  # its direction is made from gradients
            self._kept_grads.keep(currents, hand_over=hand_over, are_scaled=grad_scale is not None)

    def _descend(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scaler: GradScaler | None,
        known_norm: Tensor | None = None,
        *,
        is_sam: bool = True,
    ) -> None:
        has_ascended = self._passes.has_ascended
        if has_ascended:
            self._kept_grads.check_scale(grad_scale is not None)
        if self._passes.is_perturbed:
            self._guard.restore()
        if has_ascended:
            centralized = self.direction.descent_norm(self._passes, self.param_groups)
            known_norm = known_norm if centralized is None else centralized
        outcome = NOTHING
        if is_sam and not self.descent.is_plain:
            self._passes.forget_last_step()  # where there was no ascent, nothing has yet
            loss = self._replicas.loss_for_descent(self._loss, self._passes.found_inf.device)
            step = DescentStep(self._passes, self.param_groups, self._kept_grads, has_ascended, grad_scale, loss)
            outcome = self.descent.rewrite(step)
        is_unscaled = self._passes.descend(
            self.param_groups,
            max_norm=self.max_grad_norm,
            check_finite=not outcome.is_checked and (self.check_finite or grad_scale is not None),
            grad_scale=grad_scale if outcome.is_scaled else None,
            found_inf=found_inf,
            known_norm=known_norm if outcome.norm is None else outcome.norm,
            options=outcome.options,
            agree=self._replicas.agree if is_sam or not is_blank(self.param_groups) else None,
            # Not before there is a momentum, nor where another rank may have ascended: the base's own step has other last bits.
            is_plain=outcome is NOTHING and not (has_ascended and self.direction.needs_no_gradient) and not self._replicas.ascends_locally,
        )
        if outcome.finish is not None:
            outcome.finish(is_unscaled)
        self._step_sizes = outcome.step_sizes
        self._forget_first_pass()
        self._has_stepped = True
        _amp.report_step(scaler, self, self._passes.found_inf)

    def _forget_first_pass(self) -> None:
        self._kept_grads.forget()
        self._loss = None

    @torch.no_grad()
    def _restore(self) -> None:
        """Back to the weights and buffers of before the ascent, where there was one."""
        self._awaits_ascent = False
        if self._passes.is_perturbed:
            self._guard.restore()
        super()._restore()


_amp.hide_grad_scaler(SAM.step)
