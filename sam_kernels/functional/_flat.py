"""Arguments that no operator's schema can describe: lists of lists, and lists with None in them that the operation fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_kernels.functional._library import Arguments, Flat

__all__ = ["BACKUPS", "EMA", "GROUPS", "MOMENTUM"]


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


def _with_gaps(name: str, like: Callable[[Arguments], str], is_used: Callable[[Arguments], bool]) -> Flat:
    """A list whose entries may be None, which the operation fills. None becomes zeros like the tensors of another list, in the caller's
    list too: whether the step is skipped is not known before the graph runs."""

    def lower(arguments: Arguments) -> bool:
        entries, tensors = arguments[name], arguments[like(arguments)]
        arguments["first_steps"] = []
        if not is_used(arguments):
            arguments[name] = []
            return True
        if not isinstance(entries, list) or not isinstance(tensors, (list, tuple)) or len(entries) != len(tensors):
            return False
        for i, entry in enumerate(entries):
            if entry is None:
                if not isinstance(tensors[i], Tensor):
                    return False
                arguments["first_steps"].append(i)
                entries[i] = torch.zeros_like(tensors[i])
        return True

    def run(op: Callable[..., Any], arguments: Arguments) -> Any:
        given, first_steps = arguments[name], set(arguments.pop("first_steps"))
        entries = [None if i in first_steps else entry for i, entry in enumerate(given)]
        result = op(**{**arguments, name: entries})
        for i in first_steps:
            if entries[i] is not None:
                given[i].copy_(entries[i])
        return result

    return Flat({name: "Tensor[]", "first_steps": "int[]"}, lower, run)


def _lower_backups(arguments: Arguments) -> bool:
    if arguments["old_params"] is None:
        arguments["old_params"] = []
        return True
    return len(arguments["old_params"]) > 0 or len(arguments["params"]) == 0


def _run_with_backups(op: Callable[..., Any], arguments: Arguments) -> Any:
    return op(**{**arguments, "old_params": arguments["old_params"] or None})


BACKUPS = Flat({"old_params": "Tensor[]"}, _lower_backups, _run_with_backups)
"""Backups of an update, which some options write: no schema has a list that is written and may be None. Without backups it is empty."""

EMA = _with_gaps("ema", lambda arguments: "grads", lambda arguments: True)
_BUFFERS = _with_gaps(
    "momentum_buffers",
    lambda arguments: "old_params" if arguments["to_old"] is True else "params",
    lambda arguments: arguments["momentum"] != 0.0,
)
MOMENTUM = Flat(
    {**BACKUPS.types, **_BUFFERS.types},
    lambda arguments: _BUFFERS.lower(arguments) and BACKUPS.lower(arguments),
    lambda op, arguments: _BUFFERS.run(lambda **lowered: BACKUPS.run(op, lowered), arguments),
)
