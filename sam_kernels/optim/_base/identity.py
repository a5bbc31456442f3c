"""Parameters have identity: each lies in memory of its own, once, so that a backup of it is one of its unperturbed values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._memory_of import ORDINARY_TYPES, is_fake
from sam_kernels._sharding import is_dtensor
from sam_kernels.optim._base.sharded import check_no_sharding_optimizer
from sam_kernels.optim._engine.lists import address_of, check_param, param_name
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._shards.layout import layout_of
from sam_kernels.optim._shards.shards import Shards
from sam_kernels.optim._types import ParamGroup

__all__ = ["IdentityCheck"]


class IdentityCheck:
    """Remembers which parameters it has seen, so that a step costs a comparison of lists only where a list was made anew."""

    def __init__(self, process_group: Any = None) -> None:
        self._seen: list[tuple[Any, ...]] = []
        self._process_group = process_group
        self.shards = Shards((), process_group)

    def __call__(self, groups: Sequence[ParamGroup]) -> None:
        """Check every parameter that requires a gradient; others are never perturbed.

        Raises: TypeError for one that no kernel takes, ValueError for one that is listed twice or shares memory with another one.
        """
        now = [_signature(param) for group in groups for param in group["params"]]
        if now == self._seen:
            return
        places: dict[int, tuple[int, int]] = {}
        for i, group in enumerate(groups):
            check_no_sharding_optimizer(group)
            for j, param in enumerate(group["params"]):
                if not param.requires_grad:
                    continue
                check_param(group, i, j)
                if id(param) in places:
                    first = param_name(groups[places[id(param)][0]], *places[id(param)])
                    name = f"param_groups[{i}]['params'][{j}]" if first == param_name(group, i, j) else param_name(group, i, j)
                    raise ValueError(f"SAM: parameter {name} is {first} as well; list it once")
                places[id(param)] = i, j
        _check_memory(groups, list(places.values()))
        self.shards = Shards([param for group in groups for param in group["params"]], self._process_group)
        self._seen = now


def _signature(param: Tensor) -> tuple[Any, ...]:
    """What the check depends on. A number is no identity for good: a new tensor may get that of one that is gone."""
    kind: tuple[Any, ...] = id(param), param.requires_grad, type(param)
    if is_dtensor(param):
        kind, param = (*kind, layout_of(param)), local_of(param)
    if not param.requires_grad or type(param) not in ORDINARY_TYPES or param.layout is not torch.strided or param.is_nested:
        return kind
    return *kind, param.dtype, param.device, param.shape, param.stride(), address_of(param)


def _check_memory(groups: Sequence[ParamGroup], places: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError where elements of two parameters, or two elements of one, lie in the same place."""
    spans = []
    for i, j in places:
        param = local_of(groups[i]["params"][j])
        if param.numel() == 0 or param.is_meta or is_fake(param):
            continue
        begin = param.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
        if _overlaps_itself(param):
            raise ValueError(
                f"SAM: parameter {param_name(groups[i], i, j)} is expanded: several of its elements are one place in memory; clone it"
            )
        spans.append((str(param.device), begin, begin + reach * param.element_size(), (i, j)))
    spans.sort()
    end, open_spans = 0, []  # spans that begin before the furthest end so far, which only interleaved views do
    device = ""
    for span in spans:
        if span[0] != device or span[1] >= end:
            device, end, open_spans = span[0], span[2], [span]
            continue
        for other in open_spans:
            if span[1] < other[2] and _overlap(groups, other[3], span[3]):
                first, second = (param_name(groups[i], i, j) for i, j in (other[3], span[3]))
                raise ValueError(
                    f"SAM: parameters {first} and {second} share memory; list one of them, or the tensor that both are views of"
                )
        open_spans.append(span)
        end = max(end, span[2])


def _overlaps_itself(param: Tensor) -> bool:
    """Whether two elements lie in the same place."""
    end = 1  # of what the dimensions of shorter strides span, in elements
    for stride, size in sorted((stride, size) for stride, size in zip(param.stride(), param.shape, strict=True) if size > 1):
        if stride < end:  # in each other's gaps, perhaps
            places = _bytes_of(param, param.data_ptr()).sort().values
            return stride == 0 or bool((places[1:] == places[:-1]).any())
        end += (size - 1) * stride
    return False


def _overlap(groups: Sequence[ParamGroup], *places: tuple[int, int]) -> bool:
    """Whether two parameters whose spans of memory meet have a byte in common."""
    left, right = (local_of(groups[i]["params"][j]) for i, j in places)
    if left.is_contiguous() and right.is_contiguous():
        return True
    begin = min(left.data_ptr(), right.data_ptr())
    return bool(torch.isin(_bytes_of(left, begin), _bytes_of(right, begin)).any())


def _bytes_of(param: Tensor, begin: int) -> Tensor:  # (bytes,) int64
    """Where the bytes of a strided tensor lie, counted from ``begin``."""
    at = torch.tensor([param.data_ptr() - begin], device="cpu")
    for length, stride in zip((*param.shape, param.element_size()), (*[s * param.element_size() for s in param.stride()], 1), strict=True):
        at = (at.unsqueeze(1) + torch.arange(length, device="cpu") * stride).flatten()
    return at
