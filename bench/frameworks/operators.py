"""A torchvision that was built for another torch lacks its operators, and looks them up when timm or Lightning import it."""

from __future__ import annotations

import torch

__all__ = ["define_operators"]

_NAMES = "nms qnms roi_align qroi_align roi_pool ps_roi_align ps_roi_pool deform_conv2d _roi_align_backward _roi_pool_backward"
_NAMES += " _ps_roi_align_backward _ps_roi_pool_backward _deform_conv2d_backward"
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def define_operators() -> None:
    """Define those that are not there; none of them is called."""
    for name in _NAMES.split():
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor input) -> Tensor")
