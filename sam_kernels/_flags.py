"""The flag that a norm which is not finite sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["report_norm"]


def report_norm(
    norm: Tensor,  # ()
    found_inf: Tensor | None,  # ()
    skipped: Tensor | None = None,  # ()
    out: Tensor | None = None,  # ()
) -> Tensor:  # (), ``out`` where given
    """Set ``found_inf`` to 1 if the norm is not finite. With ``skipped``, add ``found_inf`` to ``skipped`` first and start it from 0.

    Waits for no device. A norm on the CPU takes one small operation at most.
    """
    if found_inf is not None and skipped is not None and not (found_inf.is_cpu and found_inf.item() == 0.0):
        skipped.add_(found_inf.reshape(skipped.shape))
        found_inf.zero_()
    if found_inf is not None:
        if norm.device.type != "cpu":
            found_inf.logical_or_(~torch.isfinite(norm).to(found_inf.device))
        elif not math.isfinite(norm.item()):
            found_inf.fill_(1.0)
    return norm if out is None else out.copy_(norm)
