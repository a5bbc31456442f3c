"""What ``state_dict`` and ``load_state_dict`` need beyond torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from sam_kernels._validate import plain_number
from sam_kernels.optim._types import ParamGroup, StateDict
from sam_kernels.schedules._radius import Radius

__all__ = [
    "Names",
    "base_part",
    "keep_wide_state",
    "put_group_values",
    "put_radii_back",
    "with_base",
    "with_group_values",
    "with_plain_values",
]

_BASE = "sam_base_optimizer"
_DEFAULTS = {"direction": "gradient", "descent": "plain"}


def with_base(base_dict: StateDict, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> StateDict:
    """What the base's ``state_dict`` gave, in torch's format. One of another format is carried whole, beside SAM's own options."""
    saved = base_dict.get("param_groups")
    is_usual = isinstance(base_dict.get("state"), dict) and isinstance(saved, list) and len(saved) == len(groups)
    if is_usual and all(len(each.get("params", ())) == len(group["params"]) for each, group in zip(saved or [], groups, strict=True)):
        # A base may save fewer keys than its groups have.
        options = [{key: group[key] for key in keys.values() if key in group} for group in groups]
        return {**base_dict, "param_groups": [{**own, **each} for own, each in zip(options, saved or [], strict=True)]}
    ids = count()
    own_groups = [{**{key: group[key] for key in keys.values()}, "params": [next(ids) for _ in group["params"]]} for group in groups]
    return {_BASE: base_dict, "state": {}, "param_groups": own_groups}


def base_part(state_dict: StateDict, step_key: str) -> StateDict | None:
    """What a base of another format saved; None where the checkpoint is in torch's format, which a base may have added keys to."""
    if "param_groups" not in state_dict:
        return state_dict  # from a run without SAM
    is_ours = _BASE in state_dict and all(step_key in group for group in state_dict["param_groups"])
    return state_dict[_BASE] if is_ours else None


def put_group_values(state_dict: StateDict, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> None:
    """SAM's options out of a checkpoint whose groups hold nothing else."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        group.update({key: saved[key] for key in keys.values() if key in saved})


def with_plain_values(state_dict: StateDict) -> StateDict:
    """Schedules given as functions, or as a ``Radius``, are left out (None): they belong to the program, not to the checkpoint. NumPy's
    numbers become Python's, so that ``torch.load`` takes the checkpoint."""
    groups = [
        {key: None if callable(value) or isinstance(value, Radius) else plain_number(value) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@dataclass(frozen=True, slots=True)
class Names:
    """Whose state it is: what is kept for one direction means nothing to another. ``keys`` says where the names lie in a group."""

    direction: str
    descent: str
    keys: Mapping[str, str]

    def added(self, state_dict: StateDict) -> StateDict:
        """``state_dict`` with the names in each group. The usual ones go unsaid."""
        names = {self.keys[part]: name for part, name in self._both() if name != _DEFAULTS[part]}
        return {**state_dict, "param_groups": [{**group, **names} for group in state_dict["param_groups"]]} if names else state_dict

    def removed(self, state_dict: StateDict, step_key: str) -> StateDict:
        """The way back. Raises ValueError where they are others. The base optimizer's own checkpoint has none, and fits all."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            self.remove(group, is_ours=step_key in group)
        return {**state_dict, "param_groups": groups}

    def remove(self, group: ParamGroup, *, is_ours: bool) -> None:
        """Takes the names out of a group. ``is_ours``: what goes unsaid is the usual name, otherwise any."""
        for part, name in self._both():
            saved = group.get(self.keys[part], _DEFAULTS[part] if is_ours else name)
            if saved != name:
                raise ValueError(f"SAM: the checkpoint is of {part} {saved!r}, this optimizer has {part} {name!r}")
        for key in self.keys.values():
            group.pop(key, None)

    def _both(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("direction", self.direction), ("descent", self.descent)


def with_group_values(state_dict: StateDict, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> StateDict:
    """Values the checkpoint does not hold (functions; a plain checkpoint of the base) stay what they are."""
    merged = []
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        kept = {key: group[key] for key in keys.values() if saved.get(key) is None}
        merged.append({**saved, **kept})
    return {**state_dict, "param_groups": merged}


def put_radii_back(groups: Sequence[ParamGroup], before: Sequence[ParamGroup]) -> None:
    """Torch has copied the radii that a checkpoint does not hold, with what they know of the run; the program's own are meant."""
    for group, earlier in zip(groups, before, strict=False):
        group.update({key: value for key, value in earlier.items() if isinstance(value, Radius) and isinstance(group.get(key), Radius)})


def keep_wide_state(state: Any, groups: Sequence[ParamGroup], state_dict: StateDict) -> None:
    """Torch casts loaded state to the parameter's dtype; state that was saved wider (float32 moments of bfloat16 parameters) stays wide."""
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and _is_wider(value, param) and value.shape == param.shape:
                state[param][key] = value.detach().to(param.device, copy=True)


def _is_wider(value: Tensor, param: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.float64) and torch.finfo(value.dtype).bits > torch.finfo(param.dtype).bits
