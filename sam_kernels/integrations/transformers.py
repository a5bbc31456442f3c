"""Hugging Face's ``Trainer`` with SAM: :class:`SAMTrainer`, or :class:`SAMMixin` before another subclass of ``Trainer``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from sam_kernels._validate import check_flag, describe
from sam_kernels.integrations._found import find_sam
from sam_kernels.integrations.accelerate import AcceleratedSAM, check_fsdp, check_plugins, prepare_sam
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["SAMMixin", "SAMTrainer"]

_ASCENTS = ("micro_batch", "batch")
_OVERRIDE = """override compute_sample_losses:
    def compute_sample_losses(self, model, inputs):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels, reduction="none")  # (B,)"""


class SAMMixin:
    """Trains by sharpness-aware minimization: ``class MyTrainer(SAMMixin, SFTTrainer)``, then ``MyTrainer(..., sam=dict(rho=0.05))``.

    Every ``training_step`` of the trainer, forward and backward pass, is run twice: at the weights, and at the perturbed point, whose
    gradient goes into ``.grad`` (:meth:`sam_kernels.SAM.backward`). Loss, label smoothing, mixed precision, accumulation, clipping
    (``max_grad_norm`` clips the second gradient alone), schedulers, logging and checkpoints stay the trainer's. The loss that is logged is
    the one at the weights. Each run has a shallow copy of the inputs. :attr:`is_second_pass` tells a ``compute_loss`` which run it is in.

    With several processes (DDP) the step is that of one process with the batches of all: a perturbation is made from the gradient that is
    averaged over the processes.

    Args:
        sam: options of :class:`sam_kernels.SAM` (``rho``, ``lambd``, ``adaptive``, …), which is put around the optimizer that the trainer
            makes. With ``beta`` it is :class:`sam_kernels.RWSAM`, whose losses of samples come from :meth:`compute_sample_losses`.
            ``ascent``: what a perturbation is made from. ``"micro_batch"`` (the default): with accumulation each micro-batch, of all
            processes, has its own, which is m-SAM (arXiv 2509.18001). ``"batch"``: the whole accumulated batch has one, which is SAM on the
            large batch; on one process. ``local_ascent``: with several processes each perturbs by the gradient of its own micro-batch,
            m-SAM over processes, with one all-reduce a step; False unless given. None: SAM's defaults, unless
            ``optimizers=(sam_optimizer, scheduler)`` or ``create_optimizer`` has an optimizer of SAM.

    Raises:
        TypeError, ValueError: for options that are none, for DeepSpeed and FSDP version 1 (which update their own copies of the weights);
            for a loss of one's own beside ``beta``, without :meth:`compute_sample_losses`.
        RuntimeError: when training begins with an optimizer that is not SAM's; for a ``training_step`` of one's own that does not call
            the one here.
    """

    def __init__(self, *args: Any, sam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(sam or {})
        self._ascent = options.pop("ascent", "micro_batch")
        self._local_ascent = check_flag("SAMTrainer", "local_ascent", options.pop("local_ascent", False))
        if self._ascent not in _ASCENTS:
            raise ValueError(f"SAMTrainer: sam['ascent'] must be one of {', '.join(map(repr, _ASCENTS))}, got {self._ascent!r}")
        if self._ascent == "batch" and "beta" in options:
            raise ValueError("SAMTrainer: ascent='batch' is SAM's; RWSAM (beta) weights each micro-batch's samples: leave one of them out")
        self._sam_options = options
        self._micro_batches: Sequence[Any] = ()
        self._first_losses: list[Tensor] = []
        super().__init__(*args, **kwargs)
        self._check_plugins()

    def _check_plugins(self) -> None:
        trainer: Any = self
        check_plugins(trainer.accelerator, "SAMTrainer")
        if self._ascent == "batch" and trainer.args.world_size > 1:
            raise ValueError(
                "SAMTrainer: ascent='batch' accumulates the first gradients of all micro-batches on one process; leave it out (m-SAM over "
                "micro-batches), or use gradient_accumulation_steps=1, with which every step has one perturbation anyway"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """The trainer's; its ``accelerator`` then prepares an optimizer of SAM as :class:`~.accelerate.Accelerator` does."""
        trainer: Any = super()
        this: Any = self
        check_fsdp((getattr(this.args, "fsdp_plugin_args", None) or {}).get("fsdp_version", 2), "SAMTrainer")
        trainer.create_accelerator_and_postprocess()
        accelerator = this.accelerator
        accelerator.prepare_optimizer = partial(prepare_sam, accelerator, accelerator.prepare_optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's optimizer, with SAM around it unless it has SAM in it."""
        trainer: Any = super()
        made = trainer.create_optimizer(*args, **kwargs)
        this: Any = self
        if find_sam(made) is not None:
            return made
        options = dict(self._sam_options)
        if "beta" in options:
            this.optimizer = RWSAM(this.model, made, params=made.param_groups, **options)
        else:
            options.setdefault("model", this.model)
            this.optimizer = SAM(made.param_groups, made, **options)
        return this.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; remembered for ``ascent="batch"``."""
        trainer: Any = super()
        found = trainer.get_batch_samples(*args, **kwargs)
        self._micro_batches, self._first_losses = list(found[0]), []
        return found

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's, twice. Returns the loss at the weights."""
        trainer: Any = super()
        optimizer = self._accelerated()
        sam = optimizer.optimizer
        optimizer.local_ascent = self._local_ascent
        optimizer.follow([model])
        if isinstance(sam, RWSAM):
            return self._reweighted_step(optimizer, model, inputs)
        if self._ascent == "micro_batch":

            def closure() -> Any:
                return trainer.training_step(model, copy.copy(inputs), *args, **kwargs)

            loss: Tensor = optimizer.add_gradient(closure, micro_batches=self._accumulates)
            return loss
        if not self._first_losses:
            with torch.enable_grad():
                self._first_losses = [trainer.training_step(model, copy.copy(each), *args, **kwargs) for each in self._micro_batches]
            sam.first_step(zero_grad=True, grad_scaler=optimizer.scaler)
            self._micro_batches = ()
        trainer.training_step(model, copy.copy(inputs), *args, **kwargs)
        return self._first_losses.pop(0)

    @property
    def is_second_pass(self) -> bool:
        """Whether the weights are perturbed: in ``compute_loss``, whether it is called for the second time. Log in the first."""
        sam = find_sam(getattr(self, "optimizer", None))
        return sam is not None and sam._passes.is_perturbed

    @property
    def _accumulates(self) -> int:
        """Micro-batches of this step, fewer at the end of an epoch."""
        return int(getattr(self, "current_gradient_accumulation_steps", 1))

    def _accelerated(self) -> AcceleratedSAM:
        optimizer: Any = getattr(self, "optimizer", None)
        if isinstance(optimizer, AcceleratedSAM):
            return optimizer
        raise RuntimeError(
            f"SAMTrainer: the optimizer is {describe(optimizer)}; give options, {type(self).__name__}(..., sam=dict(rho=0.05)), "
            "or optimizers=(SAM(model.parameters(), torch.optim.AdamW, lr=...), None)"
        )

    def _reweighted_step(self, optimizer: AcceleratedSAM, model: nn.Module, inputs: Any) -> Tensor:
        this: Any = self
        self._check_losses(model)
        model.train()
        optimizer.train()
        inputs = this._prepare_inputs(inputs)
        k = self._accumulates

        def closure() -> Tensor:
            with this.compute_loss_context_manager():
                losses = self.compute_sample_losses(model, copy.copy(inputs))
            if not isinstance(losses, Tensor) or losses.dim() != 1:
                raise TypeError(
                    f"SAMTrainer: compute_sample_losses must return the samples' losses, shape (B,), got {describe(losses)}; use "
                    "reduction='none', and the mean over everything but the batch"
                )
            return losses / k

        mean: Tensor = optimizer.add_gradient(closure, micro_batches=k)
        return mean.detach()

    def _check_losses(self, model: nn.Module) -> None:
        """A loss, or a step, of the user's own must not be passed over."""
        usual: Any = Trainer
        this, inner, kind = cast(Any, self), cast(Any, super()), type(self).__name__
        if inner.training_step.__func__ is not usual.training_step:
            name = inner.training_step.__func__.__qualname__
            raise TypeError(f"SAMTrainer: beta (RWSAM) makes a step of its own, without {name}; use SAM: leave beta out")
        if isinstance(model, nn.DataParallel):
            raise ValueError("SAMTrainer: beta (RWSAM) with DataParallel takes no norms of samples; start a process for each GPU: torchrun")
        if type(self).compute_sample_losses is not SAMMixin.compute_sample_losses:
            return
        if type(this).compute_loss is not usual.compute_loss or this.compute_loss_func is not None:
            name = "compute_loss_func" if this.compute_loss_func is not None else f"{kind}.compute_loss"
            raise TypeError(f"SAMTrainer: beta (RWSAM) needs the losses of samples, and {name} returns one number; {_OVERRIDE}")

    def compute_sample_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:  # (B,)
        """The loss of every sample, for RW-SAM: cross-entropy of a classifier, or of a causal language model, averaged over its tokens.
        With ``label_smoothing_factor``.

        Override it for other models. Raises NotImplementedError where neither is recognised.
        """
        labels, this = inputs["labels"], cast(Any, self)
        smoothing: float = this.args.label_smoothing_factor
        logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        if labels.dim() == 1 and logits.dim() == 2:
            losses: Tensor = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            return losses
        inner = getattr(model, "module", model)
        get_base: Any = getattr(inner, "get_base_model", None)  # peft's
        name = type(inner if get_base is None else get_base()).__name__
        if labels.dim() == 2 and logits.dim() == 3 and ("CausalLM" in name or "LMHead" in name):
            labels = labels[:, 1:]
            logits = logits[:, :-1].transpose(1, 2)
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100, label_smoothing=smoothing)
            means: Tensor = losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
            return means
        raise NotImplementedError(f"SAMTrainer: the samples' losses of {name} are not known here; {_OVERRIDE}")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, with SAM's radius and its skipped steps in training, and what :meth:`sam_kernels.RWSAM.diagnostics` has."""
        sam = find_sam(getattr(self, "optimizer", None))
        if sam is not None and "loss" in logs:
            rho = sam.param_groups[0][sam._keys["rho"]]
            extra = {"sam_skipped_steps": float(sam.skipped_steps)}
            if isinstance(rho, int | float):
                extra["sam_rho"] = float(rho)
            if isinstance(sam, RWSAM):
                extra.update({f"sam_{name}": value.item() for name, value in sam.diagnostics().items()})
            logs = {**logs, **extra}
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)


class SAMTrainer(SAMMixin, Trainer):  # type: ignore[misc]  # Any where transformers is not installed
    """``transformers.Trainer`` with SAM: ``SAMTrainer(model, args, train_dataset=..., sam=dict(rho=0.05))``. See :class:`SAMMixin`."""
