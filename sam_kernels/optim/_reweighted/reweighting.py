"""How RW-SAM weights a batch: its options, checked, and which parameters norms are over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sam_kernels._validate import check_choice, check_count, check_flag, check_number, check_seed, describe
from sam_kernels.optim._base.options import store_plain
from sam_kernels.optim.groups import is_norm_layer

__all__ = ["NORMS", "Reweighting", "check_modules", "chosen_modules"]

NORMS = ("exact", "finite_difference", "jvp", "last_layer", "norm_layers")


@dataclass(frozen=True)
class Reweighting:
    """The options of :class:`sam_kernels.RWSAM` that do not change from step to step. Raises TypeError or ValueError."""

    norms: str  # one of NORMS, or "modules"
    modules: tuple[nn.Module, ...]  # those of "modules", otherwise none
    micro_batch: int
    sampling: str
    draws: int
    replacement: bool
    delta: float
    delta_scaling: str
    distribution: str
    num_directions: int
    seed: int
    unsupported: str

    def __post_init__(self) -> None:
        store_plain(self)
        for name in ("micro_batch", "draws", "num_directions"):
            object.__setattr__(self, name, check_count("RWSAM", name, getattr(self, name), low=1))
        if not self.modules:
            check_choice("RWSAM", "norms", self.norms, NORMS)
        check_choice("RWSAM", "sampling", self.sampling, ("weights", "draw"))
        check_flag("RWSAM", "replacement", self.replacement)
        check_number("RWSAM", "delta", self.delta, low=0.0, open_low=True)
        check_choice("RWSAM", "delta_scaling", self.delta_scaling, ("sqrt_d", "unit"))
        check_choice("RWSAM", "distribution", self.distribution, ("rademacher", "normal"))
        object.__setattr__(self, "seed", check_seed("RWSAM", "seed", self.seed))
        check_choice("RWSAM", "unsupported", self.unsupported, ("error", "verify", "vmap"))

    @property
    def is_directional(self) -> bool:
        """Whether norms are estimated from slopes along random directions."""
        return self.norms in ("finite_difference", "jvp")


def check_modules(model: nn.Module, norms: Any) -> tuple[nn.Module, ...]:
    """A list of modules of the model. Raises TypeError or ValueError."""
    if not isinstance(norms, Iterable):
        raise TypeError(f"RWSAM: norms must be one of {', '.join(NORMS)} or a list of modules of the model, got {describe(norms)}")
    modules, known = tuple(norms), set(model.modules())
    if not modules:
        raise ValueError(f"RWSAM: norms is an empty list; give modules of the model, or one of {', '.join(NORMS)}")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module) or module not in known:
            raise ValueError(f"RWSAM: norms[{i}] ({describe(module)}) is no module of the model")
    return modules


def chosen_modules(model: nn.Module, norms: str) -> list[nn.Module]:
    """The layers that ``"last_layer"`` and ``"norm_layers"`` mean. Raises ValueError for a model that has none."""
    owners = [module for module in model.modules() if any(param.requires_grad for param in module.parameters(recurse=False))]
    found: list[nn.Module] = owners[-1:]
    if norms == "norm_layers":
        found = [module for module in owners if is_norm_layer(module)]
    if norms in ("last_layer", "norm_layers") and not found:
        raise ValueError(f"RWSAM: norms={norms!r}, and the model has no such layer with trainable parameters")
    return found
