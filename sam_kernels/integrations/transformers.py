"""Hugging Face's ``Trainer`` with SAM: :class:`SAMTrainer`, or :class:`SAMMixin` before another subclass of ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from sam_kernels._validate import describe
from sam_kernels.integrations._found import find_sam
from sam_kernels.integrations.accelerate import check_plugins
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["SAMMixin", "SAMTrainer"]

_ASCENTS = ("micro_batch", "batch")


class SAMMixin:
    """Trains by sharpness-aware minimization: ``class MyTrainer(SAMMixin, SFTTrainer)``, then ``MyTrainer(..., sam=dict(rho=0.05))``.

    Every ``training_step`` of the trainer, forward and backward pass, is run twice: at the weights, and at the perturbed point, whose
    gradient goes into ``.grad`` (:meth:`sam_kernels.SAM.backward`). Loss, label smoothing, mixed precision, accumulation, clipping
    (``max_grad_norm`` clips the second gradient alone), schedulers, logging and checkpoints stay the trainer's. The loss that is logged is
    the one at the weights.

    Args:
        sam: options of :class:`sam_kernels.SAM` (``rho``, ``lambd``, ``adaptive``, …), which is put around the optimizer that the trainer
            makes. With ``beta`` it is :class:`sam_kernels.RWSAM`, whose losses of samples come from :meth:`compute_sample_losses`.
            ``ascent``: what a perturbation is made from. ``"micro_batch"`` (the default): with accumulation each micro-batch has its own,
            which is m-SAM (arXiv 2509.18001). ``"batch"``: the whole accumulated batch has one, which is SAM on the large batch; on one
            process. None: SAM's defaults, unless ``optimizers=(sam_optimizer, scheduler)`` or ``create_optimizer`` has an optimizer of SAM.

    Raises:
        TypeError, ValueError: for options that are none, for DeepSpeed and FSDP version 1 (which update their own copies of the weights).
        RuntimeError: when training begins with an optimizer that is not SAM's.
    """

    def __init__(self, *args: Any, sam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(sam or {})
        self._ascent = options.pop("ascent", "micro_batch")
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
        this: Any = self
        trainer: Any = super()
        sam, scaler = find_sam(this.optimizer), this.accelerator.scaler
        if sam is None:
            raise RuntimeError(
                f"SAMTrainer: the optimizer is {describe(this.optimizer)}; give options, {type(self).__name__}(..., sam=dict(rho=0.05)), "
                "or optimizers=(SAM(model.parameters(), torch.optim.AdamW, lr=...), None)"
            )
        if isinstance(sam, RWSAM):
            return self._reweighted_step(sam, model, inputs)
        if self._ascent == "micro_batch":
            loss: Tensor = sam.backward(lambda: trainer.training_step(model, inputs, *args, **kwargs), grad_scaler=scaler)
            return loss
        if not self._first_losses:
            with torch.enable_grad():
                self._first_losses = [trainer.training_step(model, dict(each), *args, **kwargs) for each in self._micro_batches]
            sam.first_step(zero_grad=True, grad_scaler=scaler)
            self._micro_batches = ()
        trainer.training_step(model, inputs, *args, **kwargs)
        return self._first_losses.pop(0)

    def _reweighted_step(self, sam: RWSAM, model: nn.Module, inputs: Any) -> Tensor:
        this: Any = self
        model.train()
        inputs = this._prepare_inputs(inputs)
        steps: int = this.args.gradient_accumulation_steps

        def closure() -> Tensor:
            with this.compute_loss_context_manager():
                losses = self.compute_sample_losses(model, inputs)
            if not isinstance(losses, Tensor) or losses.dim() != 1:
                raise TypeError(
                    f"SAMTrainer: compute_sample_losses must return the samples' losses, shape (B,), got {describe(losses)}; use "
                    "reduction='none', and the mean over everything but the batch"
                )
            return losses / steps

        mean: Tensor = sam.backward(closure, grad_scaler=this.accelerator.scaler)
        detached: Tensor = mean.detach()
        return detached

    def compute_sample_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:  # (B,)
        """The loss of every sample, for RW-SAM: cross-entropy of a classifier, or of a causal language model, averaged over its tokens.

        Override it for other models. Raises NotImplementedError where neither is recognised.
        """
        labels = inputs["labels"]
        logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        if labels.dim() == 1 and logits.dim() == 2:
            losses: Tensor = F.cross_entropy(logits, labels, reduction="none")
            return losses
        inner = getattr(model, "module", model)
        get_base: Any = getattr(inner, "get_base_model", None)  # peft's
        name = type(inner if get_base is None else get_base()).__name__
        if labels.dim() == 2 and logits.dim() == 3 and ("CausalLM" in name or "LMHead" in name):
            labels = labels[:, 1:]
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
            means: Tensor = losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
            return means
        raise NotImplementedError(
            f"SAMTrainer: the samples' losses of {name} are not known here; override it:\n"
            "    def compute_sample_losses(self, model, inputs):\n"
            "        return F.cross_entropy(model(**inputs).logits, inputs['labels'], reduction='none')  # (B,)"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, with SAM's radius and its skipped steps in training."""
        sam = find_sam(getattr(self, "optimizer", None))
        if sam is not None and "loss" in logs:
            rho = sam.param_groups[0][sam._keys["rho"]]
            extra = {"sam_skipped_steps": float(sam.skipped_steps)}
            if isinstance(rho, int | float):
                extra["sam_rho"] = float(rho)
            logs = {**logs, **extra}
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)


class SAMTrainer(SAMMixin, Trainer):  # type: ignore[misc]  # Any where transformers is not installed
    """``transformers.Trainer`` with SAM: ``SAMTrainer(model, args, train_dataset=..., sam=dict(rho=0.05))``. See :class:`SAMMixin`."""
