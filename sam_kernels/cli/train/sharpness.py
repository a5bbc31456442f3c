"""How sharp the place is where a run ends: second derivatives of the training loss."""

from __future__ import annotations

from torch import Tensor, nn

import sam_kernels
from sam_kernels.cli.train.plan import SHARPNESS_IMAGES

__all__ = ["sharpness_of"]


def sharpness_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:  # (n, 1, side, side), (n,)
    """The Hessian's largest eigenvalue and its trace, of the mean cross-entropy of the first images in evaluation mode. Leaves the model in
    training mode."""

    def closure() -> Tensor:
        return nn.functional.cross_entropy(model(images[:SHARPNESS_IMAGES]), labels[:SHARPNESS_IMAGES])

    monitors, params = sam_kernels.monitors, list(model.parameters())
    model.eval()
    try:
        return monitors.hessian_top_eigenvalue(closure, params).item(), monitors.hessian_trace(closure, params).item()
    finally:
        model.train()
