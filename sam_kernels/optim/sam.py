"""The optimizer: two passes over the caller's closure around the fused operations. It owns no arithmetic and no base state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sam_kernels._validate import check_flag, check_number
from sam_kernels.optim import _amp, _capturable, _checkpoint
from sam_kernels.optim._base import make_base
from sam_kernels.optim._closures import Closure, TwoPasses, passes_of
from sam_kernels.optim._descent import can_fuse
from sam_kernels.optim._group import check_params
from sam_kernels.optim._held_still import BufferGuard, RandomState
from sam_kernels.optim._micro_batches import GradientMean, mean_loss
from sam_kernels.optim._passes import Passes
from sam_kernels.optim._schedules import FIRST_STEP, RhoSchedule, Schedule, check_schedule, takes_part

__all__ = ["SAM"]


class SAM(Optimizer):
    r"""Sharpness-aware minimization around any ``torch.optim`` optimizer.

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
        eps: added to the norm. (The base's own ``eps``, such as Adam's, is set through a base instance.)
        max_grad_norm: clips the descent gradient to this norm, as ``torch.nn.utils.clip_grad_norm_``, inside the fused step.
        model: module whose normalisation layers keep their running statistics in the second pass; or a list of modules, all of whose
            buffers are kept.
        preserve_rng_state: both passes see the same random numbers (dropout masks). With the two-step API call
            :meth:`record_rng_state` before the first forward pass.
        check_finite: the descent gradients are looked at before anything is updated: one more read of them, 1 of 11 N s. False is for those
            who would rather have the time than the net: a gradient of the second pass that is not finite is then stepped along. (One of
            the first pass still skips the step; so does either where a ``GradScaler`` or ``max_grad_norm`` needs the look anyway.)
        capturable: steps can be recorded into a CUDA graph, and a graph that is replayed follows its schedules; see below.
        base_kwargs: passed to the base optimizer's class.

    A step whose gradients are not finite, in either pass, changes nothing and is counted in :attr:`skipped_steps`.

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

    _group_keys: tuple[str, ...] = ("rho", "lambd", "adaptive", "eta")  # of a parameter group, beside the base's own and the step t
    _more_defaults: Mapping[str, Any] = MappingProxyType({})  # a subclass's own values of parameter groups
    # In copies and pickles.
    _kept: tuple[str, ...] = ("base_optimizer", "eps", "max_grad_norm", "preserve_rng_state", "check_finite", "capturable", "_guard")
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
        eps: float = 1e-12,
        max_grad_norm: float | None = None,
        model: nn.Module | Iterable[nn.Module] | None = None,
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
        self._guard = BufferGuard(model)
        self.base_optimizer = make_base(params, base_optimizer, base_kwargs)
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **own, "sam_step": 0})
        self._link()

    # --- parameter groups and checkpoints ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the base optimizer gets the group too."""
        groups = self.base_optimizer.param_groups
        is_new = not any(param_group is group for group in groups)
        if is_new:
            self.base_optimizer.add_param_group(param_group)
        try:
            for key in self._group_keys:
                param_group.setdefault(key, self.defaults[key])
            param_group.setdefault("sam_step", max(int(group.get("sam_step", 0)) for group in groups))
            self._check_group_values(param_group)
            check_params(param_group, next(i for i, group in enumerate(groups) if group is param_group))
        except (TypeError, ValueError):
            if is_new:
                groups.pop()
            raise
        if self.capturable:
            _capturable.to_tensors(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the groups, with ρ, λ and the step t. Callables are not saved: give them to the constructor."""
        return _checkpoint.without_callables(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or the base optimizer's own checkpoint. float32 state of 16-bit parameters stays float32."""
        self._require_unperturbed("load_state_dict")
        super().load_state_dict(_checkpoint.with_group_values(state_dict, self.param_groups, (*self._group_keys, "sam_step")))
        if can_fuse(self.base_optimizer, self._passes.own_hooks):
            _checkpoint.keep_wide_state(self.state, self.param_groups, state_dict)
        for group in self.param_groups:
            (_capturable.to_tensors if self.capturable else _capturable.to_numbers)(group)

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling the optimizer")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # unpickled or copied
            self._link()
        else:  # load_state_dict made new groups and a new state: the base shares those
            self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def _link(self) -> None:
        """Shares the base's groups and state, and listens to its ``step`` so that it is never made from perturbed weights."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        reference = weakref.ref(self)

        def restore_first(*_: Any) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer._restore()

        self._random_state: RandomState | None = None
        self._passes = Passes(self.base_optimizer, {self.base_optimizer.register_step_pre_hook(restore_first).id})

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
            raise

    def _step_with_closures(self, passes: Sequence[TwoPasses], scaler: GradScaler | None) -> Any:
        self._begin()
        mean = GradientMean(len(passes), self._passes) if len(passes) > 1 else None
        losses = []
        ascends = any(takes_part(group["rho"], group["sam_step"]) for group in self.param_groups)
        for i, (ascent, descent) in enumerate(passes):
            random_state = RandomState(self._devices()) if self.preserve_rng_state else None
            with torch.enable_grad():
                losses.append(ascent() if ascends else descent())
            if ascends:
                self._ascend(_amp.scale_of(scaler), losses[-1])
                if random_state is not None:
                    random_state.replay()
                with torch.enable_grad():
                    descent()
            if mean is not None:
                mean.add(self.param_groups)
                if i < len(passes) - 1:  # the last time the descent does it
                    self._restore()
        norm = None if mean is None else mean.put(self.param_groups)
        self._descend(_amp.scale_of(scaler), None, scaler, norm)
        return losses[0] if len(losses) == 1 else mean_loss(losses)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The ascent, from the gradients as they are. Follow with forward, backward and :meth:`second_step`.

        ``grad_scaler``: the gradients are still scaled by it (needed only for λ < 1 and for radii that follow the norm: the
        direction of SAM does not depend on the scale).
        """
        scaler = _amp.check_scaler(grad_scaler)
        self._restore()
        if self.preserve_rng_state and self._random_state is None:
            raise RuntimeError("SAM.first_step: preserve_rng_state=True needs record_rng_state() before the first forward pass")
        self._begin()
        try:
            self._ascend(_amp.scale_of(scaler))
        except BaseException:
            self._restore()
            raise
        if self._random_state is not None:
            self._random_state.replay()
            self._random_state = None
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """The descent: weights are restored and stepped along the gradients as they are.

        Raises RuntimeError without a :meth:`first_step` before it.
        """
        if not self._passes.is_perturbed:
            raise RuntimeError("SAM.second_step: call first_step first")
        self.step(grad_scaler=grad_scaler)  # through step(), so that hooks and schedulers see one step
        if zero_grad:
            self.zero_grad()

    def record_rng_state(self) -> None:
        """With ``preserve_rng_state`` and the two-step API: call before the first forward pass."""
        self._random_state = RandomState(self._devices())

    def release_buffers(self) -> None:
        """Frees the copy of the parameters; the next step allocates it again. Raises RuntimeError between the two passes."""
        self._require_unperturbed("release_buffers")
        self._passes.release()
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

    def _finish(self, scaler: GradScaler | None) -> None:
        """``step()`` without a closure: the descent after :meth:`first_step`, otherwise a plain step of the base."""
        if not self._passes.is_perturbed:
            self._begin(counts=False)  # t counts steps of SAM; torch.distributed.checkpoint makes plain ones of its own
        grad_scale = getattr(self, "grad_scale", None) if scaler is None else _amp.scale_of(scaler)
        found_inf = getattr(self, "found_inf", None)
        self._descend(grad_scale, found_inf if isinstance(found_inf, Tensor) else None, scaler)

    def _ascend(self, grad_scale: Tensor | None, loss: Any = None) -> None:
        self._guard.save()
        self._passes.ascend(self.param_groups, eps=self.eps, grad_scale=grad_scale, loss=loss)

    def _descend(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, scaler: GradScaler | None, known_norm: Tensor | None = None
    ) -> None:
        if self._passes.is_perturbed:
            self._guard.restore()
        self._passes.descend(
            self.param_groups,
            max_norm=self.max_grad_norm,
            check_finite=self.check_finite or grad_scale is not None,
            grad_scale=grad_scale,
            found_inf=found_inf,
            known_norm=known_norm,
        )
        _amp.report_step(scaler, self, self._passes.found_inf)

    @torch.no_grad()
    def _restore(self) -> None:
        """Back to the weights and buffers of before the ascent, where there was one."""
        if self._passes.is_perturbed:
            self._guard.restore()
        self._passes.restore()

    def _require_unperturbed(self, what: str) -> None:
        if self._passes.is_perturbed:
            raise RuntimeError(f"SAM: {what} between first_step and second_step, while the weights are perturbed")

    def _check_group_values(self, values: dict[str, Any]) -> None:
        first_step = FIRST_STEP if self.capturable else 1
        for name in ("rho", "lambd", "beta"):
            if name in values:
                check_schedule(name, values[name], first_step)
        if "adaptive" in values:
            check_flag("SAM", "adaptive", values["adaptive"])
        if "eta" in values:
            check_number("SAM", "eta", values["eta"], low=0.0)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(param.device for param in self._all_params()))


_amp.hide_grad_scaler(SAM.step)
