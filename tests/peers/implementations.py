"""SAM as this package and three others have it, each used as its own documentation says.

An implementation takes forward functions: each returns the loss of one micro-batch, at the weights of the moment. Where a documentation
says nothing, the calls are those of any optimizer of torch. Where there are several ways, one that works is enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import sam_kernels
from bench.memory import reachable_tensors
from bench.providers.davda54 import PublishedSAM
from bench.providers.packages import unless_installed
from sam_kernels.per_sample import GradNorms
from tests.peers import composer

__all__ = ["IMPLEMENTATIONS", "RHO", "Checkpointing", "Forward", "Implementation", "SamKernels"]

RHO = 0.1

Forward = Callable[[], Tensor]  # () -> loss, shape ()
Scaled = Callable[[Forward, Any], None]  # one iteration with a scaler, its update included
Checkpointing = tuple[Callable[[], Any], Callable[[Any], None]]  # save, load


class Implementation(ABC):
    """An optimizer of ``model``'s parameters around ``base``. A wrapper of the model (DDP) takes its place."""

    def __init__(self, model: nn.Module, base: type[torch.optim.Optimizer] = torch.optim.SGD, **kwargs: Any) -> None:
        self.model = model
        self.optimizer = self._make(base, kwargs)

    @abstractmethod
    def _make(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any: ...

    @staticmethod
    def reason_missing() -> str | None:
        return None

    @abstractmethod
    def step(self, *forwards: Forward) -> None:
        """Take one step along the sum of the micro-batches' gradients."""

    def step_with_batch_norm(self, forward: Forward) -> None:
        """Take one step with the lines that the documentation adds for models with batch normalisation."""
        self.step(forward)

    @abstractmethod
    def scaled(self) -> dict[str, Scaled]:
        """Return the ways of using a gradient scaler, by name."""

    def scaler(self, scale: float) -> Any:
        return torch.amp.GradScaler("cpu", init_scale=scale)

    def checkpointing(self) -> dict[str, Checkpointing]:
        return {"optimizer.state_dict": (lambda: self.optimizer.state_dict(), lambda state: self.optimizer.load_state_dict(state))}

    def base_state(self) -> list[Tensor]:
        """Return copies of the base's moving averages and counters, without what a SAM keeps beside them."""
        states = [self.optimizer.base_optimizer.state.get(param, {}) for param in self.model.parameters()]
        kept = [state[key] for state in states for key in sorted(state) if key not in ("old_p", "e_w")]
        return [value.detach().clone() for value in kept if isinstance(value, Tensor)]

    def sample_norms(self, losses: Callable[[], Tensor]) -> list[Tensor]:
        """Return the tensors with a number per sample that a step leaves, where there is no function for them. losses() has shape (B,)."""
        self.step(lambda: losses().mean())
        return [tensor for tensor in reachable_tensors(self.optimizer) if tensor.shape == losses().shape]

    def _gradients(self, forwards: tuple[Forward, ...], scaler: Any = None) -> float:
        """Zero the gradients and add those of all micro-batches up. Returns the loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for forward in forwards:
            loss = forward()
            (loss if scaler is None else scaler.scale(loss)).backward()
            total = total + loss.detach()
        return total


class SamKernels(Implementation):
    is_capturable = False

    def _make(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any:
        return sam_kernels.SAM(self.model.parameters(), base, rho=RHO, model=self.model, capturable=self.is_capturable, **kwargs)

    def step(self, *forwards: Forward) -> None:
        self.optimizer.step(lambda: self._gradients(forwards))

    def scaled(self) -> dict[str, Scaled]:
        def with_closure(forward: Forward, scaler: Any) -> None:
            self.optimizer.step(lambda: self._gradients((forward,), scaler), grad_scaler=scaler)
            scaler.update()

        return {"step(closure, grad_scaler=scaler)": with_closure}

    def sample_norms(self, losses: Callable[[], Tensor]) -> list[Tensor]:
        engine = GradNorms(self.model)
        with engine:
            values = losses()
        return [engine(values)]


class TwoStep(Implementation):
    """The API of first_step and second_step, with a step(closure) that wants the first gradients computed before."""

    def step(self, *forwards: Forward) -> None:
        self._gradients(forwards)
        self.optimizer.step(lambda: self._gradients(forwards))

    def step_with_batch_norm(self, forward: Forward) -> None:
        self._enable_running_stats()
        self._gradients((forward,))
        self.optimizer.first_step()
        self._disable_running_stats()
        self._gradients((forward,))
        self.optimizer.second_step()

    @abstractmethod
    def _enable_running_stats(self) -> None: ...

    @abstractmethod
    def _disable_running_stats(self) -> None: ...

    def scaled(self) -> dict[str, Scaled]:
        """Neither documentation has a line about scalers: what torch's own pages suggest, and what users of both have published."""

        def two_unscalings(forward: Forward, scaler: Any) -> None:
            self._gradients((forward,), scaler)
            scaler.unscale_(self.optimizer)
            self.optimizer.first_step()
            self._gradients((forward,), scaler)
            scaler.unscale_(self.optimizer.base_optimizer)
            self.optimizer.second_step()
            scaler.update()

        def step_of_each_half(forward: Forward, scaler: Any) -> None:
            for half in (self.optimizer.first_step, self.optimizer.second_step):
                self._gradients((forward,), scaler)
                self.optimizer.step = half
                scaler.step(self.optimizer)
                scaler.update()

        def step_with_closure(forward: Forward, scaler: Any) -> None:
            def second_pass() -> None:
                self._gradients((forward,), scaler)
                scaler.unscale_(self.optimizer.base_optimizer)

            self._gradients((forward,), scaler)
            scaler.step(self.optimizer, second_pass)
            scaler.update()

        return {
            "scaler.unscale_ before each half": two_unscalings,
            "scaler.step of each half": step_of_each_half,
            "scaler.step(optimizer, closure)": step_with_closure,
        }


class _Published(PublishedSAM):
    """With the two methods of the published class that a benchmark of steps does not need."""

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        self.first_step()
        self.zero_grad()
        closure()
        self.second_step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Davda54(TwoStep):
    def _make(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any:
        return _Published(self.model.parameters(), base, rho=RHO, **kwargs)

    def _enable_running_stats(self) -> None:
        for module in self._batch_norms():
            module.momentum = getattr(module, "backup_momentum", module.momentum)

    def _disable_running_stats(self) -> None:
        for module in self._batch_norms():
            module.backup_momentum, module.momentum = module.momentum, 0  # type: ignore[assignment]

    def _batch_norms(self) -> list[_BatchNorm]:
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]


class PytorchOptimizer(TwoStep):
    def _make(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any:
        from pytorch_optimizer import SAM

        return SAM(self.model.parameters(), base, rho=RHO, **kwargs)

    @staticmethod
    def reason_missing() -> str | None:
        return unless_installed("pytorch_optimizer")(0)

    def _enable_running_stats(self) -> None:
        from pytorch_optimizer import enable_running_stats

        enable_running_stats(self.model)

    def _disable_running_stats(self) -> None:
        from pytorch_optimizer import disable_running_stats

        disable_running_stats(self.model)


class Composer(Implementation):
    """The optimizer that Composer's trainer makes of a base, with closures as the trainer passes them.

    A closure runs all micro-batches. It takes ``ddp_sync=False`` for a pass whose gradients stay the rank's own, and unscales gradients
    if there is a scaler. It returns the loss; the trainer's does so as a number, unless there is a scaler.
    """

    def _make(self, base: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> Any:
        return composer.load().SAMOptimizer(base(self.model.parameters(), **kwargs), rho=RHO)

    reason_missing = staticmethod(composer.reason_missing)

    def step(self, *forwards: Forward) -> None:
        self.optimizer.step(closure=lambda **options: self._pass(forwards, **options))

    def _pass(self, forwards: tuple[Forward, ...], scaler: Any = None, ddp_sync: bool = True, loss_dict: Any = None) -> Any:
        is_local = not ddp_sync and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if is_local else nullcontext():  # type: ignore[operator]
            loss = self._gradients(forwards, scaler)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return loss

    def scaled(self) -> dict[str, Scaled]:
        def with_closure(forward: Forward, scaler: Any) -> None:
            scaler.step(self.optimizer, closure=lambda **options: self._pass((forward,), scaler, **options))
            scaler.update()

        return {"ClosureGradScaler.step": with_closure}

    def scaler(self, scale: float) -> Any:
        return composer.load().ClosureGradScaler("cpu", init_scale=scale)

    def checkpointing(self) -> dict[str, Checkpointing]:
        """The first is the trainer's. The second is any optimizer's."""

        def load(state: Any) -> None:
            set_optimizer_state_dict(self.model, self.optimizer, state)

        trainers = {"the trainer's functions": (lambda: get_optimizer_state_dict(self.model, self.optimizer), load)}
        return {**trainers, **super().checkpointing()}


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "sam_kernels": SamKernels,
    "davda54/sam": Davda54,
    "pytorch_optimizer": PytorchOptimizer,
    "Composer": Composer,
}
