"""What a norm that is not finite leaves behind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["report_norm"]


def report_norm(
    norm: Tensor,  # ()
    found_inf: Tensor | None,  # ()
    skipped: Tensor | None,  # ()
    out: Tensor | None,  # ()
) -> Tensor:  # (), ``out`` where given
    """Sets ``found_inf`` where the norm is not finite. With ``skipped``, what ``found_inf`` was is added to that first, and it starts anew.

    Waits for no device; a norm on the CPU takes no more than one small operation.
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
