"""Parameter groups: which parameters SAM perturbs, and which ones decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from sam_kernels._validate import check_count, check_flag, check_number, describe
from sam_kernels.optim._types import ParamGroup
from sam_kernels.schedules._at_step import RhoSchedule

__all__ = ["is_norm_layer", "last_layers", "norm_layers", "param_groups"]

RhoOf = Callable[[str, nn.Parameter], RhoSchedule | None]
_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAME_OF_NORM_LAYER = re.compile(r"norm(act)?(\d+d)?$", re.IGNORECASE)  # LlamaRMSNorm, T5LayerNorm
_PARAMETRIZED = ".parametrizations."  # between a layer and its parameters, by torch.nn.utils.parametrize
_LAST = re.compile(r"last:(\d+)")


def norm_layers(model: nn.Module, rho: RhoSchedule | None = None, *, weight_decay: float | None = None) -> list[ParamGroup]:
    """Return parameter groups for SAM on normalisation layers alone (arXiv 2306.04226): ``rho`` for theirs, 0 for all others.

    With ``SAM(sam_kernels.norm_layers(model), ..., freeze_unperturbed=True)`` the first pass computes no other gradients. Arguments,
    result and errors are those of :func:`param_groups` with ``rho_of="norm_layers"``.
    """
    return param_groups(model, weight_decay=weight_decay, rho_of="norm_layers", rho=rho)


def last_layers(model: nn.Module, k: int, rho: RhoSchedule | None = None, *, weight_decay: float | None = None) -> list[ParamGroup]:
    """Return parameter groups for SAM on the last ``k`` layers that own trainable parameters: ``rho`` for theirs, 0 for all others.

    The order is that of ``model.modules()``. Arguments, result and errors are those of :func:`param_groups` with ``rho_of="last:k"``.
    """
    return param_groups(model, weight_decay=weight_decay, rho_of=f"last:{check_count('last_layers', 'k', k, low=1)}", rho=rho)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    decay_embeddings: bool = False,
    rho_of: RhoOf | str | None = None,
    rho: RhoSchedule | None = None,
) -> list[ParamGroup]:
    """Return parameter groups for an optimizer: weight decay for weights alone, and a radius for each parameter.

    Args:
        model: its trainable parameters are listed once each, under the first of their names; those that require no gradient are left out.
        weight_decay: of weights, at least 0. Weights have two or more dimensions and are not called ``bias``; parameters of normalisation
            layers, of embeddings, and those that the model's ``no_weight_decay()`` names, as timm's models have it, are none. All others
            get 0. None: groups set no weight decay, so that the optimizer's applies to all.
        decay_embeddings: embeddings decay too, as in nanoGPT. A weight that an embedding shares with another layer decays either way.
        rho_of: a callable (name, parameter) → ρ, or None for the optimizer's own ρ; ``"norm_layers"`` or ``"last:k"`` for a subset.
            None: groups set no radius.
        rho: of the parameters in a subset; None: the optimizer's own. All other parameters get 0.

    Returns a list of groups with ``"params"``, pairs of name and parameter, and where they are set ``"weight_decay"`` and ``"rho"``.
    Parameters with equal settings share a group. Groups, and parameters within, are in the order of ``model.named_parameters()``.

    A normalisation layer is a ``BatchNorm``, ``InstanceNorm``, ``LayerNorm``, ``GroupNorm`` or ``RMSNorm`` of torch, or a module whose
    class has a name that ends as theirs do (``LlamaRMSNorm``).

    Raises:
        TypeError: for arguments of the wrong type. ValueError: for a model without trainable parameters or with uninitialised ones, for a
            subset that names no trainable parameter or more layers than there are, and where every radius is 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a torch.nn.Module, got {describe(model)}")
    if weight_decay is not None:
        weight_decay = check_number("param_groups", "weight_decay", weight_decay, low=0.0)
    check_flag("param_groups", "decay_embeddings", decay_embeddings)
    found = list(_trainable(model))
    if not found:
        raise ValueError("param_groups: the model has no trainable parameters")
    radius_of = _radii(model, found, rho_of, rho)
    excluded = _not_decayed(model)
    groups: dict[tuple[Any, ...], ParamGroup] = {}
    for each in found:
        options: dict[str, Any] = {}
        if weight_decay is not None:
            is_weight = each.is_weight(decay_embeddings) and excluded.isdisjoint(each.names)
            options["weight_decay"] = weight_decay if is_weight else 0.0
        radius = radius_of(each)
        if radius is not None:
            options["rho"] = radius
        key = tuple((name, value if isinstance(value, int | float | str) else id(value)) for name, value in options.items())
        groups.setdefault(key, {"params": [], **options})["params"].append((each.names[0], each.param))
    made = list(groups.values())
    if all(_is_zero(group.get("rho")) for group in made):
        raise ValueError(
            "param_groups: rho is 0 for every parameter, so that none is perturbed; give one a rho > 0, or use the base optimizer"
        )
    return made


def is_norm_layer(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by its class or the name of its class."""
    return isinstance(module, _NORM_LAYERS) or _NAME_OF_NORM_LAYER.search(type(module).__name__) is not None


@dataclass
class _Found:
    """A trainable parameter, all its names, and the layers that own it."""

    param: nn.Parameter
    names: list[str]
    layers: list[nn.Module]

    @property
    def is_of_norm_layer(self) -> bool:
        return any(map(is_norm_layer, self.layers))

    def is_weight(self, decay_embeddings: bool) -> bool:
        if self.param.dim() < 2 or self.is_of_norm_layer or all(name.rpartition(".")[2] == "bias" for name in self.names):
            return False
        return decay_embeddings or not all(isinstance(layer, nn.Embedding | nn.EmbeddingBag) for layer in self.layers)


def _trainable(model: nn.Module) -> Iterator[_Found]:
    """In the order of ``named_parameters()``. Raises ValueError for a parameter that has no shape yet."""
    found: dict[Tensor, _Found] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(f"param_groups: parameter {name!r} is not initialised yet; run a forward pass of the model first")
        each = found.setdefault(param, _Found(param, [], []))
        each.names.append(name)
        each.layers.append(model.get_submodule(_layer_of(name)))
    yield from found.values()


def _layer_of(name: str) -> str:
    """The name of the layer that owns a parameter; of one that is parametrized, the layer and not the parametrization."""
    layer, is_parametrized, _ = f".{name}".partition(_PARAMETRIZED)
    return layer[1:] if is_parametrized else name.rpartition(".")[0]


def _not_decayed(model: nn.Module) -> set[str]:
    """The names that ``no_weight_decay()`` of the model, or of a model inside a wrapper, gives."""
    found: set[str] = set()
    for path, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            found |= {f"{path}.{name}" if path else name for name in names()}
    return found


def _is_zero(rho: Any) -> bool:
    return isinstance(rho, int | float) and rho == 0


def _radii(model: nn.Module, found: list[_Found], rho_of: Any, rho: Any) -> Callable[[_Found], Any]:
    """The radius of each parameter. Raises TypeError or ValueError for a subset that is none."""
    if rho_of is None or not isinstance(rho_of, str):
        if rho is not None:
            raise ValueError('param_groups: rho is that of a subset, rho_of="norm_layers" or "last:k"; a callable rho_of returns it')
        if rho_of is None:
            return lambda each: None
        if not callable(rho_of):
            raise TypeError(
                f'param_groups: rho_of must be a callable (name, parameter) -> rho, "norm_layers" or "last:k", got {describe(rho_of)}'
            )
        return lambda each: rho_of(each.names[0], each.param)
    subset = _subset(model, found, rho_of)
    return lambda each: rho if id(each.param) in subset else 0.0


def _subset(model: nn.Module, found: list[_Found], name: str) -> set[int]:
    """The identities of the parameters in a subset, which has at least one."""
    match = _LAST.fullmatch(name)
    if name != "norm_layers" and match is None:
        raise ValueError(f'param_groups: rho_of must be "norm_layers", or "last:k" such as "last:2", or a callable, got {name!r}')
    if match is None:
        subset = {id(each.param) for each in found if each.is_of_norm_layer}
        if not subset:
            raise ValueError('param_groups: rho_of="norm_layers", and the model has no normalisation layer with trainable parameters')
        return subset
    owners = {layer for each in found for layer in each.layers}
    k, layers = int(match[1]), [module for module in model.modules() if module in owners]
    if not 1 <= k <= len(layers):
        raise ValueError(f"param_groups: rho_of={name!r}, and the model has {len(layers)} layers that own trainable parameters")
    last = set(layers[-k:])
    return {id(each.param) for each in found if not last.isdisjoint(each.layers)}
