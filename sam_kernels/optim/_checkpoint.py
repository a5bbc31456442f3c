"""What ``state_dict`` and ``load_state_dict`` need beyond torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from sam_kernels._validate import plain_number
from sam_kernels.schedules._radius import Radius

__all__ = ["keep_wide_state", "put_group_values", "with_base", "with_group_values", "with_names", "with_plain_values", "without_names"]

_DEFAULTS = {"direction": "gradient", "descent": "plain"}


def with_base(base_dict: dict[str, Any], groups: Sequence[dict[str, Any]], keys: Mapping[str, str]) -> dict[str, Any]:
    """What the base's ``state_dict`` gave, in torch's format. One of another format is carried whole, beside SAM's own options."""
    saved = base_dict.get("param_groups")
    is_usual = isinstance(base_dict.get("state"), dict) and isinstance(saved, list) and len(saved) == len(groups)
    if is_usual and all(len(each.get("params", ())) == len(group["params"]) for each, group in zip(saved or [], groups, strict=True)):
        # A base may save fewer keys than its groups have.
        options = [{key: group[key] for key in keys.values() if key in group} for group in groups]
        return {**base_dict, "param_groups": [{**own, **each} for own, each in zip(options, saved or [], strict=True)]}
    ids = count()
    own_groups = [{**{key: group[key] for key in keys.values()}, "params": [next(ids) for _ in group["params"]]} for group in groups]
    return {"base_optimizer": base_dict, "state": {}, "param_groups": own_groups}


def put_group_values(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], keys: Mapping[str, str]) -> None:
    """SAM's options out of a checkpoint whose groups hold nothing else."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        group.update({key: saved[key] for key in keys.values() if key in saved})


def with_plain_values(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Schedules given as functions, or as a ``Radius``, are left out (None): they belong to the program, not to the checkpoint. NumPy's
    numbers become Python's, so that ``torch.load`` takes the checkpoint."""
    groups = [
        {key: None if callable(value) or isinstance(value, Radius) else plain_number(value) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def with_names(state_dict: dict[str, Any], direction: str, descent: str) -> dict[str, Any]:
    """Notes in each group whose state this is: what is kept for one direction means nothing to another. The usual ones go unsaid."""
    names = {key: name for key, name in (("direction", direction), ("descent", descent)) if name != _DEFAULTS[key]}
    return {**state_dict, "param_groups": [{**group, **names} for group in state_dict["param_groups"]]} if names else state_dict


def without_names(state_dict: dict[str, Any], direction: str, descent: str, step_key: str) -> dict[str, Any]:
    """The way back. Raises ValueError where they are others. The base optimizer's own checkpoint has none, and fits all."""
    for group in state_dict["param_groups"]:
        for key, name in (("direction", direction), ("descent", descent)):
            saved = group.get(key, _DEFAULTS[key] if step_key in group else name)
            if saved != name:
                raise ValueError(f"SAM: the checkpoint is of {key} {saved!r}, this optimizer has {key} {name!r}")
    groups = [{key: value for key, value in group.items() if key not in _DEFAULTS} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def with_group_values(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], keys: Mapping[str, str]) -> dict[str, Any]:
    """Values the checkpoint does not hold (functions; a plain checkpoint of the base) stay what they are."""
    if len(state_dict["param_groups"]) != len(groups):
        return state_dict  # torch says what is wrong
    merged = []
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        kept = {key: group[key] for key in keys.values() if saved.get(key) is None}
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
