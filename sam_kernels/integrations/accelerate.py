"""Hugging Face's ``accelerate`` with SAM: the optimizer that ``prepare`` returns keeps SAM's methods."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from sam_kernels.integrations._found import find_sam
from sam_kernels.optim._engine import amp
from sam_kernels.optim._replicas.replicas import is_blank, replicated_modules
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["AcceleratedSAM", "Accelerator", "check_fsdp", "check_plugins", "prepare_sam"]

_LINES = """write
    with accelerator.accumulate(model):
        def closure():
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            return loss
        loss = optimizer.backward(closure)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # where gradients are to be clipped
        optimizer.step()
        optimizer.zero_grad()"""


class AcceleratedSAM(AcceleratedOptimizer):  # type: ignore[misc]  # Any where accelerate is not installed
    """accelerate's optimizer around SAM. ``step`` and ``zero_grad`` do nothing within ``accelerator.accumulate`` but at its last
    micro-batch, as ever; :meth:`backward` works at each.

    With several processes the step is the one that a single process makes with the batches of all: every perturbation is made from the
    gradient that ``DistributedDataParallel`` averages, at the micro-batches that accelerate runs under ``no_sync`` too (which costs an
    all-reduce for each). For perturbations of each rank's own (``local_ascent=True``), prepare the model first and give it to the
    optimizer: ``SAM(model.parameters(), ..., model=model, local_ascent=True)``.
    """

    optimizer: SAM

    def __init__(self, optimizer: Any, device_placement: bool = True, scaler: Any = None, *, accelerator: Any) -> None:
        super().__init__(optimizer, device_placement=device_placement, scaler=scaler)
        self._accelerator = accelerator
        self._found_inf: Tensor | None = None  # () of the last step with a scaler
        self._followed: list[nn.Module] = []  # what accelerate had prepared when it was last looked through
        self._is_followed = False  # the replicas are not those that the optimizer was made with
        self.local_ascent = False

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step, with a scaler, was skipped, for a gradient of either pass. Reading it waits for the device."""
        return self._found_inf is not None and bool(self._found_inf.item() != 0)

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

        The closure of an :class:`sam_kernels.RWSAM` returns the samples' losses (B,) and calls no ``backward``; they are divided by
        ``gradient_accumulation_steps`` here.

        Raises RuntimeError where the gradients of this step have been unscaled already (``clip_grad_norm_`` before the last micro-batch).
        """
        k = int(self._accelerator.gradient_accumulation_steps)
        self.follow(getattr(self._accelerator, "prepared_models", []))
        losses: list[Any] = []

        def divided() -> Any:
            loss = closure()
            losses.append(loss)
            return loss / k if isinstance(loss, Tensor | int | float) else loss

        mean = self.add_gradient(divided, micro_batches=k)
        return mean * k if isinstance(self.optimizer, RWSAM) else losses[0]

    def add_gradient(self, closure: Callable[[], Any], *, micro_batches: int) -> Any:
        """:meth:`backward`, for a closure that returns what it has divided by ``micro_batches``."""
        if self._is_unscaled:
            raise RuntimeError(
                "SAM.backward: the gradients of this step are unscaled already, so that those of another micro-batch cannot be added; call "
                f"accelerator.clip_grad_norm_ and unscale_gradients after the last one alone: {_LINES}"
            )
        return self.optimizer.backward(closure, grad_scaler=self.scaler, micro_batches=micro_batches)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base's step along what :meth:`backward` has added, or the second half of :meth:`first_step`; at a step's last micro-batch.

        ``closure``: a whole step of SAM, without accumulation. It zeroes the gradients, calls ``accelerator.backward``, returns the loss.

        Raises:
            RuntimeError: without a gradient of SAM, which would be a step of the base alone. (With ρ = 0 it is none.)
            ValueError: for a closure and ``gradient_accumulation_steps`` > 1: micro-batches before the last would be left out.
        """
        if closure is not None and self._accelerator.gradient_accumulation_steps > 1:
            raise ValueError(f"SAM.step: a closure is one batch, and accelerate accumulates several; {_LINES}")
        if not self.gradient_state.sync_gradients:
            return None
        sam, scaler = self.optimizer, self.scaler
        if closure is None:
            self._check_ascent()
        else:
            self.follow(getattr(self._accelerator, "prepared_models", []))
        if scaler is None:
            return sam.step(closure)
        loss = None
        if closure is not None:
            loss = sam.step(closure, grad_scaler=scaler)
        else:
            scaler.step(sam)
            amp.report_step(amp.check_scaler(scaler), sam, sam._passes.found_inf)  # it has not seen the first pass of the two-step API
        scaler.update()
        self._found_inf = sam._passes.found_inf.clone()
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """:meth:`sam_kernels.SAM.first_step`, at a step's last micro-batch; at the others nothing. For accumulation go through the
        micro-batches twice, with ``first_step`` and then with :meth:`second_step`: SAM on the whole batch.

        Raises RuntimeError where the gradients have been unscaled: clip those of the second pass.
        """
        if not self.gradient_state.sync_gradients:
            return
        if self._is_unscaled:
            raise RuntimeError(
                "SAM.first_step: accelerator.clip_grad_norm_ or unscale_gradients has unscaled the gradients of the first pass; call them "
                "once a step, after the second accelerator.backward(loss) and before optimizer.second_step()"
            )
        self.follow(getattr(self._accelerator, "prepared_models", []))
        self.optimizer.first_step(zero_grad, grad_scaler=self.scaler)

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`sam_kernels.SAM.second_step`, by :meth:`step`; at a step's last micro-batch. Raises RuntimeError without a
        :meth:`first_step` that has perturbed the weights."""
        if not self.optimizer._passes.is_perturbed:
            raise RuntimeError(
                "SAM.second_step: call first_step first. Within accelerator.accumulate it perturbs at the last micro-batch alone: a step "
                f"goes through all micro-batches twice. For m-SAM {_LINES}"
            )
        self.step()
        if zero_grad:
            self.zero_grad()

    def follow(self, models: Sequence[nn.Module]) -> None:
        """Has the optimizer use the ``DistributedDataParallel`` modules among ``models``, unless it was made with some."""
        sam = self.optimizer
        if not models or (sam._replicas and not self._is_followed) or [*map(id, models)] == [*map(id, self._followed)]:
            return
        self._followed = list(models)
        ours = {id(param) for group in sam.param_groups for param in group["params"]}
        replicated = [each for each in replicated_modules(self._followed) if any(id(param) in ours for param in each.parameters())]
        if replicated:
            sam._use_replicas(replicated, local_ascent=self.local_ascent)
            self._is_followed = True

    @property
    def _is_unscaled(self) -> bool:
        scaler = amp.check_scaler(self.scaler)
        return scaler is not None and scaler._per_optimizer_states[id(self.optimizer)]["stage"] is OptState.UNSCALED

    def _check_ascent(self) -> None:
        sam = self.optimizer
        if sam._passes.is_perturbed or sam._calls_made() or is_blank(sam.param_groups) or not sam._plan_ahead().ascends:
            return
        raise RuntimeError(
            f"{type(sam).__name__}: step() without a gradient of SAM: accelerator.backward(loss) alone makes a step of "
            f"{type(sam.base_optimizer).__name__}; {_LINES}\n"
            "(In a training_step of your own for SAMTrainer, call super().training_step(model, inputs, num_items_in_batch). A step without "
            "an ascent is optimizer.optimizer.base_optimizer.step().)"
        )

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_accelerator", "_followed", "_is_followed")
        return {name: value for name, value in super().__getstate__().items() if name not in left_out}


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator``, whose ``prepare`` returns an :class:`AcceleratedSAM` for an optimizer of SAM.

    Raises ValueError, when it prepares one, with DeepSpeed, Megatron-LM and FSDP version 1, which update their own copies of the weights.
    """

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """accelerate's. DeepSpeed and Megatron-LM never get to :meth:`prepare_optimizer`."""
        if any(find_sam(each) is not None for each in args if not isinstance(each, nn.Module)):
            check_plugins(self, "SAM")
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, *args: Any, **kwargs: Any) -> Any:
        """accelerate's. It keeps the model that was given; :attr:`prepared_models` are those that it returns."""
        made = super().prepare_model(*args, **kwargs)
        self.__dict__.setdefault("_prepared", []).append(weakref.ref(made))
        return made

    @property
    def prepared_models(self) -> list[nn.Module]:
        """What :meth:`prepare_model` has returned and is still in use: ``DistributedDataParallel`` modules, with several processes."""
        found = [each() for each in self.__dict__.get("_prepared", [])]
        return [each for each in found if each is not None]

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """accelerate's. An optimizer without SAM is prepared as ever."""
        return prepare_sam(self, super().prepare_optimizer, optimizer, device_placement)


def prepare_sam(accelerator: Any, usual: Callable[..., Any], optimizer: Any, device_placement: bool | None = None) -> Any:
    """An :class:`AcceleratedSAM` for an optimizer of SAM; for another one what ``usual``, accelerate's ``prepare_optimizer``, returns.

    Raises TypeError for something else that holds an optimizer of SAM.
    """
    if find_sam(optimizer) is None:
        return usual(optimizer, device_placement)
    check_plugins(accelerator, "SAM")
    if not isinstance(optimizer, AcceleratedSAM):
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, SAM):
            raise TypeError(
                f"SAM: prepare was given {type(optimizer).__name__} around an optimizer of SAM; put SAM around the other optimizer, "
                "SAM(model.parameters(), other, rho=0.05), and prepare that"
            )
        places = accelerator.device_placement if device_placement is None else device_placement
        optimizer = AcceleratedSAM(optimizer, device_placement=places, scaler=accelerator.scaler, accelerator=accelerator)
    if not any(each is optimizer for each in accelerator._optimizers):
        accelerator._optimizers.append(optimizer)
    return optimizer


def check_plugins(accelerator: Any, name: str) -> None:
    """Raises ValueError for a plugin that updates weights of its own. ``name``: of what says so."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{name}: {accelerator.distributed_type.value} updates its own copies of the weights, so that SAM would perturb what nobody "
            "trains; use DDP (torchrun, or accelerate launch --multi_gpu), or FSDP version 2: fsdp_version=2"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        check_fsdp(getattr(plugin, "fsdp_version", 1), name)


def check_fsdp(version: int, name: str) -> None:
    """Raises ValueError for FSDP version 1."""
    if version != 2:
        raise ValueError(f"{name}: FSDP version {version} flattens parameters, which SAM refuses; set fsdp_version=2")
