"""Arguments that no operator's schema can describe: lists of lists, and lists with None in them that the operation fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_kernels.functional._library import Arguments, Flat

__all__ = ["GROUPS", "MOMENTUM"]


def _lower_groups(arguments: Arguments) -> bool:
    groups = arguments["grad_groups"]
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
        return False
    arguments["group_sizes"] = [len(group) for group in groups]
    arguments["grad_groups"] = [grad for group in groups for grad in group]
    return True


def _run_groups(op: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    grads = iter(arguments["grad_groups"])
    groups = [[next(grads) for _ in range(size)] for size in arguments.pop("group_sizes")]
    return op(**{**arguments, "grad_groups": groups})


GROUPS = Flat({"grad_groups": "Tensor[]", "group_sizes": "int[]"}, _lower_groups, _run_groups)


def _lower_momentum(arguments: Arguments) -> bool:
    """None becomes zeros, in the caller's list too: whether the step is skipped is not known before the graph runs."""
    buffers, params = arguments["momentum_buffers"], arguments["params"]
    arguments["first_steps"] = []
    if arguments["momentum"] == 0.0:
        arguments["momentum_buffers"] = []
        return True
    if not isinstance(buffers, list) or not isinstance(params, (list, tuple)) or len(buffers) != len(params):
        return False
    for i, buffer in enumerate(buffers):
        if buffer is None:
            if not isinstance(params[i], Tensor):
                return False
            arguments["first_steps"].append(i)
            buffers[i] = torch.zeros_like(params[i])
    return True


def _run_momentum(op: Callable[..., Any], arguments: Arguments) -> None:
    given, first_steps = arguments["momentum_buffers"], set(arguments.pop("first_steps"))
    buffers = [None if i in first_steps else buffer for i, buffer in enumerate(given)]
    op(**{**arguments, "momentum_buffers": buffers})
    for i in first_steps:
        if buffers[i] is not None:
            given[i].copy_(buffers[i])


MOMENTUM = Flat({"momentum_buffers": "Tensor[]", "first_steps": "int[]"}, _lower_momentum, _run_momentum)
