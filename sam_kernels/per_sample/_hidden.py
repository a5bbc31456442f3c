"""Calls of layers whose outputs get no gradient. They add nothing to a norm, unless a ``torch.autograd.Function`` hides the gradient."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._graph import edges_of

__all__ = ["has_graph", "refuse_hidden", "refuse_inside_function"]

_apply: Any = torch.autograd.Function.apply
_APPLY = _apply.__func__.__code__
_PythonNode: Any = torch.autograd.function.BackwardCFunction


def has_graph(name: str, outputs: Sequence[Tensor]) -> bool:
    """Whether one of a layer's outputs can get a gradient: not under ``torch.no_grad``, and not a detached one.

    Raises RuntimeError where the layer runs inside a custom function, such as a reentrant checkpoint, whose backward pass may run it again;
    NotImplementedError for complex outputs.
    """
    found = False
    for tensor in outputs:
        if tensor.requires_grad:
            if tensor.is_complex():
                raise NotImplementedError(
                    f"GradNorms: the output of {name} is a {tensor.dtype} tensor; layers with complex outputs are not supported: return "
                    "real tensors (torch.view_as_real), or freeze the layer's parameters"
                )
            found = True
    if not found:
        refuse_inside_function(name)
    return found


def refuse_inside_function(name: str) -> None:
    """Raise RuntimeError if a ``torch.autograd.Function`` is being applied: its own backward pass makes the gradients."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            function = getattr(frame.f_locals.get("cls"), "__name__", "a custom function")
            raise RuntimeError(
                f"GradNorms: {name} ran inside the torch.autograd.Function {function}, which hides its gradient (a reentrant checkpoint is "
                "such a function: pass use_reentrant=False, to a model of Hugging Face gradient_checkpointing_kwargs="
                "{'use_reentrant': False}); freeze its parameters with requires_grad_(False) if they should have none"
            )
        frame = frame.f_back


def refuse_hidden(root: Any, calls: Collection[Call]) -> None:
    """Raise RuntimeError if one of the calls, to which no path leads from ``root``, may have been made inside a custom function.

    Nodes are numbered as they are made. A call inside a function comes after the function's node and before the first node that uses
    the function's output.
    """
    if not calls:
        return
    first_use: dict[Any, int] = {}
    if isinstance(root, _PythonNode):
        first_use[root] = sys.maxsize
    for node, child in edges_of(root):
        if isinstance(child, _PythonNode):
            first_use[child] = min(first_use.get(child, sys.maxsize), node._sequence_nr())
    for node, last in first_use.items():
        for call in calls:
            if node._sequence_nr() < call.first_order < last:
                raise RuntimeError(
                    f"GradNorms: the losses do not depend on the output of {call.name}, but may on its parameters: {type(node).__name__} "
                    "was being computed when it was called, a custom function that hides gradients; freeze the parameters, or call the "
                    "layer outside the function"
                )
