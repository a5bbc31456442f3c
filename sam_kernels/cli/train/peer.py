"""SAM in plain PyTorch: the usual loop, which ``--peer`` runs beside the package's optimizer. Its steps are the same up to rounding.

The loop has its fastest usual form: ``torch._foreach_`` functions over all parameters, and a fused base optimizer. It neither checks
gradients nor skips a step.
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

    Memory: a copy of the parameters, and a perturbation as large, in each step.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module, rho: float) -> None:
        self._base, self._rho = base, rho
        self._params: list[Tensor] = list(model.parameters())
        self._batch_norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def step(self, gradient: Callable[[], Tensor]) -> Tensor:  # () -> loss, () -> ()
        """Take a step and return the loss at the original weights. ``gradient`` sets the gradients anew and returns the loss."""
        loss = gradient()
        with torch.no_grad():
            grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in self._params]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            backup = [param.clone() for param in self._params]
            torch._foreach_add_(self._params, torch._foreach_mul(grads, self._rho / (norm + EPS)))
        with self._running_statistics_kept():
            gradient()
        with torch.no_grad():
            torch._foreach_copy_(self._params, backup)
        self._base.step()
        return loss

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
