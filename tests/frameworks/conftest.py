"""Tests against the frameworks themselves: ``make test-frameworks`` installs them. Without a framework its tests are skipped."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from their configurations

# timm imports torchvision. A torchvision that was built for another torch lacks its operators, which it only looks up when it is imported.
_OPERATORS = "nms qnms roi_align qroi_align roi_pool ps_roi_align ps_roi_pool deform_conv2d _roi_align_backward _roi_pool_backward"
_OPERATORS += " _ps_roi_align_backward _ps_roi_pool_backward _deform_conv2d_backward"
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in _OPERATORS.split():
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor input) -> Tensor")
