"""Reweighted SAM: the ascent goes along the samples whose gradients are long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_kernels._sharding import sharded_modules
from sam_kernels._validate import check_count, describe
from sam_kernels.optim._batches.closures import Closure, TwoPasses, passes_of
from sam_kernels.optim._compatibility import check_weighted
from sam_kernels.optim._engine import amp, capturable
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.replay import RandomState
from sam_kernels.optim._reweighted.directional import DirectionalNorms
from sam_kernels.optim._reweighted.reweighting import Reweighting, check_modules, check_owned, checked_losses, chosen_modules
from sam_kernels.optim._reweighted.samples import ranks_of
from sam_kernels.optim._reweighted.weighing import Weighing
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.optim.sam import SAM
from sam_kernels.per_sample import GradNorms
from sam_kernels.schedules._at_step import Schedule

__all__ = ["RWSAM"]


class RWSAM(SAM):
    r"""Reweighted SAM (arXiv 2509.18001): :class:`SAM` whose ascent weights every sample by how long its gradient is.

    With f_1 … f_B the losses of a batch, and t = 1, 2, … the step::

        n_i = ‖∇f_i(w)‖
        p   = softmax(beta_t n)                                          the weights that maximise Σ p_i n_i + entropy(p) / beta_t
        v   = Σ_i p_i ∇f_i(w)
        e   = rho_t (1 - lambd_t + lambd_t / (‖v‖ + eps)) v
        w   = base_optimizer(w, ∇ mean_i f_i (w + e))                    from w restored bit for bit

    β = 0 is SAM, β → ∞ climbs along the sample of the longest gradient; a negative β prefers short gradients. β has the unit of 1 / n:
    norms change during training. A callable may follow them, or ``beta_scale="std"``. With β = 0 (as a number, and
    ``sampling="weights"``) no norm is taken and the step is SAM's on the mean loss, bit for bit.

    ``norms`` says where n comes from:

    * ``"exact"``: from the one backward pass that v needs anyway, by :class:`sam_kernels.per_sample.GradNorms` (layers that have no rule
      there: see ``unsupported``), over all parameters of groups with ρ > 0.
    * ``"last_layer"``, ``"norm_layers"`` or a list of modules: the same, over the parameters of these modules alone. A cheap proxy. (The
      last layer is the last module, in the model's own order, that has parameters.)
    * ``"finite_difference"``: n_i = √(mean over K directions z of ((f_i(w + δz) - f_i(w)) / δ)²), for K more forward passes, without
      autograd. One direction has a relative standard deviation of about 3/4, and a mean 20 % too low. A forward pass in 16 bits drowns the
      difference: leave autocast off.
    * ``"jvp"``: the same with the derivative along z itself, in place of the difference, by forward-mode differentiation. Memory: z, once.

    Args:
        model: what the closure calls. Running statistics of its normalisation layers are updated by one forward pass a step, that at w;
            neither those at w + δz nor the second pass change them. In training mode BatchNorm makes samples depend on each other: exact
            norms are then those of contributions (see :class:`~sam_kernels.per_sample.GradNorms`), which add up to the batch's gradient.
            Over the shards of ``fully_shard`` samples of all ranks are weighted together, and the step is that of one process. Wrapped
            in DistributedDataParallel, each rank weights its own and climbs along their gradient, which is not averaged (as m-SAM); the
            descent is. (See ``local_ascent``, and docs/guides/distributed.md.)
        base_optimizer: as for :class:`SAM`, made with ``base_kwargs``.
        beta: inverse temperature: a number, a 0-dim tensor or a callable t → β. Kept in ``param_groups``, alike in all.
        beta_scale: ``"std"``: β over the standard deviation of the batch's norms, p = softmax(beta (n - mean n) / std n), which means the
            same at the start and at the end of training, for every model and every batch. (A deviation below 10⁻⁵ of the mean counts as
            that.)
        norm_cap: norms above so many times their median count as that: no sample, such as a wrong label, decides alone. None: none do.
            Over ranks this gathers the norms, and waits for the device.
        norms: see above.
        micro_batch: m: norms and weights of the mean gradients of m consecutive samples.
        sampling: ``"weights"``: v as above. ``"draw"``: v is the mean of the gradients of ``draws`` samples (micro-batches) drawn with
            probabilities p, with or without ``replacement``.
        delta, delta_scaling: length of the step of finite differences: δ√d for d parameters (``"sqrt_d"``), or δ (``"unit"``).
        distribution: of z: ``"rademacher"`` or ``"normal"``.
        num_directions: K.
        seed: of z and of draws, which also depend on the step: a run continued from a checkpoint has the same ones.
        unsupported: as for :class:`~sam_kernels.per_sample.GradNorms`.
        params: as for :class:`SAM`, of the model's parameters; None: all of them. Others of the model that are trainable have gradients
            added to their ``.grad``, as by any backward pass.
        local_ascent: True, which is what None means where the model has ``no_sync`` (DistributedDataParallel): weights within the rank,
            as above, with the rules of :class:`SAM`. False with such a model: samples of all ranks are weighted together, for one more
            backward pass, through the module, and the ascent gradient is averaged.
        sam_and_base_kwargs: :class:`SAM`'s keywords but ``model``, and the base optimizer's. The ascent gradient that a ``direction`` or
            a ``descent`` works on is v: averages, extragradient, centralised gradients and the Polyak step size go with it. Directions
            that take no gradient at w, and rules that keep it (which mean ∇f, not v), do not.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, for tensor parallelism (a sample's gradient would lie on
            several ranks), and with shards for ``norms="jvp"``.
    """

    _group_keys = (*SAM._group_keys, "beta")
    _shared_keywords = (*SAM._shared_keywords, "beta", "params")
    _kept = (*SAM._kept, "model", "reweighting")
    _weighted = "RWSAM"

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: type[Optimizer] | Callable[..., Optimizer] | Optimizer,
        *,
        beta: Schedule,
        beta_scale: str = "none",
        norm_cap: float | None = None,
        norms: str | Iterable[nn.Module] = "exact",
        micro_batch: int = 1,
        sampling: str = "weights",
        draws: int = 1,
        replacement: bool = True,
        delta: float = 1e-3,
        delta_scaling: str = "sqrt_d",
        distribution: str = "rademacher",
        num_directions: int = 1,
        seed: int = 0,
        unsupported: str = "error",
        params: Any = None,
        local_ascent: bool | None = None,
        **sam_and_base_kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"RWSAM: model must be a torch.nn.Module, got {describe(model)}")
        self.model = model
        self.reweighting = Reweighting(
            norms=norms if isinstance(norms, str) else "modules",
            modules=() if isinstance(norms, str) else check_modules(model, norms),
            micro_batch=micro_batch,
            sampling=sampling,
            draws=draws,
            replacement=replacement,
            delta=delta,
            delta_scaling=delta_scaling,
            distribution=distribution,
            num_directions=num_directions,
            seed=seed,
            unsupported=unsupported,
            beta_scale=beta_scale,
            norm_cap=norm_cap,
        )
        chosen_modules(model, self.reweighting.norms)
        if sam_and_base_kwargs.get("capturable") and (self.reweighting.is_directional or sampling == "draw"):
            raise ValueError("RWSAM: capturable=True needs exact norms and sampling='weights': a graph would draw the same numbers again")
        check_weighted(sam_and_base_kwargs.get("direction"), sam_and_base_kwargs.get("descent"))
        self._more_defaults = {"beta": beta}
        if sam_and_base_kwargs.get("process_group") is not None:
            raise ValueError("RWSAM: process_group is not supported: the gradient of a sample would lie on several ranks; use SAM")
        for module in sharded_modules(model):
            module.reshard()  # its parameters are then the shards
        params = model.parameters() if params is None else params
        super().__init__(params, base_optimizer, model=model, local_ascent=local_ascent, **sam_and_base_kwargs)
        check_owned(model, self.param_groups)

    def _link(self) -> None:
        super()._link()
        self._link_samples()

    def _link_samples(self) -> None:
        how = self.reweighting
        self._engine = self._directional = None
        if how.is_directional:
            self._directional = DirectionalNorms(self.model, how)
        else:
            self._engine = GradNorms(self.model, micro_batch=how.micro_batch, reduction="mean", unsupported=how.unsupported)
        self._ranks = ranks_of(self.model, how.norms, local_ascent=self._replicas.ascends_locally)
        self._weighing = Weighing(how, self._ranks)
        self._recorded: StepPlan | None = None  # of the forward pass under recording()

    def _use_replicas(self, modules: Sequence[DistributedDataParallel], *, local_ascent: bool) -> None:
        super()._use_replicas(modules, local_ascent=local_ascent)
        self.model = next(module for module in modules if self.model in module.modules())
        self._link_samples()

    # --- the step ---

    @torch.no_grad()
    def step(  # type: ignore[override]  # no n-SAM: there is no sample to weight
        self,
        closure: Callable[..., Tensor] | Sequence[Callable[[], Tensor]] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
        batch: Sequence[Any] | None = None,
        micro_batches: int | None = None,
    ) -> Any:
        """One step. Returns the mean of the losses of the first pass, without its graph; None without a closure.

        Args:
            closure: runs the forward pass and returns the samples' losses, (B,); no ``zero_grad``, no ``backward``: gradients are set to
                None and computed here. Called twice (with finite differences and ``"jvp"`` K more times before that, without autograd),
                with the same random numbers wherever losses are compared. A list of closures: m-SAM, each micro-batch with its own
                reweighted ascent. None: as for :meth:`SAM.step`.
            grad_scaler: scales the losses here; call ``grad_scaler.update()`` afterwards.
            batch, micro_batches: as for :meth:`SAM.step`.

        Raises:
            TypeError, ValueError: as :meth:`SAM.step`; for losses that are not (B,) or whose number m does not divide.
        """
        try:
            scaler = amp.check_scaler(grad_scaler)
            pairs = passes_of(closure, batch, micro_batches, None)
            if pairs is None:
                return self._finish(scaler)
            self._weighing.begin()
            index_of = partial(self._replicas.index_of, count=len(pairs))
            return self._make_step([self._pair(each, index_of(i), scaler) for i, (each, _) in enumerate(pairs)], scaler)
        except BaseException:
            amp.forget_scaler(self)
            raise

    @torch.no_grad()
    def backward(  # type: ignore[override]
        self, closure: Callable[[], Tensor], *, grad_scaler: GradScaler | None = None, micro_batches: int = 1
    ) -> Tensor:
        """As :meth:`SAM.backward`, with a closure as for :meth:`step`: it returns the samples' losses (B,) and calls no ``backward``.

        Adds ∇ mean_i f_i at the perturbed point to ``.grad``; the ascent is reweighted. Returns the mean of the losses of the first pass.
        ``micro_batches``: k, by which the closure divides the losses. β multiplies the norms of the losses themselves.
        """
        scaler = amp.check_scaler(grad_scaler)
        if not callable(closure):
            raise TypeError(f"RWSAM.backward: closure must be a callable, got {describe(closure)}")
        made, k = self._calls_made(), check_count("RWSAM.backward", "micro_batches", micro_batches, low=1)
        if made == 0:
            self._weighing.begin()
        index = self._replicas.index_of_call(made)
        loss: Tensor = self._add_gradient(*self._pair(closure, index, scaler, zeroes=False, share=1.0 / k), scaler, share=1.0 / k)
        return loss

    def _pair(
        self, closure: Callable[[], Tensor], index: int, scaler: GradScaler | None, *, zeroes: bool = True, share: float = 1.0
    ) -> TwoPasses:
        return partial(self._ascent, closure, index, scaler, zeroes, share), partial(self._descent, closure, scaler, zeroes)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the first forward pass of the two-step API, for norms that are exact or those of chosen modules. A whole step::

            with optimizer.recording():
                losses = loss_fn(model(inputs), labels)      # (B,)
            optimizer.weighted_backward(losses)              # .grad is v
            optimizer.first_step(zero_grad=True)
            loss_fn(model(inputs), labels).mean().backward()
            optimizer.second_step(zero_grad=True)

        Raises RuntimeError between the two steps, and for norms along random directions, which need a closure.
        """
        self._require_unperturbed("recording")
        if self._engine is None:
            raise RuntimeError(f"RWSAM.recording: norms={self.reweighting.norms!r} calls a closure several times; use step(closure)")
        self._recorded = plan = self._plan_ahead()
        with self._replicas.without_averaging(), nullcontext() if self._is_plain(plan) else self._engine_for(plan):
            yield

    @torch.no_grad()
    def weighted_backward(self, losses: Tensor, *, grad_scaler: GradScaler | None = None) -> None:  # (B,)
        """Weights the losses of the forward pass under :meth:`recording` and puts their weighted gradient in the place of ``.grad``.

        ``grad_scaler`` scales them; :meth:`first_step` then needs it too (for λ < 1).
        """
        self._require_unperturbed("weighted_backward")
        plan, self._recorded = self._recorded, None
        if plan is None:
            raise RuntimeError("RWSAM.weighted_backward: run the forward pass under recording() first, once for each call")
        self._weighing.begin()
        self.zero_grad()
        with torch.enable_grad(), self._replicas.without_averaging():
            self._backward(self._differentiable(losses), plan, self._replicas.index_of(0, 1), amp.check_scaler(grad_scaler))

    def _ascent(self, closure: Closure, index: int, scaler: GradScaler | None, zeroes: bool, share: float) -> Tensor:
        """Leaves v (scaled, times ``share``) in ``.grad``. Returns the mean loss (times ``share``)."""
        if zeroes:
            self.zero_grad()
        plan = self._passes.plan if self._passes.plan is not None else self._plan_ahead()
        norms, plain = None, self._is_plain(plan)
        if plain or self._directional is None:
            with nullcontext() if plain else self._engine_for(plan):
                losses = self._differentiable(closure())
        else:
            self._guard.save()  # what an exception puts back
            seed = derived_seed(self.reweighting.seed, int(plan.groups[0].t), index, 1)
            state = RandomState(self._devices())
            slopes = self._directional.slopes(lambda: checked_losses(closure(), self.reweighting), plan, self._passes, state, seed)
            losses = self._differentiable(closure())
            norms = self._directional.norms(slopes, losses) / share
        self._backward(losses, plan, index, scaler, norms, share)
        return losses.detach().mean()

    def _descent(self, closure: Closure, scaler: GradScaler | None, zeroes: bool) -> Tensor:
        if zeroes:
            self.zero_grad()
        loss = self._differentiable(closure()).mean()
        _scaled(loss, scaler).backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()

    def _backward(
        self, losses: Tensor, plan: StepPlan, index: int, scaler: GradScaler | None, norms: Tensor | None = None, share: float = 1.0
    ) -> None:
        """v (scaled) into ``.grad``. Norms (B / m,) that are not known are those of the engine that was around the forward pass."""
        m = self.reweighting.micro_batch
        if self._is_plain(plan):
            _scaled(losses.mean(), scaler).backward()  # type: ignore[no-untyped-call]  # as above
            self._weighing.alike(losses)
        elif norms is not None:
            each = (self._weigh(norms, plan, index) / m).repeat_interleave(m)
            torch.autograd.backward(_scaled(losses, scaler), each.to(losses.dtype))
        else:
            assert self._engine is not None
            scaled, scale, over_ranks = _scaled(losses, scaler), amp.scale_of(scaler, share, losses.device), self._ranks is not None
            norms = self._engine(scaled, keep=not over_ranks, retain_graph=over_ranks)
            weights = self._weigh(norms if scale is None else norms / scale, plan, index)
            if over_ranks:  # by a backward pass that averages over ranks
                self._engine.weighted_backward(scaled, weights)
            else:
                self._engine.weighted_grads_(weights)

    @torch.no_grad()
    def _weigh(self, norms: Tensor, plan: StepPlan, index: int) -> Tensor:  # (B / m,)
        return self._weighing.weigh(norms, plan.beta, derived_seed(self.reweighting.seed, int(plan.groups[0].t), index, 0))

    # --- what it was ---

    @property
    def last_norms(self) -> Tensor | None:
        """(B / m,) gradient norms of the rank's samples in the last step that had losses, of its closures one after another, on the
        device; None where none were taken."""
        return torch.cat(self._weighing.norms) if self._weighing.norms else None

    @property
    def last_weights(self) -> Tensor | None:
        """(B / m,) weights p of the rank's samples in the last step that had losses, of its closures one after another, on the device.
        Those of one closure add up to 1; where samples of all ranks are weighted together, those of all ranks do."""
        return torch.cat(self._weighing.weights) if self._weighing.weights else None

    def diagnostics(self) -> dict[str, Tensor]:
        """Of the last step, as 0-dim tensors on the device (reading them waits for it): ``effective_sample_size`` 1 / Σ p², between 1 and
        B / m, ``max_weight``, and where norms were taken ``mean_norm``, ``min_norm``, ``max_norm``. Of several closures: means of each.
        Where samples of all ranks are weighted together, of all of them, without communication.
        """
        return self._weighing.diagnostics()

    def release_buffers(self) -> None:
        """As :meth:`SAM.release_buffers`; the directions of ``"jvp"`` too."""
        super().release_buffers()
        if self._directional is not None:
            self._directional.release()

    # --- parts ---

    def _new_plan(self, *, ahead: bool) -> StepPlan:
        """All groups must have one β. Equal values become one object, so that tensors are compared, which waits for the device, once."""
        key = self._keys["beta"]
        first: Any = self.param_groups[0][key] if self.param_groups else None
        for group in self.param_groups[1:]:
            other = group[key]
            if other is first:
                continue
            if isinstance(first, Tensor) and capturable.is_recording(first.device):
                raise capturable.not_recordable("param_groups hold different tensors for beta, which only an eager step makes one")
            if callable(other) or callable(first) or float(other) != float(first):
                raise ValueError("RWSAM: param_groups have different values of beta; the weights of a batch are those of all parameters")
            group[key] = first
        return super()._new_plan(ahead=ahead)

    def _is_plain(self, plan: StepPlan) -> bool:
        """Whether no norm is needed, without looking at a device: all weights are the same, or nothing ascends."""
        if not plan.ascends:
            return True
        beta = plan.beta
        return self.reweighting.sampling == "weights" and not isinstance(beta, Tensor) and beta == 0

    def _engine_for(self, plan: StepPlan) -> GradNorms:
        """Its norms are over the parameters of groups that participate, and of the chosen modules."""
        assert self._engine is not None
        how = self.reweighting
        counted = [param for group in plan.groups if group.participates for param in group.group["params"]]
        if how.norms != "exact":  # found anew each time: layers may have been replaced, or frozen
            chosen = {id(param) for module in how.modules or chosen_modules(self.model, how.norms) for param in module.parameters()}
            counted = [param for param in counted if id(param) in chosen]
        if not any(param.requires_grad for param in counted):
            raise ValueError(f"RWSAM: norms={how.norms!r}: none of their parameters is trainable and in a group with rho > 0")
        self._engine.over = counted
        return self._engine

    def _differentiable(self, losses: Any) -> Tensor:  # (B,)
        checked = checked_losses(losses, self.reweighting)
        if not checked.requires_grad:
            raise RuntimeError("RWSAM: the losses have no graph: they were detached, or computed under torch.no_grad")
        return checked


def _scaled(losses: Tensor, scaler: GradScaler | None) -> Tensor:
    return losses if scaler is None else scaler.scale(losses)


amp.hide_grad_scaler(RWSAM.step)
