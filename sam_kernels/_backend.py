"""What a backend is: an implementation of every operation over lists, and what the dispatcher and the optimizers need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_kernels._tensor_list import TensorList
from sam_kernels.operations import OPERATIONS, Operands, Operation

__all__ = ["Backend", "implementations"]

Implementation = Callable[[Any, Operands], Any]


def implementations(functions: Mapping[str, Any]) -> dict[type[Operation], Implementation]:
    """By class of operation, the function that has its name. Raises KeyError for one that is missing."""
    return {op: functions[op.name] for op in OPERATIONS}


@dataclass(eq=False)
class Backend:
    """One backend for one type of device.

    Attributes:
        name: that of its module within ``sam_kernels.backends``.
        operations: by class of operation, the function that makes it.
        trust: (tensors, like=None) -> a :class:`TensorList` of these tensors if every row is dense and in the memory order of ``like``'s
            (default: its own), None elsewhere.
        current_grads: (known, params) -> the gradients of ``params``, trusted; None unless ``params`` are the tensors of ``known``,
            unmoved, each with an ordinary gradient.
        is_current: (known, tensors) -> whether ``tensors`` are those of ``known``, still where they lay when it was made.
        current_local_grads: (known, owners) -> as ``current_grads``, of DTensors whose local parts are ``known``: the local parts of their
            gradients; None as well where a gradient lies otherwise than its owner.
        are_locals_of: (known, owners) -> as ``is_current``, of DTensors whose local parts are ``known``; or of the tensors of ``known``.
        describe: one line for ``python -m sam_kernels info``.
        device_types: of the tensors it takes; None: every device that torch knows.
        dtypes: those it has kernels for; None: all that operations take.
        is_automatic: whether it is chosen where none is asked for by name.
        knows_skips: whether a step's function returns, without waiting, that the step was skipped.
        refuses_no_memory: whether it raises TypeError for a tensor whose storage was freed.
        reason_missing: why it cannot run here; None where it can.
    """

    name: str
    operations: Mapping[type[Operation], Implementation]
    trust: Callable[..., TensorList | None]
    current_grads: Callable[[TensorList, list[Tensor]], TensorList | None]
    is_current: Callable[[TensorList, list[Tensor]], bool]
    current_local_grads: Callable[[TensorList, list[Tensor]], TensorList | None]
    are_locals_of: Callable[[TensorList, list[Tensor]], bool]
    describe: Callable[[], str]
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    is_automatic: bool = True
    knows_skips: bool = False
    refuses_no_memory: bool = True
    reason_missing: str | None = None

    def takes(self, device_type: str) -> bool:
        """Whether it has kernels for tensors on devices of this type."""
        return self.device_types is None or device_type in self.device_types

    def run(self, op: Operation, lists: Operands) -> Any:
        """Makes ``op`` of lists that :mod:`sam_kernels._grouping` made. What is returned the operation's class says."""
        return self.operations[type(op)](op.on(lists.device), lists)
