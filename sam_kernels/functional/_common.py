"""What the operations share: types, checks, and lists cut into what one backend call takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import Rows, split
from sam_kernels._tensor_list import TensorList

__all__ = ["Number", "Tensors", "check_amp", "check_clip", "checked", "device_of", "on"]

Tensors = Sequence[Tensor]
Number = float | Tensor


def checked(op: str, lists: dict[str, Tensors | None], *, written: tuple[str, ...]) -> list[Rows]:
    if not all(tensors is None or isinstance(tensors, TensorList) for tensors in lists.values()):
        _validate.check_lists(op, lists, written=written)
    return split(lists, written=written)


def check_amp(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if grad_scale is not None:
        _validate.check_scalar_tensor(op, "grad_scale", grad_scale)
    if found_inf is not None:
        _validate.check_scalar_tensor(op, "found_inf", found_inf)


def check_clip(op: str, norm: Tensor | None, max_norm: float | None) -> float | None:
    if norm is not None:
        _validate.check_scalar_tensor(op, "norm", norm)
    if max_norm is None:
        return None
    if norm is None:
        raise ValueError(f"{op}: max_norm needs norm, the norm of the gradients as given")
    return _validate.check_number(op, "max_norm", max_norm, low=0.0)


def device_of(rows: Rows) -> torch.device:
    params = rows.lists["params"]
    assert params is not None
    return params[0].device


def on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
