"""The optimizer: two passes over the caller's closure around the fused operations. It owns no arithmetic and no base state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sam_kernels._validate import check_count, check_flag, check_number, describe
from sam_kernels.optim._base.base import keys_given, make_base, materialised
from sam_kernels.optim._base.options import check_earlier_values, check_group_names, check_keywords, check_max_norm, group_keys
from sam_kernels.optim._batches.closures import Closure, TwoPasses, passes_of
from sam_kernels.optim._batches.micro_batches import mean_loss
from sam_kernels.optim._compatibility import check_family, check_freezing, check_passes
from sam_kernels.optim._engine import amp
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.first_pass import warn_of_nothing_to_freeze
from sam_kernels.optim._engine.masters import check_masters, warn_of_no_masters
from sam_kernels.optim._engine.memory import ParamMemory
from sam_kernels.optim._engine.observing import check_observed
from sam_kernels.optim._engine.plan import check_options
from sam_kernels.optim._engine.replay import BufferGuard
from sam_kernels.optim._engine.rounding import check_rounding
from sam_kernels.optim._engine.two_steps import TwoStepAPI
from sam_kernels.optim._replicas.hybrid import replicas_of
from sam_kernels.optim._shards.shards import check_process_group
from sam_kernels.optim.descents import Descent, Plain
from sam_kernels.optim.directions import Direction, Gradient
from sam_kernels.schedules._at_step import RhoSchedule, Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SAM"]

Loss = TypeVar("Loss")


class SAM(TwoStepAPI):
    r"""Sharpness-aware minimization (arXiv 2010.01412, also the source of ρ = 0.05) around any ``torch.optim`` optimizer.

    One step, with g = ∇f(w) over all parameters and t = 1, 2, … the step (Unified SAM, arXiv 2503.02225)::

        e = rho_t (1 - lambd_t + lambd_t / (‖g‖ + norm_eps)) g            ascent; adaptive: T² g and ‖T g‖ with T = |w| + eta (ASAM)
        w = base_optimizer(w, ∇f(w + e))                              descent, from w restored bit for bit

    Args:
        params: parameters or parameter groups, as for ``torch.optim``; groups may set ``rho``, ``lambd``, ``adaptive``, ``eta`` and
            ``scale`` of their own. float32, float64, bfloat16 or float16; arithmetic is float32 or better. With a base instance: that
            instance's parameters.
        base_optimizer: an optimizer class, made with ``base_kwargs``, or an instance. Its ``param_groups`` and ``state`` are shared.
        rho: radius ≥ 0: a number, a 0-dim tensor, ``'C/k^p'``, a callable t → ρ or a :class:`sam_kernels.schedules.Radius`, which also
            sees the gradient's norm and the loss. A group with ρ = 0 takes no part in the ascent. With ρ = 0 everywhere the closure runs
            once and the step is the base optimizer's, bit for bit.
        lambd: mix of SAM (1) and USAM (0): a number in [0, 1], a 0-dim tensor, ``'1/t'``, ``'1-1/t'`` or a callable t → λ.
        adaptive, eta: ASAM's normalisation T = |w| + eta.
        scale: s in [0, 1e9], of a group: T is multiplied by it, with ``adaptive`` s (|w| + eta), otherwise s. See docs/schedules.md.
        direction: what the ascent goes along, of :mod:`sam_kernels.optim.directions`; the gradient unless given.
        descent: what the base steps along, of :mod:`sam_kernels.optim.descents`; the gradient of the second pass unless given.
        norm_eps: added to the norm. (``eps`` is the base's, where it takes one.)
        max_grad_norm: clips the descent gradient to this norm, as ``torch.nn.utils.clip_grad_norm_``, inside the fused step.
        model: module whose normalisation layers keep their running statistics in the second pass; or a list of modules, all of whose
            buffers are kept. Replicas of a ``DistributedDataParallel`` module agree on skipped steps.
        local_ascent: m-SAM over ranks (docs/guides/distributed.md); ``model`` must be, or list, the ``DistributedDataParallel`` module;
            or that of ``fully_shard`` on a mesh (replicate, shard), for m-SAM over its replica groups.
        process_group: ranks that hold the rest of the model, such as the other stages of a pipeline: norms are over the parameters of all,
            and all skip a step together (docs/guides/distributed.md). Not for replicas, nor for DTensors, whose meshes are known.
        preserve_rng_state: both passes see the same random numbers (dropout masks). With the two-step API call
            :meth:`record_rng_state` before the first forward pass.
        check_finite: the descent gradients are looked at before anything is updated: one more read of them, 1 of 11 N s. False is for those
            who would rather have the time than the net: a gradient of the second pass that is not finite is then stepped along. (One of
            the first pass still skips the step; so does either where a ``GradScaler`` or ``max_grad_norm`` needs the look anyway.)
            ``scaler.step(optimizer)`` without ``unscale_`` has just looked at them itself, and they are not read again.
        freeze_unperturbed: parameters of groups with ρ = 0 require no gradient in the first pass, which then costs less; weights and
            state are the same. For groups see :func:`sam_kernels.norm_layers`; for the two-step API, :meth:`ascent`.
        master_weights: float32 masters of bfloat16 and float16 parameters. Steps start from the masters and go to them; a parameter is its
            master, rounded once. The masters are the backup of the ascent: between and within steps there is no memory beyond that of
            mixed-precision training. State that the base makes is float32, and checkpoints hold the masters. Every base can be used; one
            that is not fused needs a float32 gradient, 4 bytes a parameter, during its step. See docs/master_weights.md.
        stochastic_rounding: True rounds perturbed bfloat16 weights stochastically, so that small perturbations are not lost; ``"update"``
            rounds the new weights so as well, for training in bfloat16 without masters (SGD, Adam, AdamW). The random numbers are functions
            of the step, the micro-batch and the element.
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

    Memory: one copy of the parameters, allocated at the first step, freed by :meth:`release_buffers`; none with ``master_weights``. Bytes
    moved for N parameters of s bytes with SGD and momentum: norm 1, perturb 4, check 1, restore and update 5: 11 N s. With masters of
    16-bit parameters: norm 2, perturb 8, check 2, update 20: 32 N.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, sparse or complex parameters, an empty parameter list.
    """

    _kept = (
        *TwoStepAPI._kept,
        "norm_eps",
        "max_grad_norm",
        "preserve_rng_state",
        "check_finite",
        "freeze_unperturbed",
        "_guard",
        "_replicas",
    )
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
        scale: float = 1.0,
        direction: Direction | None = None,
        descent: Descent | None = None,
        norm_eps: float = 1e-12,
        max_grad_norm: float | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
        local_ascent: bool | None = False,
        process_group: ProcessGroup | None = None,
        preserve_rng_state: bool = False,
        check_finite: bool = True,
        freeze_unperturbed: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool | Literal["update"] = False,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self.norm_eps = check_number("SAM", "norm_eps", norm_eps, low=0.0)
        self.max_grad_norm = check_max_norm(max_grad_norm)
        self.preserve_rng_state = check_flag("SAM", "preserve_rng_state", preserve_rng_state)
        self.check_finite = check_flag("SAM", "check_finite", check_finite)
        self.freeze_unperturbed = check_flag("SAM", "freeze_unperturbed", freeze_unperturbed)
        self.capturable = check_flag("SAM", "capturable", capturable)
        self.process_group = check_process_group(process_group)
        self.direction, self.descent = Gradient() if direction is None else direction, Plain() if descent is None else descent
        self._guard = BufferGuard(model)
        params = materialised(params)
        given = keys_given(params)
        self.base_optimizer = make_base(params, base_optimizer, base_kwargs)
        check_keywords(type(self), base_optimizer, self._given, self._shared_keywords, self.base_optimizer)
        check_family(self.direction, self.descent, self.base_optimizer, clips=self.max_grad_norm is not None, capturable=self.capturable)
        if self.freeze_unperturbed:
            check_freezing(self.direction, self.descent, self.process_group)
        self._replicas = replicas_of(
            self._guard.model,
            self.direction,
            self.descent,
            self.process_group,
            local_ascent=local_ascent,
            freezes=self.freeze_unperturbed,
        )
        has_masters = check_masters(master_weights, base=self.base_optimizer, capturable=self.capturable)
        self.rounding = check_rounding(stochastic_rounding, base=self.base_optimizer, has_masters=has_masters, capturable=self.capturable)
        self._memory = ParamMemory((*self.direction.keeps, *self.descent.keeps), has_masters=has_masters)
        self._has_stepped = False
        is_instance = self.base_optimizer is base_optimizer
        given = [] if is_instance else given
        self._keys = group_keys((*self._group_keys, "sam_step"), self.base_optimizer, given)
        self._name_keys = group_keys(("direction", "descent"), self.base_optimizer, given)
        for i, (group, keys) in enumerate(zip(self.base_optimizer.param_groups, given, strict=False)):
            check_group_names(group, keys, i, self._keys, self.base_optimizer)
        own = {"rho": rho, "lambd": lambd, "adaptive": adaptive, "eta": eta, "scale": scale, **self._more_defaults}
        defaults = {self._keys[name]: value for name, value in own.items()}
        check_options(defaults, self._keys, capturable=self.capturable)
        if is_instance:
            check_earlier_values(self.base_optimizer, defaults, self._keys)
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **defaults, self._keys["sam_step"]: 0})
        self._link()
        if self.freeze_unperturbed:
            warn_of_nothing_to_freeze(self.param_groups, self._keys["rho"])
        if has_masters:
            warn_of_no_masters(self.param_groups)

    # --- the step ---

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for non-finite gradients. Reading it waits for the device."""
        return self._passes.skips.count()

    @overload
    def step(self, closure: None = None, *, grad_scaler: GradScaler | None = None) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[..., Loss],
        *,
        grad_scaler: GradScaler | None = None,
        batch: Sequence[Any] | None = None,
        micro_batches: int | None = None,
        ascent_closure: Callable[[], Loss] | None = None,
    ) -> Loss: ...

    @overload
    def step(self, closure: Sequence[Callable[[], Loss]], *, grad_scaler: GradScaler | None = None) -> Loss: ...

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
        try:
            scaler = amp.check_scaler(grad_scaler)
            passes = passes_of(closure, batch, micro_batches, ascent_closure)
            return self._finish(scaler) if passes is None else self._make_step(passes, scaler)
        except BaseException:
            amp.forget_scaler(self)
            raise

    def _make_step(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        """A whole step out of pairs of closures, one pair for each micro-batch."""
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
            count, losses, norm = len(passes), [], None
            is_one_gradient = count == 1 and passes[0][0] is passes[0][1]
            mean = self._replicas.mean(count, self._passes)
            passes = self._replicas.arranged(passes, mean, self.param_groups)
            plan = self._begin()
            check_observed(plan, is_one_gradient)
            self._hands_over = True
            ascends = plan.ascends and self.descent.ascends(plan.groups[0].t)
            for i, (ascent, descent) in enumerate(passes):
                if ascends:
                    step = AscentStep(self._passes, self._replicas.index_of(i, count), within_replica=self._replicas.has_groups)
                    losses.append(self._two_passes(step, ascent, descent, scaler, self._watched))
                else:  # of one batch it is the base's own step
                    losses.append(self._called(descent) if mean is None else self._watched(descent))
                if mean is not None:
                    mean.add(self.param_groups)
                    if i < count - 1:  # the last time the descent does it
                        self._guard.restore()
                        self._passes.restore()
            if mean is not None:
                norm = mean.put(self.param_groups)
            self._descend(amp.scale_of(scaler), None, scaler, norm)
        except BaseException as error:
            self._undo(error)
            raise
        return losses[0] if mean is None else mean_loss(losses)

    @torch.no_grad()
    def backward(self, closure: Callable[[], Loss], *, grad_scaler: GradScaler | None = None, micro_batches: int = 1) -> Loss:
        """SAM's gradient, in the place of ``loss.backward()``, for loops and trainers that clip, unscale, accumulate and step themselves.

        Runs the closure at the weights, perturbs them, runs it at the perturbed point, restores the weights bit for bit and adds the
        gradient found there to ``.grad``. Then :meth:`step` without a closure is the base's step along ``.grad``::

            for i, batch in enumerate(loader):
                loss = optimizer.backward(lambda: loss_and_backward(batch))
                if (i + 1) % k == 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

        k calls are m-SAM with k micro-batches (arXiv 2509.18001), by ordinary accumulation: divide each loss by k. ρ, λ and t are those of
        the step to come, which :meth:`step` counts, once for all calls. With ρ = 0 everywhere the closure runs once. With a
        ``DistributedDataParallel`` module in ``model=`` and no local ascent, first passes are averaged under ``no_sync()`` too.

        Bytes: norm 1, perturb 4, restore 2, and 3 where ``.grad`` held gradients before: 10 N s (with several processes 2 more).

        Args:
            closure: runs forward and ``backward()`` and returns the loss; it does not zero the gradients. Called twice.
            grad_scaler: the scaler that the closure scales its loss with. Needed where :meth:`first_step` needs it; ``unscale_``, ``step``
                and ``update`` follow as usual.
            micro_batches: k, by which the closure divides its loss. The ascent is then that of the loss itself, where the length of the
                gradient matters: λ < 1, radii that follow the norm or the loss, RW-SAM's weights.

        Returns the loss of the first pass. A gradient of the first pass that is not finite makes the gradient left not finite, so that
        whoever looks at it skips, and :meth:`step` does. After an exception ``.grad`` and weights are as before the call.

        Raises:
            ValueError: for LookSAM, SAM-SPS and decoupled WSAM, whose steps are more than a gradient; for a second call in one step where
                the direction keeps an average (VaSSO, F-SAM).
            RuntimeError: between :meth:`first_step` and :meth:`second_step`; for a closure that computes no gradient.
        """
        scaler = amp.check_scaler(grad_scaler)
        if not callable(closure):
            raise TypeError(f"SAM.backward: closure must be a callable, got {describe(closure)}")
        share = 1.0 / check_count("SAM.backward", "micro_batches", micro_batches, low=1)
        return cast(Loss, self._add_gradient(closure, closure, scaler, share=share))

    def release_buffers(self) -> None:
        """Frees the copies of parameters and, for rules that keep them, of gradients (N s where gradients are not the optimizer's to take
        over: see docs/family.md); a later step allocates them again. Masters stay. Raises RuntimeError between the two passes."""
        self._require_unperturbed("release_buffers")
        self._passes.release()
        self._kept_grads.release()
        self._kept_at_ascent.release()
        self._guard.release()


amp.hide_grad_scaler(SAM.step)
