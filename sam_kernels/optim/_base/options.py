"""SAM's own options beside those of a base optimizer that may use the same names: as keywords, and as keys of parameter groups."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._validate import check_number, plain_number
from sam_kernels.optim._types import ParamGroup

__all__ = [
    "check_earlier_values",
    "check_group_names",
    "check_group_options",
    "check_keywords",
    "check_max_norm",
    "group_keys",
    "store_plain",
    "takes",
]

# Of the whole optimizer, by names that nobody else has a use for in a group.
_NOT_OF_GROUPS = frozenset(
    {
        "norm_eps",
        "max_grad_norm",
        "local_ascent",
        "preserve_rng_state",
        "check_finite",
        "freeze_unperturbed",
        "master_weights",
        "stochastic_rounding",
    }
)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return {}


def takes(base: Any, name: str) -> bool | None:
    """Whether an optimizer class or factory takes the keyword ``name``; None where its signature does not tell (``**kwargs``).

    A class that hands ``**kwargs`` on takes what the classes it is made from take.
    """
    while isinstance(base, functools.partial):
        base = base.func
    signatures = [_parameters(base)]
    if isinstance(base, type):
        makers = (cls.__dict__.get("__init__") for cls in base.__mro__ if cls not in (Optimizer, object))
        signatures += [_parameters(each) for each in makers if each is not None]
    for parameters in signatures:
        if name in parameters:
            return True
        if parameters and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            return False
    return None


def _own_keywords(optimizer_type: type[Optimizer]) -> set[str]:
    """Keyword-only arguments of the class and of its bases."""
    found: set[str] = set()
    for cls in optimizer_type.__mro__:
        if cls is Optimizer:
            break
        if "__init__" in cls.__dict__:
            found |= {name for name, each in _parameters(cls.__dict__["__init__"]).items() if each.kind is inspect.Parameter.KEYWORD_ONLY}
    return found


def check_keywords(
    optimizer_type: type[Optimizer], base: Any, given: Collection[str], shared: Collection[str], made: Optimizer | None = None
) -> None:
    """Refuse a keyword that both the optimizer and the class of its base take: which of them is meant cannot be known.

    ``shared``: keywords that are never ambiguous. A base instance, or a keyword bound by ``functools.partial``, settles the base's value.
    ``made``: what ``base`` has made, once it has: where a signature did not tell (``**kwargs``), its defaults do.

    Raises: TypeError that names the keyword and both ways to write it.
    """
    if isinstance(base, Optimizer) or not callable(base):
        return
    bound: Collection[str] = base.keywords if isinstance(base, functools.partial) else ()
    name_of_base = getattr(base.func if isinstance(base, functools.partial) else base, "__name__", type(base).__name__)
    own = optimizer_type.__name__
    for name in sorted((_own_keywords(optimizer_type) & set(given)) - set(shared) - set(bound)):
        takes_it = takes(base, name)
        if takes_it or (takes_it is None and made is not None and name in made.defaults):
            raise TypeError(
                f"{own}: {name} is an option of {own} and of {name_of_base}; to set {own}'s, give the base its own value as well: "
                f"{own}(..., functools.partial({name_of_base}, {name}=...), {name}=...); to set the base's alone, leave {name} out"
            )
    if "eps" in given and takes(base, "eps") is False:
        raise TypeError(f"{own}: eps is an option of the base optimizer, and {name_of_base} names none; {own}'s own is norm_eps")


def group_keys(names: Sequence[str], base: Optimizer, given: Sequence[Collection[str]]) -> dict[str, str]:
    """Option -> key in the parameter groups: its own name, or ``sam_<name>`` where the base has an option so named.

    ``given``: the keys that the caller gave in each group. A key that is in a group without having been given is the base's as well.

    Raises: ValueError where the base has taken both names.
    """
    taken = set(base.defaults)
    for group, names_given in zip(base.param_groups, given, strict=False):
        taken |= set(group) - set(names_given)
    keys: dict[str, str] = {}
    for name in names:
        keys[name] = f"sam_{name}" if name in taken else name
        if keys[name] != name and keys[name] in base.defaults:
            raise ValueError(f"SAM: {type(base).__name__} has options {name!r} and {keys[name]!r} of its own; no key is left for SAM's")
    return keys


def store_plain(options: Any) -> None:
    """NumPy's numbers among the fields of a frozen dataclass become Python's."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain_number(getattr(options, field.name)))


def check_max_norm(max_norm: Any) -> float | None:
    """Infinity is one, as for ``clip_grad_norm_``: it clips nothing."""
    max_norm = plain_number(max_norm)
    if max_norm is None or (isinstance(max_norm, int | float) and max_norm == math.inf):
        return None if max_norm is None else math.inf
    return check_number("SAM", "max_grad_norm", max_norm, low=0.0)


def check_group_names(group: ParamGroup, given: Collection[str], index: int, keys: Mapping[str, str], base: Optimizer) -> None:
    """Settle the keys that a caller gave in a new group: ``sam_<name>`` is always SAM's; ``<name>`` is refused where the base has it too.

    Raises: ValueError.
    """
    for name, key in keys.items():
        if key != name:
            if name in given:
                raise ValueError(
                    f"SAM: param_groups[{index}][{name!r}] is an option of SAM and of {type(base).__name__}; write {key!r} for SAM's, and "
                    f"give the base's by an instance of {type(base).__name__}, or by base_optimizer.add_param_group"
                )
        elif f"sam_{name}" in given:
            if name in given:
                raise ValueError(f"SAM: param_groups[{index}] has {name!r} and {f'sam_{name}'!r}; give one of them")
            group[name] = group.pop(f"sam_{name}")


def check_group_options(groups: Sequence[ParamGroup], base: Optimizer) -> None:
    """Refuse an option of the whole optimizer in a parameter group, where nobody reads it. skorch's ``set_params`` writes it there.

    An option of that name of the base (LAMB's ``max_grad_norm``) is the base's. Raises: ValueError.
    """
    for i, group in enumerate(groups):
        if not group.keys().isdisjoint(_NOT_OF_GROUPS):
            for name in sorted(_NOT_OF_GROUPS.intersection(group) - set(base.defaults)):
                raise ValueError(
                    f"SAM: param_groups[{i}][{name!r}] is an option of the whole optimizer and does nothing in a group; give it to the "
                    f"constructor, SAM(..., {name}={group[name]!r})"
                )


def check_earlier_values(base: Optimizer, values: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Refuse a base instance whose groups hold other values of SAM's options, of an earlier SAM around it or of a checkpoint.

    ``values``: by key, what the optimizer is made with. Raises: ValueError.
    """
    for i, group in enumerate(base.param_groups):
        if keys["sam_step"] not in group:
            continue  # options that the caller gave a group go first, as torch's do
        for key, value in values.items():
            earlier = group.get(key)
            if earlier is not None and not _is_equal(earlier, value):
                raise ValueError(
                    f"SAM: param_groups[{i}][{key!r}] is {earlier!r}, of an earlier SAM around this {type(base).__name__} or of a "
                    f"checkpoint, and the optimizer is made with {value!r}; give it {earlier!r}, or delete {key!r} from the groups first "
                    "(to resume, make the optimizer first and load the checkpoint into it)"
                )


def _is_equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return left is right or (not callable(left) and not callable(right) and float(left) == float(right))
    return bool(left == right)
