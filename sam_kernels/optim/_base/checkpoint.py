"""What ``state_dict`` and ``load_state_dict`` need beyond torch's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._sharding import is_dtensor
from sam_kernels._validate import plain_number
from sam_kernels.optim._engine.warn import warn_user
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._types import ParamGroup, StateDict
from sam_kernels.schedules._radius import Radius

__all__ = [
    "base_part",
    "check_sizes",
    "check_tensors",
    "keep_wide_state",
    "put_group_values",
    "put_radii_back",
    "warn_of_functions",
    "with_base",
    "with_group_values",
    "with_plain_values",
]

_BASE = "sam_base_optimizer"
_OF_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_KEPT_BY = {torch.optim.SGD: ("momentum_buffer",), torch.optim.Adam: _OF_ADAM, torch.optim.AdamW: _OF_ADAM}  # of the parameter's shape
_KEPT = ("momentum_buffer", *_OF_ADAM, "square_avg")  # by some optimizer of torch's


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
        {key: None if _is_function(value) else plain_number(value) for key, value in group.items()} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def with_group_values(state_dict: StateDict, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> StateDict:
    """Values the checkpoint does not hold (functions; a plain checkpoint of the base) stay what they are."""
    merged = []
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        kept = {key: group[key] for key in keys.values() if saved.get(key) is None}
        merged.append({**saved, **kept})
    return {**state_dict, "param_groups": merged}


def warn_of_functions(state_dict: StateDict, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> None:
    """Warns where a number takes the place of the program's function (or ``Radius``), or a function's place is left to a number."""
    for i, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for key in keys.values():
            if key not in saved or _is_function(group.get(key)) is (saved[key] is None):
                continue
            where = f"param_groups[{i}][{key!r}]"
            if saved[key] is None:
                warn_user(
                    f"SAM: {where} was a function when the checkpoint was saved, which has none, and is {group[key]!r} here; make the "
                    "optimizer with the same function, or put it into param_groups after loading"
                )
            else:
                warn_user(
                    f"SAM: {where} is {saved[key]!r} in the checkpoint, and takes the place of the function that the optimizer was made "
                    f"with; to keep the function, set {key!r} to None in the checkpoint, or put it into param_groups after loading"
                )
            return


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, Radius)


def check_sizes(state_dict: StateDict, groups: Sequence[ParamGroup]) -> None:
    """Raises ValueError for another number of groups, or of parameters in one."""
    saved, sizes = ([len(group["params"]) for group in each] for each in (state_dict["param_groups"], groups))
    if len(saved) != len(sizes):
        raise ValueError(f"SAM: the checkpoint has a different number of parameter groups: {len(saved)}, the optimizer {len(sizes)}")
    if saved != sizes:
        raise ValueError(f"SAM: the checkpoint has {saved} parameters in its groups, which doesn't match the optimizer's {sizes}")


def check_tensors(state_dict: StateDict, base: Optimizer, kept: Collection[str], *, are_whole: bool = False) -> None:
    """Raises ValueError for a tensor that has not the shape of its parameter, or is divided among the ranks in another way; for state of
    another optimizer than ``base``, where that is torch's SGD, Adam or AdamW.

    Of the state of any other base, tensors are compared where the live one has the parameter's shape. ``kept``: keys of the direction and
    the descent rule. ``are_whole``: tensors are not divided, whatever their parameters are.
    """
    params = [param for group in base.param_groups for param in group["params"]]
    ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    state, own = state_dict.get("state"), _KEPT_BY.get(type(base))
    if len(ids) != len(params) or not isinstance(state, dict):  # torch says what is wrong
        return
    for saved_id, param in zip(ids, params, strict=True):
        entry, live = state.get(saved_id), base.state.get(param)
        if not isinstance(entry, dict):
            continue
        if own is not None and not any(key in entry for key in own) and (foreign := [key for key in _KEPT if key in entry]):
            raise ValueError(
                f"SAM: the checkpoint has {foreign[0]!r}, which {type(base).__name__} does not keep: it is of another base optimizer"
            )
        for key, value in entry.items():
            alike = live.get(key) if isinstance(live, dict) else None
            is_known = key in kept or key in (own or ())
            is_known = is_known or (isinstance(alike, Tensor) and alike.dim() > 0 and alike.shape == param.shape)
            if is_known and isinstance(value, Tensor):
                _check_shape(key, value, param)
                if not are_whole:
                    _check_parts(key, value, param)


def _check_shape(key: str, value: Tensor, param: Tensor) -> None:
    if value.shape != param.shape:
        raise ValueError(f"SAM: {key} in the checkpoint has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")


def _check_parts(key: str, value: Tensor, param: Tensor) -> None:
    if is_dtensor(value) is not is_dtensor(param):
        kinds = ("a DTensor", "an ordinary tensor") if is_dtensor(value) else ("an ordinary tensor", "a DTensor")
        raise ValueError(
            f"SAM: {key} in the checkpoint is {kinds[0]}, its parameter {kinds[1]}; load it with set_optimizer_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)), which divides whole tensors among the ranks"
        )
    if local_of(value).shape != local_of(param).shape:
        raise ValueError(
            f"SAM: {key} in the checkpoint is divided among the ranks otherwise than its parameter; save and load with "
            "torch.distributed.checkpoint, which divides it anew"
        )


def put_radii_back(groups: Sequence[ParamGroup], before: Sequence[ParamGroup]) -> None:
    """Torch has copied the radii that a checkpoint does not hold, with what they know of the run; the program's own are meant."""
    for group, earlier in zip(groups, before, strict=False):
        group.update({key: value for key, value in earlier.items() if isinstance(value, Radius) and isinstance(group.get(key), Radius)})


def keep_wide_state(state: Any, groups: Sequence[ParamGroup], state_dict: StateDict, *, of_masters: bool) -> None:
    """Torch casts loaded state to the parameter's dtype; state that was saved wider (float32 moments of bfloat16 parameters) stays wide.

    ``of_masters``: all of it, factored moments too, since the base steps on float32 masters.
    """
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and _is_wider(value, param) and (of_masters or value.shape == param.shape):
                state[param][key] = value.detach().to(param.device, copy=True)


def _is_wider(value: Tensor, param: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.float64) and torch.finfo(value.dtype).bits > torch.finfo(param.dtype).bits
