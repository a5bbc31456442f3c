"""Hugging Face's ``accelerate`` with SAM: the optimizer that ``prepare`` returns keeps SAM's methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from sam_kernels.integrations._found import find_sam
from sam_kernels.optim.sam import SAM

__all__ = ["AcceleratedSAM", "Accelerator", "check_plugins"]


class AcceleratedSAM(AcceleratedOptimizer):  # type: ignore[misc]  # Any where accelerate is not installed
    """accelerate's optimizer around SAM. ``step`` and ``zero_grad`` do nothing within ``accelerator.accumulate`` but at its last
    micro-batch, as ever; :meth:`backward` works at each."""

    optimizer: SAM

    def backward(self, closure: Callable[[], Any]) -> Any:
        """In the place of ``accelerator.backward(loss)``, which the closure calls, twice: :meth:`sam_kernels.SAM.backward`.

        With ``accelerator.accumulate(model)`` every micro-batch has a perturbation of its own: m-SAM. Returns the first loss::

            with accelerator.accumulate(model):
                def closure():
                    loss = loss_of(model, batch)
                    accelerator.backward(loss)
                    return loss

                loss = optimizer.backward(closure)
                optimizer.step()
                optimizer.zero_grad()
        """
        return self.optimizer.backward(closure, grad_scaler=self.scaler)

    def first_step(self, zero_grad: bool = False) -> None:
        """:meth:`sam_kernels.SAM.first_step`, at a step's last micro-batch; at the others nothing."""
        if self.gradient_state.sync_gradients:
            self.optimizer.first_step(zero_grad, grad_scaler=self.scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`sam_kernels.SAM.second_step`, by :meth:`step`."""
        if not self.gradient_state.sync_gradients:
            return
        if not self.optimizer._passes.is_perturbed:
            raise RuntimeError("SAM.second_step: call first_step first")
        self.step()
        if zero_grad:
            self.zero_grad()


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator``, whose ``prepare`` returns an :class:`AcceleratedSAM` for an optimizer of SAM.

    Raises ValueError, when it prepares one, with DeepSpeed, Megatron-LM and FSDP version 1, which update their own copies of the weights.
    """

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """accelerate's. An optimizer without SAM is prepared as ever."""
        if find_sam(optimizer) is None or isinstance(optimizer, AcceleratedSAM):
            return super().prepare_optimizer(optimizer, device_placement)
        check_plugins(self, "SAM")
        made = AcceleratedSAM(
            optimizer, device_placement=self.device_placement if device_placement is None else device_placement, scaler=self.scaler
        )
        self._optimizers.append(made)
        return made


def check_plugins(accelerator: Any, name: str) -> None:
    """Raises ValueError for a plugin that updates weights of its own. ``name``: of what says so."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{name}: {accelerator.distributed_type.value} updates its own copies of the weights, so that SAM would perturb what nobody "
            "trains; use DDP (torchrun, or accelerate launch --multi_gpu), or FSDP version 2: fsdp_version=2"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(f"{name}: FSDP version 1 flattens parameters, which SAM refuses; set fsdp_version=2")
