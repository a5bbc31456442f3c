"""PyTorch Lightning with SAM: a callback for automatic optimization, and SAM inside of Lightning's and Fabric's wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sam_kernels.integrations._found import find_sam
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["SAMCallback", "sam_of"]


def sam_of(optimizer: Any) -> SAM:
    """The SAM optimizer inside of Lightning's (``self.optimizers()``) or Fabric's (``fabric.setup``), for its own methods::

        sam = sam_of(self.optimizers())            # in manual optimization
        loss = sam.backward(closure)               # the closure calls self.manual_backward, or fabric.backward

    Raises TypeError where there is none.
    """
    found = find_sam(optimizer)
    if found is None:
        raise TypeError(f"sam_of: {type(optimizer).__name__} holds no optimizer of SAM")
    return found


class SAMCallback(Callback):  # type: ignore[misc]  # Any where lightning is not installed
    """Trains a module whose ``configure_optimizers`` returns SAM: ``Trainer(callbacks=[SAMCallback()], ...)``.

    Every ``training_step`` runs twice: at the weights, and at the perturbed point, whose gradient goes into ``.grad``
    (:meth:`sam_kernels.SAM.backward`). All else is Lightning's. ``accumulate_grad_batches`` gives each micro-batch its own perturbation
    (m-SAM); ``gradient_clip_val`` clips the second gradient alone; ``on_before_optimizer_step`` and ``on_after_backward`` are called once;
    precision plugins scale and skip. ``self.log`` does nothing in the second run, so that logged losses are those at the weights.

    Raises RuntimeError when training begins: with manual optimization (use :func:`sam_of`), with several optimizers, with an optimizer that
    is not SAM's, with RWSAM (whose closure returns losses of samples: use manual optimization) and under DeepSpeed or FSDP.
    """

    def __init__(self) -> None:
        super().__init__()
        self._batch: tuple[Any, int] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the place of the module's ``backward`` and ``optimizer_step`` for as long as the fit takes."""
        sam = self._checked(trainer, pl_module)
        usual_backward, usual_step = pl_module.backward, pl_module.optimizer_step

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses = [loss]

            def closure() -> Tensor:
                now = losses.pop() if losses else self._second_loss(trainer, pl_module)
                usual_backward(now, *args, **kwargs)
                return now

            sam.backward(closure, grad_scaler=getattr(trainer.precision_plugin, "scaler", None))

        def optimizer_step(*args: Any, **kwargs: Any) -> None:
            """The trainer gives SAM's step a closure, in which ``backward`` above has made SAM's gradient: it is called once."""
            before = vars(sam).get("step")
            step: Callable[..., Any] = sam.step

            def once(closure: Callable[[], Any] | None = None) -> Any:
                result = None
                if closure is not None:
                    with torch.enable_grad():
                        result = closure()
                step()
                return result

            sam.step = once  # type: ignore[method-assign, assignment]
            try:
                usual_step(*args, **kwargs)
            finally:
                del sam.step
                if before is not None:
                    sam.step = before  # type: ignore[method-assign]

        pl_module.backward, pl_module.optimizer_step = backward, optimizer_step

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives the module its methods back."""
        for name in ("backward", "optimizer_step"):
            vars(pl_module).pop(name, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As :meth:`on_fit_end`."""
        self.on_fit_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remembers the batch."""
        self._batch = batch, batch_idx

    def _second_loss(self, trainer: Any, pl_module: Any) -> Tensor:
        assert self._batch is not None
        takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
        pl_module.log = lambda *args, **kwargs: None
        try:
            output = trainer.strategy.training_step(*(self._batch if takes_index else self._batch[:1]))
        finally:
            del pl_module.log
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
        loss = loss / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return loss if scaler is None else scaler.scale(loss)

    def _checked(self, trainer: Any, pl_module: Any) -> SAM:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "SAMCallback: the module optimizes manually; leave the callback out and write sam_of(self.optimizers()).backward"
            )
        found = [find_sam(each) for each in trainer.optimizers]
        sam = found[0] if len(found) == 1 else None
        if sam is None or isinstance(sam, RWSAM):
            names = ", ".join(type(each).__name__ for each in trainer.optimizers)
            raise RuntimeError(
                f"SAMCallback: configure_optimizers must return one optimizer of SAM, got {names}; write "
                "return SAM(self.parameters(), torch.optim.AdamW, lr=..., rho=0.05). (RWSAM needs losses of samples: optimize manually, "
                "with sam_of(self.optimizers()))"
            )
        strategy = type(trainer.strategy).__name__
        if "DeepSpeed" in strategy or "FSDP" in strategy:
            raise RuntimeError(
                f"SAMCallback: {strategy} updates, or gathers, weights of its own, which SAM would not perturb; use strategy='ddp', or "
                "ModelParallelStrategy with fully_shard"
            )
        return sam
