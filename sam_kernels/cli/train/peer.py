"""SAM in plain PyTorch, beside which ``train --peer`` and ``prove`` run the package's optimizer. Its steps are the same up to rounding.

The loop is a fast one: ``torch._foreach_`` functions over all parameters, a backup that is kept between steps, and a fused base optimizer.
It neither checks gradients nor skips a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["PlainSAM", "has_fused_base"]

EPS = 1e-12  # as SAM's norm_eps


def has_fused_base(device: torch.device) -> bool:
    """Return whether ``torch.optim`` has fused SGD and AdamW for a device."""
    return device.type in ("cpu", "cuda")


class PlainSAM:
    """A step of SAM (arXiv 2010.01412) around a base optimizer of the parameters of ``model``.

    Memory: a copy of the parameters, and in each ascent a perturbation as large.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module, rho: float) -> None:
        self._base, self._rho = base, rho
        self._params: list[Tensor] = list(model.parameters())
        self._backup = [torch.empty_like(param, requires_grad=False) for param in self._params]
        self._batch_norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def step(self, gradient: Callable[[], Tensor]) -> Tensor:  # () -> loss, () -> ()
        """Take a step and return the loss at the original weights. ``gradient`` sets the gradients anew and returns the loss."""
        loss = gradient()
        self.first_step()
        with self._running_statistics_kept():
            gradient()
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self) -> None:
        """Perturb the weights along the gradients."""
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in self._params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(self._backup, self._params)
        torch._foreach_add_(self._params, torch._foreach_mul(grads, self._rho / (norm + EPS)))

    @torch.no_grad()
    def second_step(self) -> None:
        """Restore the weights, and let the base step along the gradients."""
        torch._foreach_copy_(self._params, self._backup)
        self._base.step()

    @contextlib.contextmanager
    def _running_statistics_kept(self) -> Iterator[None]:
        """BatchNorm moves its running statistics by its momentum: none in the second pass."""
        momenta = [module.momentum for module in self._batch_norms]
        try:
            for module in self._batch_norms:
                module.momentum = 0.0
            yield
        finally:
            for module, momentum in zip(self._batch_norms, momenta, strict=True):
                module.momentum = momentum
