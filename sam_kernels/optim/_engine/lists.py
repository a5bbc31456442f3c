"""The parameters of one group that have a gradient, as lists that are kept between steps."""

from __future__ import annotations

import operator
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sam_kernels import _dispatch
from sam_kernels._memory_of import is_fake, why_no_memory
from sam_kernels._sharding import locals_of
from sam_kernels._tensor_list import TensorList
from sam_kernels._validate import SUPPORTED_DTYPES
from sam_kernels.optim._base.sharded import check_whole
from sam_kernels.optim._shards.dtensor import as_owner, local_grad, local_of
from sam_kernels.optim._shards.layout import WHOLE, layout_of, why_no_layout
from sam_kernels.optim._types import ParamGroup, ParamState

__all__ = [
    "Copies",
    "GroupGrads",
    "GroupLists",
    "Key",
    "MastersOf",
    "address_of",
    "check_grads",
    "check_param",
    "device_of",
    "param_name",
    "same_bits",
    "same_layout",
    "same_tensors",
    "with_grads",
]


Key = tuple[int, int]  # the number of a parameter group, and that of a layout within it


def same_tensors(left: Sequence[Any] | None, right: Sequence[Any]) -> bool:
    """The same objects in the same order."""
    return left is not None and len(left) == len(right) and all(map(operator.is_, left, right))


def address_of(param: Tensor) -> int:
    """Where its memory begins, of a DTensor the rank's part; 0 for one that has none yet, or holds no values."""
    param = local_of(param)
    if is_fake(param) or param.is_meta or param.layout is not torch.strided:
        return 0
    try:
        return param.data_ptr()
    except RuntimeError:  # a wrapper, a tensor of torch.func
        return 0


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Of one dtype and shape, and equal to the last bit. Waits for the device."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.dtype is right.dtype and torch.equal(left.detach().view(kind), right.detach().view(kind))


def param_name(group: ParamGroup, group_index: int, index: int) -> str:
    """How an error message calls a parameter: its name where the optimizer was given names."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"param_groups[{group_index}]['params'][{index}]"


def check_param(group: ParamGroup, group_index: int, index: int) -> None:
    """Raises TypeError, by name, unless the parameter is a dense floating-point tensor or a DTensor of such. (One that requires no gradient
    may be anything.)"""
    param = group["params"][index]
    name = param_name(group, group_index, index)
    check_whole(param, name)
    if (why := why_no_layout(param)) is not None:
        raise TypeError(f"SAM: parameter {name} {why}")
    param = local_of(param)
    if param.layout is not torch.strided:
        raise TypeError(f"SAM: parameter {name} is a {param.layout} tensor; only dense (strided) parameters are supported")
    why = None if is_fake(param) or param.is_meta else why_no_memory(param)  # meta: may get memory before the first step
    if why is not None:
        raise TypeError(f"SAM: parameter {name} {why}")
    if param.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"SAM: parameter {name} has dtype {param.dtype}; supported are {supported}")


def device_of(groups: Sequence[ParamGroup], default: torch.device) -> torch.device:
    """That of the first trainable parameter. Raises TypeError for one that has no memory yet."""
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if param.requires_grad:
                if param.is_meta:
                    raise TypeError(f"SAM: parameter {param_name(group, i, j)} {why_no_memory(param)}")
                return cast(torch.device, param.device)
    return default


def check_grads(group: ParamGroup, group_index: int) -> None:
    """TypeError by name for a gradient that is not dense, or of a parameter that has no memory."""
    for i, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        name = param_name(group, group_index, i)
        if param.is_meta:
            raise TypeError(f"SAM: parameter {name} {why_no_memory(param)}")
        try:
            grad = local_grad(param, param.grad)
        except TypeError as error:
            raise TypeError(f"SAM: the gradient of parameter {name} {error}") from None
        if grad.layout is not torch.strided:
            raise TypeError(f"SAM: the gradient of parameter {name} is a {grad.layout} tensor; only dense gradients are supported")


class Copies:
    """Memory for copies of parameters, or of their gradients: allocated once, outside ``optimizer.state`` so that no checkpoint carries it.

    A copy lives as long as its parameter: one that was replaced or removed takes its copy along.
    """

    def __init__(self) -> None:
        self._copies: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def of(self, params: Sequence[Tensor], originals: Sequence[Tensor] | None = None) -> list[Tensor]:
        """A tensor for each parameter, of the shape, dtype, device and strides of its original (by default the parameter itself); contents
        are whatever was last saved."""
        copies = []
        for param, original in zip(params, params if originals is None else originals, strict=True):
            copy = self._copies.get(param)
            if copy is None or not same_layout(copy, original):
                copy = self._copies[param] = torch.empty_like(original, requires_grad=False)
            copies.append(copy)
        return copies


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Of one shape, memory order, dtype and device."""
    return _layout(left) == _layout(right)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class MastersOf(Protocol):
    """Gives the float32 masters of 16-bit parameters."""

    def of(self, lists: GroupLists) -> list[Tensor]:
        """One for each parameter, as operations take them."""


class GroupLists:
    """Lists over the parameters of one group that have a gradient now, all of one layout, and all with masters or all without.

    ``params``: what operations take. ``owners``: the parameters as the group has them; the same list unless they are DTensors, whose local
    parts ``params`` then holds. ``masters``: gives the parameters' masters, None where they have none. ``written``: of which masters,
    and the owners' versions, as the optimizer has left them.
    """

    def __init__(self, owners: list[Tensor], backups: Copies, masters: MastersOf | None = None) -> None:
        self.layout = layout_of(owners[0])
        params = locals_of(owners)
        self.backend = _dispatch.select(params[0].device.type)
        # FakeTensors (shapes without values, of memory estimators) stay a plain list: operations then run their fake implementations.
        is_usual = all(param.device == params[0].device for param in params) and not any(map(is_fake, params))
        trusted: TensorList | None = self.backend.trust(params) if is_usual else None
        self.params: list[Tensor] = list(params) if trusted is None else trusted
        self.owners = self.params if self.layout is WHOLE else owners
        self.masters = masters
        self.written: tuple[object, list[int]] | None = None
        self._backups = backups
        self._old_params: list[Tensor] | None = None
        self._norm: Tensor | None = None
        self._state_tensors: dict[str, list[Tensor]] = {}
        self._states: list[ParamState] = []
        self.memory: dict[str, tuple[object, list[Tensor]]] = {}  # ParamMemory's: of which version, and what it keeps for these parameters
        self._all_states: list[ParamState] | None = None

    def _has_backend(self, device_type: str) -> bool:
        return self.backend is _dispatch.select(device_type)

    def current_grads(self, params: list[Tensor]) -> TensorList | None:
        """The gradients of ``params``, if these lists describe exactly them and every one has an ordinary gradient; else None."""
        if not isinstance(self.params, TensorList) or not self._has_backend(self.params[0].device.type):
            return None
        if self.layout is WHOLE:
            return self.backend.current_grads(self.params, params)
        return self.backend.current_local_grads(self.params, params) if self._are_owners(params) else None

    def _are_owners(self, params: list[Tensor]) -> bool:
        return self.owners is params or same_tensors(self.owners, params)

    def is_current(self, params: list[Tensor]) -> bool:
        """Whether these lists still describe ``params``: the same tensors where they were, and the backend that would be chosen now."""
        if not self._has_backend(params[0].device.type):
            return False
        return (self.layout is WHOLE or self._are_owners(params)) and self._describes(self.params, params)

    def _describes(self, known: list[Tensor], tensors: list[Tensor]) -> bool:
        if not isinstance(known, TensorList):
            return same_tensors(known, tensors if self.layout is WHOLE else locals_of(tensors))
        is_current = self.backend.is_current if self.layout is WHOLE else self.backend.are_locals_of
        return is_current(known, tensors)

    def _list(self, tensors: list[Tensor]) -> list[Tensor]:
        """A list that operations need not check, where the parameters' list is one."""
        if not isinstance(self.params, TensorList):
            return tensors
        trusted: TensorList | None = self.backend.trust(tensors, self.params)
        return tensors if trusted is None else trusted

    @property
    def weights(self) -> list[Tensor]:
        """What depends on the weights' values is computed from these: masters where there are any, otherwise the parameters."""
        return self.params if self.masters is None else self.masters.of(self)

    @property
    def old_params(self) -> list[Tensor]:
        """Where the parameters are put back from: masters, or backups."""
        if self.masters is not None:
            return self.masters.of(self)
        if self._old_params is None:
            self._old_params = self._list(self._backups.of(self.params))
        return self._old_params

    @property
    def norm(self) -> Tensor:
        """() where the norm of the gradients goes, step after step."""
        if self._norm is None:
            is_double = any(param.dtype is torch.float64 for param in self.params)
            self._norm = torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=self.params[0].device)
        return self._norm

    def grads(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients, of DTensors the rank's parts, as operations take them; they move at every backward pass."""
        return self._list(grads)

    def put_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Makes tensors like ``params``, or None, the gradients of the parameters."""
        for owner, grad in zip(self.owners, grads, strict=True):
            owner.grad = None if grad is None else as_owner(owner, grad)

    def states(self, all_states: dict[Tensor, ParamState]) -> list[ParamState]:
        """The base optimizer's state of each parameter. Looked up anew only when ``base.state`` holds other dictionaries than last time:
        hashing a tensor is a call into Python."""
        if not same_tensors(self._all_states, list(all_states.values())):
            self._states = [all_states[param] for param in self.owners]
            self._all_states = list(all_states.values())
        return self._states

    def has_state(self, key: str, tensors: list[Tensor]) -> bool:
        """Whether ``tensors`` are those of the last step under ``key``, by identity."""
        return same_tensors(self._state_tensors.get(key), tensors)

    def state(self, key: str, tensors: list[Tensor]) -> list[Tensor]:
        """State tensors under ``key`` as operations take them, described anew only when one was replaced or has moved."""
        known = self._state_tensors.get(key)
        if known is None or not self._describes(known, tensors):
            known = self._state_tensors[key] = self._list(tensors if self.layout is WHOLE else locals_of(tensors))
        return known


@dataclass
class GroupGrads:
    """A group's parameters of one layout that have a gradient now, and those gradients."""

    key: Key
    group: ParamGroup
    lists: GroupLists
    grads: list[Tensor]

    @property
    def index(self) -> int:
        """The number of the group."""
        return self.key[0]


def with_grads(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and their gradients."""
    grads = [param.grad for param in params]
    if not all(map(operator.is_not, grads, repeat(None))):
        pairs = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
        return [param for param, _ in pairs], [grad for _, grad in pairs]
    return params, grads  # type: ignore[return-value]  # none of them is None
