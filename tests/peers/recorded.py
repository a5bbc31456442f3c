"""A stand-in for the replay of a CUDA graph, on CPU tensors: the operations of a step, with the addresses that they had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Recording"]


class Recording(TorchDispatchMode):
    """Records operations while it is entered. Other than the capture of a graph, it runs them too, and keeps all memory that they use.

    As a graph does, ``replay`` reads and writes where tensors lay when they were recorded, whatever Python has made of them since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_at_its_address, (args, kwargs or {}))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_leaves(tree_map(_at_its_address, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs in self.calls:
            for out, again in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(out, Tensor) and out.data_ptr() != again.data_ptr():
                    out.copy_(again)


def _at_its_address(value: Any) -> Any:
    """Another tensor at the same address, which an assignment to ``.data`` does not move."""
    return value.detach() if isinstance(value, Tensor) else value
