"""What ``state_dict`` and ``load_state_dict`` need beyond torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sam_kernels.optim._radius import Radius

__all__ = ["keep_wide_state", "with_group_values", "without_callables"]


def without_callables(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Schedules given as functions, or as a ``Radius``, are left out (None): they belong to the program, not to the checkpoint."""
    groups = [
        {key: None if callable(value) or isinstance(value, Radius) else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def with_group_values(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Values the checkpoint does not hold (functions; a plain checkpoint of the base) stay what they are."""
    if len(state_dict["param_groups"]) != len(groups):
        return state_dict  # torch says what is wrong
    merged = []
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        kept = {key: group[key] for key in keys if saved.get(key) is None}
        merged.append({**saved, **kept})
    return {**state_dict, "param_groups": merged}


def keep_wide_state(state: Any, groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Torch casts loaded state to the parameter's dtype; state that was saved wider (float32 moments of bfloat16 parameters) stays wide."""
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and _is_wider(value, param) and value.shape == param.shape:
                state[param][key] = value.detach().to(param.device, copy=True)


def _is_wider(value: Tensor, param: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.float64) and torch.finfo(value.dtype).bits > torch.finfo(param.dtype).bits
