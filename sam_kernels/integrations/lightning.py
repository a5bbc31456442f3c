"""PyTorch Lightning with SAM: a callback for automatic optimization, and the SAM optimizer inside of Lightning's and Fabric's wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sam_kernels._validate import check_count, describe
from sam_kernels.integrations._found import find_sam
from sam_kernels.optim._base.imitations import check_strategy, made_by_closure, replaced
from sam_kernels.optim._batches.closures import split_batch
from sam_kernels.optim._engine import amp
from sam_kernels.optim._engine.replay import RandomState
from sam_kernels.optim._part import FirstGradient, Use
from sam_kernels.optim._replicas.replicas import replicated_modules
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["SAMCallback", "is_second_pass", "sam_of"]

_MANUALLY = "optimize manually: self.automatic_optimization = False, and self.optimizers().step(closure) in training_step"


def sam_of(optimizer: Any) -> SAM:
    """The SAM optimizer inside of Lightning's (``self.optimizers()``) or Fabric's (``fabric.setup``) wrapper.

    The wrappers have SAM's methods themselves. Call ``step`` and ``second_step`` on the wrapper: Lightning counts them as ``global_step``.

    Raises TypeError where there is none.
    """
    found = find_sam(optimizer)
    if found is None:
        raise TypeError(f"sam_of: {type(optimizer).__name__} holds no optimizer of SAM")
    return found


def is_second_pass(module: Any) -> bool:
    """Whether ``training_step`` of the LightningModule is running at the perturbed weights, under :class:`SAMCallback`.

    ``self.log`` and ``self.log_dict`` do nothing then. Ask before anything else that must happen once for a batch::

        def training_step(self, batch, batch_idx):
            logits = self.model(batch[0])
            if not is_second_pass(self):
                self.accuracy.update(logits, batch[1])     # a metric of torchmetrics
    """
    trainer = getattr(module, "_trainer", None)
    callbacks = () if trainer is None else trainer.callbacks
    return any(isinstance(each, SAMCallback) and each.is_second_pass for each in callbacks)


class SAMCallback(Callback):  # type: ignore[misc]  # Any where lightning is not installed
    """Trains a module whose ``configure_optimizers`` returns SAM: ``Trainer(callbacks=[SAMCallback()], ...)``.

    Every ``training_step`` runs twice: at the weights, and at the perturbed point, whose gradient goes into ``.grad``
    (:meth:`sam_kernels.SAM.backward`). All else is Lightning's. With ``accumulate_grad_batches`` each batch has its own perturbation: m-SAM
    (arXiv 2509.18001), whose first passes use the batch's whole loss, and whose second passes its share. ``gradient_clip_val`` clips the
    second gradient alone. Hooks are called once, and ``self.log`` does nothing in the second pass (:func:`is_second_pass`). A step with
    ``GradScaler`` whose gradients are not finite is skipped and counted by both.

    With ``strategy="ddp"`` a perturbation is made from the gradient of all ranks, also while gradients are accumulated: the first pass of
    each batch is averaged (k + 1 all-reduces for k batches), and the step is that of one process whose batches are those of all ranks.
    With ``SAM(self.parameters(), ..., model=self.trainer.model, local_ascent=True)`` each rank perturbs by its own gradient (1 all-reduce).

    Args:
        micro_batches: m-SAM inside of a batch: ``training_step`` gets one of this many equal pieces of it at a time, and returns the mean
            loss of the piece and nothing else. ``self.log`` is called for each piece. The loss in ``outputs`` is the mean of the pieces'.

    Raises:
        TypeError, ValueError: for ``micro_batches`` that is no positive integer; for a batch that cannot be cut.
        RuntimeError: when training begins: with manual optimization, with several optimizers, with an optimizer that is not SAM's, for
            RWSAM, LookSAM, SAMSPS, MomentumSAM, S2SAM, RSAM and ``freeze_unperturbed`` (optimize manually), under DeepSpeed or FSDP. In
            training: for ``training_step(dataloader_iter)``, and for a DDP module with ``static_graph=True`` whose passes differ.
    """

    def __init__(self, micro_batches: int = 1) -> None:
        super().__init__()
        self.micro_batches = check_count("SAMCallback", "micro_batches", micro_batches, low=1)
        self.is_second_pass = False
        self._fit: _Fit | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the place of functions of the module and the strategy for as long as the fit takes."""
        self._end()
        self._fit = _Fit(self, _checked(trainer, pl_module), trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Makes the loss in ``outputs`` that of all micro-batches, for the callbacks that follow and for the module."""
        if self._fit is not None and self.micro_batches > 1 and isinstance(outputs, dict) and "loss" in outputs:
            outputs["loss"] = torch.stack(self._fit.losses).sum()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives module and strategy their functions back."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As :meth:`on_fit_end`."""
        self._end()

    def _end(self) -> None:
        fit, self._fit, self.is_second_pass = self._fit, None, False
        if fit is not None:
            fit.end()


class _Fit:
    """One fit: what is in the place of ``strategy.training_step`` and of the module's ``backward``, ``optimizer_step`` and
    ``clip_gradients``, and the batch that is trained on."""

    def __init__(self, callback: SAMCallback, sam: SAM, trainer: Any, module: Any) -> None:
        self._callback, self._sam, self._trainer, self._module = callback, sam, trainer, module
        self._replicas = replicated_modules(trainer.strategy.model)
        self._calls: list[Callable[[], Any]] = []  # training_step, of each micro-batch of the batch
        self._random_state: RandomState | None = None  # before the first of them
        self.losses: list[Tensor] = []  # () each, the shares of the micro-batches in the batch's loss
        self._usual_training_step = trainer.strategy.training_step
        self._usual_backward, self._usual_optimizer_step = module.backward, module.optimizer_step
        self._usual_clip_gradients = module.clip_gradients
        self._stack = ExitStack()
        self._stack.enter_context(replaced(trainer.strategy, "training_step", self._training_step))
        self._stack.enter_context(replaced(module, "backward", self._backward))
        self._stack.enter_context(replaced(module, "optimizer_step", self._optimizer_step))
        self._stack.enter_context(replaced(module, "clip_gradients", self._clip_gradients))

    def end(self) -> None:
        self._stack.close()

    @property
    def _scaler(self) -> Any:
        return getattr(self._trainer.precision_plugin, "scaler", None)

    # --- the passes ---

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The first pass of the batch, or of its first micro-batch."""
        if isinstance(batch, Iterator):
            raise RuntimeError(
                "SAMCallback: training_step(dataloader_iter) would take another batch for the second pass; write "
                "training_step(self, batch, batch_idx)"
            )
        count = self._callback.micro_batches
        pieces = [batch] if count == 1 else [piece for (piece,) in split_batch([batch], count)]
        self._calls = [partial(self._usual_training_step, piece, *args, **kwargs) for piece in pieces]
        self._random_state = RandomState(self._sam._devices()) if self._sam.preserve_rng_state else None
        with self._averaged(not self._sam._replicas.ascends_locally):
            return self._only_loss(self._calls[0]())

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In the place of the module's, once for each batch."""
        self.losses = []
        count = len(self._calls)

        def backward(loss: Tensor) -> None:
            self._usual_backward(loss, *args, **kwargs)

        for i in range(count):
            first = [] if i > 0 else [loss] if count == 1 else [loss / count]
            self._sam.backward(self._closure(i, first, backward), grad_scaler=self._scaler)
        self._calls = []

    def _closure(self, i: int, first: list[Tensor], backward: Callable[[Tensor], None]) -> Callable[[], Tensor]:
        """Both passes of micro-batch i. ``first``: the loss of the first pass, where that has been made."""
        share: int = self._trainer.accumulate_grad_batches * len(self._calls)  # 1 / share of the loss is added up
        # A perturbation of m-SAM is that of the micro-batch's own loss. Rules that step along both gradients need one scale for both.
        ascends_along_share = self._sam.descent.rewrites or not self._sam._plan_ahead().ascends
        passes = 0

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            if passes > 1:
                with self._second_pass():
                    loss = self._scaled(self._loss_at_perturbed_weights(i) / share)
                    backward(loss)
                return self._unscaled(loss) * share
            loss = first.pop() if first else self._scaled(self._loss_at_weights(i) / share)
            self.losses.append(self._unscaled(loss))
            backward(loss if ascends_along_share or share == 1 else loss * share)
            return self.losses[-1] * share

        return closure

    def _loss_at_weights(self, i: int) -> Tensor:
        """Of a micro-batch that is not the first, whose first pass Lightning does not make."""
        with replaced(self._module, "_current_fx_name", "training_step"), self._averaged(not self._sam._replicas.ascends_locally):
            return self._loss_in(self._only_loss(self._calls[i]()))

    def _loss_at_perturbed_weights(self, i: int) -> Tensor:
        """Lightning's no_sync() decides whether the last micro-batch's gradient is averaged, with those that it is added to."""
        is_averaged = i == len(self._calls) - 1 and all(each.require_backward_grad_sync for each in self._replicas)
        state = self._random_state if i == 0 else None
        with self._averaged(is_averaged), nullcontext() if state is None else state.replayed():
            return self._loss_in(self._calls[i]())

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        with replaced(self._callback, "is_second_pass", True), replaced(self._module, "log", lambda *args, **kwargs: None):
            yield

    @contextmanager
    def _averaged(self, is_averaged: bool) -> Iterator[None]:
        """Whether DistributedDataParallel averages the gradient of a forward pass within it."""
        with ExitStack() as stack:
            for each in self._replicas:
                if each.static_graph and not is_averaged:
                    raise RuntimeError(
                        "SAMCallback: DDPStrategy(static_graph=True) with passes of which only some are averaged: torch then averages "
                        "wrongly, without an error; leave static_graph out, or micro_batches, accumulate_grad_batches and local_ascent"
                    )
                stack.enter_context(replaced(each, "require_backward_grad_sync", is_averaged))
            yield

    def _scaled(self, loss: Tensor) -> Tensor:
        scaled: Tensor = loss if self._scaler is None else self._scaler.scale(loss)
        return scaled

    def _unscaled(self, loss: Tensor) -> Tensor:
        scale = amp.scale_of(amp.check_scaler(self._scaler))
        return loss.detach() if scale is None else loss.detach() / scale

    def _only_loss(self, output: Any) -> Any:
        if self._callback.micro_batches > 1 and isinstance(output, Mapping) and len(output) > 1:
            names = ", ".join(name for name in output if name != "loss")
            raise RuntimeError(
                f"SAMCallback: with micro_batches > 1 training_step must return the loss alone: what else it returns ({names}) would be "
                "that of the first micro-batch; log it with self.log"
            )
        return output

    def _loss_in(self, output: Any) -> Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise RuntimeError(
                f"SAMCallback: training_step returned a loss in the first pass of the batch, and {describe(output)} in another one; return "
                "a loss in all of them, or None in the first"
            )
        return loss

    # --- the step ---

    def _optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> Any:
        """In the place of the module's. A batch for which training_step returned None makes no step, but for what was accumulated."""
        closure = optimizer_closure

        def unscaled() -> Any:
            assert optimizer_closure is not None
            result = optimizer_closure()
            if result is not None:  # before on_before_optimizer_step and clipping
                self._scaler.unscale_(self._sam)
            return result

        if closure is not None and self._scaler is not None:
            closure = unscaled
        with made_by_closure(self._sam, skips_blank=True):
            return self._usual_optimizer_step(epoch, batch_idx, optimizer, closure)

    def _clip_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """The gradient has been unscaled: Lightning need not refuse an optimizer that can unscale its own."""
        with replaced(self._sam, "_step_supports_amp_scaling", False):
            return self._usual_clip_gradients(*args, **kwargs)


def _checked(trainer: Any, module: Any) -> SAM:
    if not module.automatic_optimization:
        raise RuntimeError(
            "SAMCallback: the module optimizes manually; leave the callback out and write self.optimizers().step(closure), or "
            "self.optimizers().backward(closure) in the place of self.manual_backward(loss)"
        )
    found = [find_sam(each) for each in trainer.optimizers]
    sam = found[0] if len(found) == 1 else None
    if sam is None or isinstance(sam, RWSAM):
        names = ", ".join(type(each).__name__ for each in trainer.optimizers)
        raise RuntimeError(
            f"SAMCallback: configure_optimizers must return one optimizer of SAM, got {names}; write "
            f"return SAM(self.parameters(), torch.optim.AdamW, lr=..., rho=0.05). (RWSAM needs losses of samples: {_MANUALLY})"
        )
    check_strategy(trainer.strategy)
    name = f"{sam.direction.name!r} with {sam.descent.name!r}"
    why = ""
    if sam.direction.first_gradient is not FirstGradient.AT_WEIGHTS:
        why = f"{name} moves the weights before the first forward pass, which Lightning makes"
    elif sam.direction.refuses(Use.BACKWARD) or sam.descent.refuses(Use.BACKWARD):
        why = f"{name} chooses more than a gradient"
    elif sam.freeze_unperturbed:
        why = "freeze_unperturbed=True changes the first forward pass, which Lightning makes"
    elif sam._replicas.has_groups:
        why = "local_ascent=True over HSDP changes the first forward pass, which Lightning makes"
    if why:
        raise RuntimeError(f"SAMCallback: {why}; {_MANUALLY}")
    return sam
