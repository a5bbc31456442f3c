"""The base optimizer that SAM wraps, from a class and its options or from an instance."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_kernels.optim._types import Keywords

__all__ = ["keys_given", "make_base", "materialised"]


def materialised(params: Any) -> Any:
    """``params``, with a list in the place of an iterator, so that it can be read twice."""
    return params if isinstance(params, Tensor | dict | list | tuple) or not isinstance(params, Iterable) else list(params)


def keys_given(params: Any) -> list[set[str]]:
    """The keys of every parameter group, as the caller gave them."""
    is_groups = isinstance(params, list | tuple) and len(params) > 0 and isinstance(params[0], dict)
    return [set(group) for group in params] if is_groups else [{"params"}]


def make_base(params: Any, base: Any, kwargs: Keywords) -> Optimizer:
    """Raises TypeError for what is no optimizer, or one that SAM cannot wrap, ValueError for an instance that has other parameters."""
    if not isinstance(base, Optimizer):
        if not callable(base):
            raise TypeError(f"SAM: base_optimizer must be an optimizer class or instance, got {base!r}")
        if isinstance(base, type) and issubclass(base, Optimizer):
            _check_wrappable(base)
        made = base(params, **kwargs)
        if not isinstance(made, Optimizer):
            raise TypeError(f"SAM: base_optimizer made a {type(made).__name__}, expected a torch.optim.Optimizer")
        _check_wrappable(type(made))
        _check_first_order(made)
        return made
    _check_wrappable(type(base))
    _check_first_order(base)
    if kwargs:
        raise TypeError(f"SAM: {sorted(kwargs)} given beside an instance of {type(base).__name__}; set them on the instance")
    given = params if isinstance(params, Iterable) and not isinstance(params, Tensor) else [params]
    flat: list[Any] = []
    for item in given:
        inner = item["params"] if isinstance(item, dict) else item[1] if isinstance(item, tuple) else item
        flat.extend([inner] if isinstance(inner, Tensor) else inner)
    flat = [item[1] if isinstance(item, tuple) else item for item in flat]
    held = [param for group in base.param_groups for param in group["params"]]
    if {id(param) for param in flat} != {id(param) for param in held}:
        raise ValueError(f"SAM: params ({len(flat)}) are not the parameters of the given {type(base).__name__} ({len(held)})")
    return base


def _check_wrappable(base: type[Optimizer]) -> None:
    if hasattr(base, "second_step") and hasattr(base, "first_step"):
        raise TypeError(f"SAM: the base optimizer is {base.__name__}, which perturbs weights itself; wrap the optimizer inside it once")
    try:
        parameters = list(inspect.signature(base.step).parameters.values())
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each.name for each in parameters[1:] if each.default is inspect.Parameter.empty and each.kind not in kinds]
    if needed:
        raise TypeError(
            f"SAM: {base.__name__}.step needs {', '.join(needed)}: it evaluates the loss by itself, and SAM calls step() with the gradient "
            "of the perturbed point in place; use a base optimizer that steps along .grad"
        )


def _check_first_order(base: Optimizer) -> None:
    if getattr(base, "is_second_order", False):  # as timm's loop asks
        raise TypeError(
            f"SAM: {type(base).__name__} differentiates the gradient in .grad, and the graph of SAM's ends at weights that have been "
            "restored since; use a base optimizer of first order"
        )
