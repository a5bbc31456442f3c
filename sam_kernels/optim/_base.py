"""The base optimizer that SAM wraps, from a class and its options or from an instance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["make_base"]


def make_base(params: Any, base: Any, kwargs: dict[str, Any]) -> Optimizer:
    """Raises TypeError for what is no optimizer, ValueError for an instance that has other parameters."""
    if not isinstance(base, Optimizer):
        if not callable(base):
            raise TypeError(f"SAM: base_optimizer must be an optimizer class or instance, got {base!r}")
        made = base(params, **kwargs)
        if not isinstance(made, Optimizer):
            raise TypeError(f"SAM: base_optimizer made a {type(made).__name__}, expected a torch.optim.Optimizer")
        return made
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
