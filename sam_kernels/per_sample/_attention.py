"""``nn.MultiheadAttention`` multiplies by its weights without calling a layer: its calls of ``linear`` are listened to instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sam_kernels.per_sample._terms import Place

__all__ = ["LinearCalls", "attention_params", "rows_of"]

# record(input, weight, bias, output)
Record = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


def _unwatched(function: Any) -> Any:
    """The function without its first question, whether a mode wants to take its place: the same code with another answer."""
    clone = FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda tensors: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


_attention_forward = _unwatched(F.multi_head_attention_forward)


class LinearCalls(TorchFunctionMode):
    """While it is on, every ``linear`` is reported, those inside ``F.multi_head_attention_forward`` too."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention_forward(*args, **keywords)
        output = func(*args, **keywords)
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            self._record(x, weight, keywords.get("bias", bias), output)
        return output


def attention_params(module: nn.MultiheadAttention) -> dict[str, nn.Parameter]:
    """The trainable parameters that its forward pass multiplies by, those of ``out_proj`` among them."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def rows_of(tensor: Tensor | None, params: Mapping[str, nn.Parameter]) -> tuple[str, Place | None] | None:
    """The name of the parameter that the tensor is (with no place), or is consecutive rows of; None if it is none of ``params``."""
    for name, param in params.items():
        if tensor is param:
            return name, None
        if tensor is not None and tensor._base is param and tensor.stride() == param.stride():
            start = (tensor.storage_offset() - param.storage_offset()) // param.stride(0)
            return name, None if len(tensor) == len(param) else (start, start + len(tensor))
    return None
