"""How RW-SAM weights a batch: its options, checked, and which parameters norms are over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sam_kernels._validate import check_choice, check_count, check_flag, check_number, check_seed, describe
from sam_kernels.optim._base.options import store_plain
from sam_kernels.optim._engine.lists import param_name
from sam_kernels.optim.groups import is_norm_layer

__all__ = ["NORMS", "Reweighting", "check_modules", "check_owned", "checked_losses", "chosen_modules"]

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
    beta_scale: str
    norm_cap: float | None

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
        check_choice("RWSAM", "beta_scale", self.beta_scale, ("none", "std"))
        if self.norm_cap is not None:
            object.__setattr__(self, "norm_cap", check_number("RWSAM", "norm_cap", self.norm_cap, low=0.0, open_low=True))

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


def check_owned(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError for a parameter of the groups that is none of the model's."""
    known = set(map(id, model.parameters()))
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in known:
                raise ValueError(f"RWSAM: parameter {param_name(group, i, j)} is no parameter of the model")


def chosen_modules(model: nn.Module, norms: str) -> list[nn.Module]:
    """The layers that ``"last_layer"`` and ``"norm_layers"`` mean. Raises ValueError for a model that has none."""
    owners = [module for module in model.modules() if any(param.requires_grad for param in module.parameters(recurse=False))]
    found: list[nn.Module] = owners[-1:]
    if norms == "norm_layers":
        found = [module for module in owners if is_norm_layer(module)]
    if norms in ("last_layer", "norm_layers") and not found:
        raise ValueError(f"RWSAM: norms={norms!r}, and the model has no such layer with trainable parameters")
    return found


def checked_losses(losses: Any, how: Reweighting) -> Tensor:  # (B,)
    """What a closure has returned. Raises TypeError or ValueError where it is not the losses of the samples."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"RWSAM: the closure must return the samples' losses, a floating-point tensor, got {describe(losses)}")
    if losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"RWSAM: the closure must return losses of shape (B,), one for each sample, got {tuple(losses.shape)}; use "
            "reduction='none', average over everything but the batch, and leave backward() to the optimizer"
        )
    if len(losses) % how.micro_batch:
        raise ValueError(f"RWSAM: {len(losses)} losses cannot be cut into micro-batches of {how.micro_batch}")
    if how.sampling == "draw" and not how.replacement and how.draws > len(losses) // how.micro_batch:
        raise ValueError(f"RWSAM: draws={how.draws} without replacement, of {len(losses) // how.micro_batch}")
    return losses
