"""Gradient norms of every sample out of one forward and one backward pass, in which no weight's gradient is formed."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn

from sam_kernels._memory_of import is_fake
from sam_kernels._sharding import is_dtensor
from sam_kernels._validate import check_choice, check_count, check_flag, describe
from sam_kernels.per_sample._dots import vectors_of
from sam_kernels.per_sample._gathered import Gathered
from sam_kernels.per_sample._pass import Pass
from sam_kernels.per_sample._recorder import Recorder, refuse_compiled
from sam_kernels.per_sample._verification import Ledger, Verification

__all__ = ["GradNorms"]


class GradNorms:
    r"""The gradient norm of every sample, or micro-batch, of one forward pass::

        engine = GradNorms(model)
        with engine:
            losses = F.cross_entropy(model(inputs), labels, reduction="none")  # (B,)
        norms = engine(losses)                          # (B,), without autograd
        engine.weighted_grads_(norms.softmax(0))        # .grad += sum over b of weight_b times the gradient of sample b

    The backward pass asks for the gradients of the layers' outputs alone: the products with the inputs that make a weight's gradient are
    formed once, by :meth:`weighted_grads_`, or never. Nothing of the model is changed and no hook stays on it. Modules may be shared,
    called several times and nested, parameters tied or frozen, blocks checkpointed (``use_reentrant=False``), the forward pass run under
    autocast. Layers: Linear, Conv and ConvTranspose 1d to 3d, Embedding, EmbeddingBag, LayerNorm, RMSNorm, GroupNorm, InstanceNorm,
    BatchNorm, PReLU, MultiheadAttention and torch's transformers; parameters of others are found in autograd's graph, or by
    :func:`register_rule`. Formulas: docs/per_sample.md.

    Where samples depend on each other (BatchNorm in training) the norm is that of the sample's *contribution*: its terms of the sum that is
    the batch's gradient. Contributions add up to that gradient; they are not the gradients of the sample's own loss.

    Args:
        model: whose trainable parameters the norms are over. The batch is dimension 0 of every layer's input and output, but inside torch's
            transformers, which say themselves where it is, and in the order of the losses: :meth:`verify` checks it for a sample.
        micro_batch: m, the number of consecutive samples whose gradients are added up before the norm is taken.
        reduction: of a micro-batch's gradients: ``"sum"`` or ``"mean"``. Also that of its loss in :meth:`weighted_grads_`.
        unsupported: how the gradients of a module that owns trainable parameters and has no rule are found. ``"error"``: in autograd's
            graph, which has an error for operations that no rule is known for; ``"verify"``: likewise, and the first batch of each kind
            (docs/per_sample.md) is compared with a backward pass for each sample; ``"vmap"``: its part is computed by ``torch.func``,
            slowly, with every sample's gradient in memory. Every tensor it is called with whose dimension 0 is B is then taken for a
            batch; that this gives the module's output again is checked.
        over: parameters that the norms are over; None: all trainable ones of the model. Weighted gradients are of all of them. An
            attribute too, which may be changed between forward passes.
        batch_first: False for a model whose batch is dimension 1, and dimension 0 of outputs of two dimensions (behind a mean over time).

    Memory: with ``keep=True`` (see :meth:`__call__`) the inputs of layers, which autograd holds anyway, and the gradients of their outputs
    stay until :meth:`weighted_grads_`; without, a layer's are dropped as soon as its norm is known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_batch: int = 1,
        reduction: str = "sum",
        unsupported: str = "error",
        over: Iterable[Tensor] | None = None,
        batch_first: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradNorms: model must be a torch.nn.Module, got {describe(model)}")
        if isinstance(micro_batch, bool) or not isinstance(micro_batch, int):
            raise TypeError(f"GradNorms: micro_batch must be an integer, got {describe(micro_batch)}")
        if micro_batch < 1:
            raise ValueError(f"GradNorms: micro_batch must be at least 1, got {micro_batch}")
        self.micro_batch = micro_batch
        self.reduction = check_choice("GradNorms", "reduction", reduction, ("sum", "mean"))
        check_choice("GradNorms", "unsupported", unsupported, ("error", "verify", "vmap"))
        check_flag("GradNorms", "batch_first", batch_first)
        for name, module in model.named_modules():
            refuse_compiled(name, module)
        self.over = over
        _require_owned(self.over, model)
        self._recorder = Recorder(model, batch_first=batch_first, unsupported=unsupported)
        self._gathered: Gathered | None = None
        self._verified = Verification() if unsupported == "verify" else None
        self._checked: set[Hashable] = set()  # signatures of calls whose rows are known to be the losses'
        self._last: tuple[weakref.ref[Tensor], Tensor, bool] | None = None  # losses, norms, whether checkpoints run again

    @property
    def over(self) -> Collection[Tensor] | None:
        """The parameters that the norms are over; None: all trainable ones."""
        return None if self._over is None else self._over.values()

    @over.setter
    def over(self, params: Iterable[Tensor] | None) -> None:
        self._over = None if params is None else {id(param): param for param in ([params] if isinstance(params, Tensor) else params)}

    def __enter__(self) -> GradNorms:
        if self._recorder.is_on:
            raise RuntimeError("GradNorms: this engine is already around a forward pass; use one engine for each")
        self._gathered = self._last = None
        self._recorder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._recorder.stop()
        if error is not None:
            self._recorder.calls = []

    def __call__(
        self,
        losses: Tensor,  # (B,)
        *,
        keep: bool = True,
        backward: bool = False,
        retain_graph: bool = False,
    ) -> Tensor:  # (B / m,) float32, float64 for float64 losses
        """Norms of the gradients of the losses of the forward pass before, over all trainable parameters of the model.

        ``keep``: whether :meth:`weighted_grads_` may follow. ``backward``: norms beside an ordinary ``losses.sum().backward()``: autograd
        itself puts the batch's gradient into ``.grad``, the same bits as without norms, and hooks on parameters (DistributedDataParallel)
        run; nothing is kept then. (For the mean's gradient: ``norms = engine(losses / B, backward=True) * B``.)
        ``retain_graph``: as ``torch.autograd.grad``; an ordinary backward pass may then follow, but not through checkpoints, which would
        save less when they run again than they did under the engine.

        Calls of layers whose outputs get no gradient (a detached branch, an unused head, ``torch.no_grad``) add nothing.

        Raises RuntimeError where there is no forward pass to differentiate, it has been used already, the losses read a parameter past its
        layer (``F.linear(x, embedding.weight)``, a penalty on weights), a custom function hides a layer's gradient, or with
        ``unsupported="verify"`` a parameter's gradients are not those of backward passes; ValueError for
        losses that are not one-dimensional, whose number m does not divide, or that are not in the order of the batch, and where a layer's
        output has another batch; NotImplementedError where a rule does not cover a module.
        """
        self._check(losses)
        keep = keep and not backward
        if self._over is not None and not any(id(param) in self._over for _, param in self._recorder.params):
            raise ValueError("GradNorms: over holds no trainable parameter of the model")
        found = Pass(losses, self._recorder)
        m = losses.shape[0] // self.micro_batch
        if self._verified is not None and self._verified.is_due(losses, found.calls):
            gathered: Gathered = self._run_verified(losses, found, m)
            if backward:
                with found.again():
                    torch.autograd.backward(losses, torch.ones_like(losses), retain_graph=retain_graph)
        else:
            gathered = Gathered(found.calls, losses.shape[0], m, losses.device, keep=keep, over=self._over)
            found.run(gathered, self._checked, keep=keep, ordinary=backward, retain_graph=retain_graph)
        self._gathered = gathered if keep else None
        norms = gathered.square_norms().clamp_(min=0.0).sqrt_()
        if self.reduction == "mean" and self.micro_batch > 1:
            norms /= self.micro_batch
        norms = norms.to(torch.float64 if losses.dtype is torch.float64 else torch.float32)
        self._last = weakref.ref(losses), norms, found.recomputes
        return norms

    def _run_verified(self, losses: Tensor, found: Pass, m: int) -> Ledger:
        assert self._verified is not None
        ledger = Ledger(found.calls, losses.shape[0], m, losses.device, keep=True, over=self._over)
        found.run(ledger, self._checked, keep=True, ordinary=False, retain_graph=True)
        with found.again(), torch.autocast(losses.device.type, enabled=False):
            self._verified.check(losses, found.calls, self._recorder.params, ledger)
        return ledger

    def verify(
        self,
        losses: Tensor,  # (B,)
        i: int,
        *,
        retain_graph: bool = False,
    ) -> tuple[Tensor, Tensor]:  # (), ()
        """Return the norm of sample (or micro-batch) i, and the norm that a backward pass of its own loss gives.

        The two agree, to rounding, where ``losses[i]`` depends on row i of the batch alone. They differ for a batch that is put into
        another order inside the model, which no shape shows, for losses of several samples together, and under BatchNorm in training.
        The second norm is over the parameters of ``over`` too.

        Calls the engine first unless it has been called with these ``losses`` and ``retain_graph=True``; :meth:`weighted_grads_` may
        follow. Costs a backward pass more. ``retain_graph``: as ``torch.autograd.grad``.

        Raises what calling the engine raises; TypeError or ValueError where i is no number of a sample; RuntimeError for a freed graph.
        """
        is_new = self._last is None or self._last[0]() is not losses
        if is_new:
            self._check(losses)
        i = check_count("GradNorms.verify", "i", i, low=0, high=len(losses) // self.micro_batch - 1)
        if is_new:
            self(losses, retain_graph=True)
        assert self._last is not None
        _, norms, recomputes = self._last
        group = losses[i * self.micro_batch : (i + 1) * self.micro_batch]
        loss = group.mean() if self.reduction == "mean" else group.sum()
        params = [param for param in self._recorder.model.parameters() if param.requires_grad]
        if self._over is not None:
            params = [param for param in params if id(param) in self._over]
        try:
            with self._recorder.replaying() if recomputes else nullcontext():
                grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError("GradNorms.verify: the graph of losses is gone; call the engine with retain_graph=True before") from error
        squares = [grad.to(losses.device, torch.float64).square().sum() for grad in grads if grad is not None]
        own = torch.stack(squares).sum().sqrt() if squares else norms.new_zeros(())
        return norms[i], own.to(norms.dtype)

    @torch.no_grad()
    def weighted_grads_(self, weights: Tensor | None = None) -> None:  # (B / m,)
        """Adds the sum of weight times gradient over the micro-batches to the parameters' ``.grad``, without another backward pass.

        A micro-batch's gradient is that of the sum (``reduction="mean"``: the mean) of its losses. None is a weight of 1 for each: with
        ``reduction="sum"`` what ``losses.sum().backward()`` does, to rounding, and nothing is multiplied. Frees what the engine kept.

        Raises RuntimeError where there is nothing kept, TypeError or ValueError for weights that are not a floating-point tensor (B / m,),
        TypeError for parameters that are shards, whose gradients :meth:`weighted_backward` makes.
        """
        if self._gathered is None:
            raise RuntimeError("GradNorms.weighted_grads_: call the engine with losses first, with keep=True; what it keeps is used once")
        for name, param in self._recorder.params:
            if is_dtensor(param):
                raise TypeError(f"GradNorms.weighted_grads_: parameter {name} is a DTensor; use weighted_backward(losses, weights)")
        m, device = self._gathered.m, self._gathered.device
        if weights is not None:
            _check_weights("weighted_grads_", weights, m)
        if self.reduction == "mean" and self.micro_batch > 1:
            weights = (torch.ones(m, device=device) if weights is None else weights) / self.micro_batch
        can_be_read = weights is not None and weights.is_cpu and not is_fake(weights)  # those of a device: only by waiting for it
        if weights is not None and can_be_read and bool((weights == 1).all()):
            weights = None
        gathered, self._gathered = self._gathered, None
        with torch.autocast(device.type, enabled=False):
            gathered.add_weighted_grads(weights)

    @torch.no_grad()
    def dots(self, vectors: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:  # (B / m,)
        """Return ⟨∇f_i, v⟩ for every sample (or micro-batch) i, from the tensors that the norms were made of.

        What data selection asks for (In-Run Data Shapley, arXiv 2406.11011; GREATS, NeurIPS 2024): with v the gradient of validation data,
        how much a step along a sample's gradient would lower their loss.

        Args:
            vectors: v, a tensor for each trainable parameter, of its shape: a list in the order of ``model.named_parameters()``, or a
                dictionary by those names, in which parameters may be missing: they count as zero.

        Call it after the engine, with ``keep=True``, and before :meth:`weighted_grads_`; as often as wanted. Costs about a forward pass,
        and no backward pass. Returns float32, float64 for float64 losses.

        Raises RuntimeError where nothing is kept; TypeError or ValueError for vectors that do not fit the parameters.
        """
        if self._gathered is None or self._last is None:
            raise RuntimeError("GradNorms.dots: call the engine with losses first, with keep=True, and dots before weighted_grads_")
        found = self._gathered.dots(vectors_of(vectors, self._recorder.model))
        if self.reduction == "mean" and self.micro_batch > 1:
            found /= self.micro_batch
        return found.to(self._last[1].dtype)

    def weighted_backward(
        self,
        losses: Tensor,  # (B,)
        weights: Tensor,  # (B / m,)
    ) -> None:
        """As :meth:`weighted_grads_`, by an ordinary backward pass: hooks on parameters run, so that DistributedDataParallel averages
        the gradient and ``fully_shard`` reduces it to the rank's parts. Costs that pass. Call the engine with ``keep=False,
        retain_graph=True`` before.

        Raises RuntimeError unless the engine was called last with these losses, and where their graph is gone; TypeError or ValueError for
        weights that are not a floating-point tensor (B / m,).
        """
        if self._last is None or self._last[0]() is not losses:
            raise RuntimeError("GradNorms.weighted_backward: call the engine with these losses first, with retain_graph=True")
        _check_weights("weighted_backward", weights, len(losses) // self.micro_batch)
        each = weights.detach().to(losses.device).repeat_interleave(self.micro_batch)
        if self.reduction == "mean":
            each = each / self.micro_batch
        with self._recorder.replaying() if self._last[2] else nullcontext():  # checkpoints save what they saved under the engine
            torch.autograd.backward(losses, each.to(losses.dtype))

    def _check(self, losses: object) -> None:
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"GradNorms: losses must be a floating-point tensor, got {describe(losses)}")
        if losses.dim() != 1 or losses.numel() == 0:
            raise ValueError(
                f"GradNorms: losses must have shape (B,), one for each sample, got {tuple(losses.shape)}; use reduction='none' and "
                "add up, or average, over everything but the batch"
            )
        if len(losses) % self.micro_batch:
            raise ValueError(f"GradNorms: {len(losses)} losses cannot be cut into micro-batches of {self.micro_batch}")
        if losses.grad_fn is None:
            raise RuntimeError("GradNorms: losses have no graph: they were detached, or computed under torch.no_grad")
        if not self._recorder.calls and not self._recorder.loose:
            raise RuntimeError(
                "GradNorms: no call of a layer with trainable parameters was seen: run the forward pass inside `with engine:`, "
                "once for each call of the engine"
            )


def _require_owned(over: Iterable[object] | None, model: nn.Module) -> None:
    known = set(map(id, model.parameters()))
    for i, param in enumerate(over or ()):
        if not isinstance(param, Tensor):
            raise TypeError(f"GradNorms: over[{i}] must be a parameter of the model, got {describe(param)}")
        if id(param) not in known:
            raise ValueError(f"GradNorms: over[{i}], {describe(param)}, is no parameter of the model")


def _check_weights(method: str, weights: object, m: int) -> None:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"GradNorms.{method}: weights must be a floating-point tensor, got {describe(weights)}")
    if weights.shape != (m,):
        raise ValueError(f"GradNorms.{method}: weights must have shape ({m},), got {tuple(weights.shape)}")
