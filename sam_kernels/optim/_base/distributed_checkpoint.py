"""What ``torch.distributed.checkpoint`` leaves out of the checkpoint that it hands to ``load_state_dict``.

``set_optimizer_state_dict`` makes that checkpoint from the one that its caller gave. From the flat form
(``flatten_optimizer_state_dict=True``) it takes the keys of the live groups and of the live state alone, and puts an empty dictionary where
one is missing. Names and averages are under other keys: in the live state a base would take an average for its own (Adam: a parameter that
has one for initialised). From the nested form it drops parameters that the model has not. So the caller's checkpoint is looked for where
torch has it: an argument of its function, a few frames up.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, distributed
from torch.optim import Optimizer

from sam_kernels.optim._base.checkpoint import check_tensors
from sam_kernels.optim._base.names import Names
from sam_kernels.optim._types import StateDict

__all__ = ["check_given", "check_is_whole", "completed", "is_torch_loading"]

_GROUPS = "param_groups."
_FRAMES_LOOKED_AT = 8  # between torch's function and a hook of the base's load_state_dict
_MODULE, _FUNCTION = "torch.distributed.checkpoint.state_dict", "_load_optim_state_dict"


def is_torch_loading() -> bool:
    """Whether torch's function is calling, on all ranks."""
    return bool(_arguments_of_torch())


def check_is_whole(state_dict: StateDict) -> None:
    """Raises ValueError for what torch makes of a flat checkpoint with ``full_state_dict=True``: one without state.

    With ``broadcast_from_rank0=True`` rank 0 alone comes here; on the others torch (2.13) has raised before.
    """
    if "state" not in state_dict and is_torch_loading():
        raise ValueError(
            "SAM: torch loads no optimizer's flat checkpoint with full_state_dict=True; leave flatten_optimizer_state_dict=True out, "
            "in saving as in loading"
        )


def check_given(names: Names, base: Optimizer, kept: Collection[str], step_key: str) -> tuple[frozenset[tuple[int, str]], Names]:
    """Checks a checkpoint of whole tensors, before torch writes it into live state: with ``full_state_dict=True`` torch asks for the state
    first, and then copies what rank 0 sends into its tensors.

    With ``broadcast_from_rank0=True`` rank 0 checks, and all ranks raise what it raises. Raises: ValueError, as ``SAM.load_state_dict``.

    Returns which of ``kept`` it has not, with the number of the parameter: torch would take the live tensor for what was loaded. And the
    names with the mark that it has: without ``broadcast_from_rank0=True`` torch has a KeyError for one that the live groups have not.
    """
    arguments = _arguments_of_torch()
    info, given = arguments.get("info"), arguments.get("state_dict")
    error: ValueError | None = None
    lacking: frozenset[tuple[int, str]] = frozenset()
    try:
        if isinstance(given, Mapping) and "state" in given:
            _check_no_more(_names_of_groups(given), arguments)
            groups = [dict(group) for group in given["param_groups"]]
            own = [_name(param, info, given) for group in base.param_groups for param in group["params"]]
            for group in groups:
                if not set(own).isdisjoint(group.get("params", ())):
                    names.remove(group, is_ours=step_key in group)
            check_tensors({"state": given["state"], "param_groups": [{"params": own}]}, base, kept, are_whole=True)
            names = names.marked_as(given["param_groups"])
            entries = [given["state"].get(name, {}) for name in own]
            lacking = frozenset((i, key) for i, entry in enumerate(entries) for key in kept if key not in entry)
    except ValueError as refused:
        error = refused
    if getattr(info, "broadcast_from_rank0", False):
        found: list[Any] = [None if error is None else str(error), lacking, names]
        distributed.broadcast_object_list(found, src=0)
        words, lacking, names = found
        if words is not None:
            raise ValueError(words)
    elif error is not None:
        raise error
    return lacking, names


def _name(param: Tensor, info: Any, given: Mapping[str, Any]) -> Any:
    """Under which of its names the checkpoint has a parameter."""
    known = info.fqn_param_mapping.get(param, ())
    return next((name for name in known if name in given["state"]), None)


def completed(state_dict: StateDict, names: Names, kept: Collection[str], *, is_part: bool) -> StateDict:
    """``state_dict`` with what torch has left out of it; itself where it does not come from torch's function.

    Args:
        state_dict: what ``load_state_dict`` was called with.
        names: of the optimizer.
        kept: keys under which tensors of the direction and the descent rule lie in a parameter's state.
        is_part: whether other ranks have other parameters of the model, which a flat checkpoint of the whole model then names as well.

    Raises: ValueError where the flat form lacks an entry that the optimizer has for a parameter; where the checkpoint has parameters that
        no optimizer given to torch has, unless ``StateDictOptions(strict=False)`` allows it (or the form is flat, and ``is_part``).
    """
    arguments = _arguments_of_torch()
    given = arguments.get("state_dict")
    if not isinstance(given, Mapping) or "param_groups" not in state_dict:
        return state_dict
    if "state" in given:
        _check_no_more(_names_of_groups(given), arguments)
        return state_dict
    if not is_part:
        _check_no_more(_names_of_flat(given, state_dict, names), arguments)
    return _unflattened(state_dict, given, names, kept) if given else state_dict  # {}: rank 0 has sent its own


def _arguments_of_torch() -> Mapping[str, Any]:
    """The arguments of torch's function that is calling; empty where it is not."""
    frame = sys._getframe(1) if _MODULE in sys.modules else None
    for _ in range(_FRAMES_LOOKED_AT):
        if frame is None:
            break
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == _MODULE:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _names_of_groups(given: Mapping[str, Any]) -> dict[Any, None]:
    """The parameters of a nested checkpoint, in their order."""
    return dict.fromkeys(chain.from_iterable(group.get("params", ()) for group in given.get("param_groups", ())))


def _names_of_flat(flat: Mapping[str, Any], state_dict: StateDict, names: Names) -> dict[Any, None]:
    """The parameters of a flat checkpoint, in their order: those that have an option which the optimizer's groups have too."""
    options = set(chain.from_iterable(state_dict["param_groups"]))
    pairs = (names.split(key.removeprefix(_GROUPS)) for key in flat if key.startswith(_GROUPS))
    return dict.fromkeys(name for name, key in pairs if key in options or names.is_own(key))


def _check_no_more(saved: Mapping[Any, None], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint has parameters that the optimizers have not."""
    info, optimizers = arguments.get("info"), arguments.get("optimizers", ())
    if not getattr(info, "strict", False) or not all(isinstance(name, str) for name in saved):
        return
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    known = set(chain.from_iterable(info.fqn_param_mapping.get(param, ()) for param in params))  # type: ignore[union-attr]
    more = [name for name in saved if name not in known]
    if more:
        raise ValueError(
            f"SAM: the checkpoint has {len(more)} parameters that the optimizer has not, such as {more[0]!r}; to load those that both "
            "have, use StateDictOptions(strict=False)"
        )


def _unflattened(state_dict: StateDict, flat: Mapping[str, Any], names: Names, kept: Collection[str]) -> StateDict:
    """``state_dict`` with all that ``flat`` has for its parameters: ``state.<parameter>.<key>`` and ``param_groups.<parameter>.<key>``."""
    state = {name: dict(entry) for name, entry in state_dict["state"].items()}
    groups = [dict(group) for group in state_dict["param_groups"]]
    group_of = {name: group for group in groups for name in group["params"]}
    for name, entry in state.items():
        for key, value in entry.items():
            if isinstance(value, dict) and not value and f"state.{name}.{key}" not in flat:
                raise ValueError(f"SAM: the checkpoint has no {key!r} of {name!r}: it is of another base optimizer, or of other options")
        entry.update({key: flat[f"state.{name}.{key}"] for key in kept if f"state.{name}.{key}" in flat})
    for full_key, value in flat.items():
        part, _, rest = full_key.partition(".")
        if part == "state":
            name, _, key = rest.rpartition(".")
            if name in state:
                state[name].setdefault(key, value)
        else:
            name, key = names.split(rest)
            if name in group_of and names.is_own(key):
                group_of[name][key] = value
    return {**state_dict, "state": state, "param_groups": groups}
