"""What calls with 16-bit parameters must satisfy: float32 masters beside them, and stochastic rounding to bfloat16."""

from __future__ import annotations

import torch

from sam_kernels import _validate
from sam_kernels._tensor_list import are_trusted
from sam_kernels.functional._common import Tensors

__all__ = ["check_backups", "check_masters", "check_rounding"]

_WIDE = (torch.float32, torch.float64)


def check_backups(op: str, params: Tensors, old_params: Tensors) -> None:
    """Refuse to save 16-bit parameters into wider tensors: masters would lose what the parameters' rounding has cut off.

    Raises TypeError naming the row. Trusted lists are not checked.
    """
    if are_trusted((params, old_params)):
        return
    for i, (param, old_param) in enumerate(zip(params, old_params, strict=True)):
        if param.dtype not in _WIDE and old_param.dtype in _WIDE:
            raise TypeError(
                f"{op}: old_params[{i}] is {_name(old_param.dtype)}, params[{i}] is {_name(param.dtype)}: saving would overwrite a master "
                f"with its rounded copy; pass from_old=True to perturb from masters, or backups of the parameters' dtype"
            )


def check_masters(op: str, params: Tensors, old_params: Tensors | None) -> None:
    """Check the lists of ``to_old=True``: every row has 16-bit parameters and a float32 master.

    Raises ValueError without ``old_params`` and TypeError naming a row of other dtypes. Trusted lists are not checked.
    """
    if old_params is None:
        raise ValueError(f"{op}: to_old=True needs old_params, the float32 masters of params")
    if are_trusted((params, old_params)):
        return
    for i, (param, old_param) in enumerate(zip(params, old_params, strict=True)):
        if param.dtype in _WIDE:
            raise TypeError(
                f"{op}: params[{i}] is {_name(param.dtype)}; to_old=True is for bfloat16 and float16 parameters with float32 masters: "
                f"update parameters of other dtypes in a call of their own"
            )
        if old_param.dtype is not torch.float32:
            raise TypeError(f"{op}: old_params[{i}] is {_name(old_param.dtype)}; with to_old=True it is a master and must be float32")


def check_rounding(op: str, rounding_seed: int, params: Tensors) -> int:
    """Check a seed of stochastic rounding. Raises TypeError for float16 parameters."""
    rounding_seed = _validate.check_seed(op, "rounding_seed", rounding_seed)
    for i, param in enumerate(params):
        if param.dtype is torch.float16:
            raise TypeError(
                f"{op}: params[{i}] is float16; rounding_seed is for bfloat16 parameters, whose bits are a float32's upper ones"
            )
    return rounding_seed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
