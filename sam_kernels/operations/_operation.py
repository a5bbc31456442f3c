"""What an operation over lists of tensors is: a value, whose fields are the options, and whose class tells how each list is used."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["ANY", "NOT_NEGATIVE", "Access", "Limits", "Number", "Operands", "Operation", "number_on"]

_Op = TypeVar("_Op", bound="Operation")
Number = float | Tensor  # () or one element, float32 or float64, on the CPU or the device of the lists


class Access(Enum):
    """How an operation uses a list. The value is the number of sweeps; one sweep reads or writes N elements once."""

    READ = "read"
    WRITTEN = "written"
    UPDATED = "updated"  # read and written

    @property
    def sweeps(self) -> int:
        return 2 if self is Access.UPDATED else 1


class Limits:
    """The finite numbers that an option may be: [low, high], without an end that is open; None is no end."""

    def __init__(self, low: float | None = None, high: float | None = None, *, open_low: bool = False) -> None:
        largest = sys.float_info.max
        self.low, self.high, self.open_low = low, high, open_low
        # The same as a closed interval of floats, which is quick to compare with
        self.least = -largest if low is None else math.nextafter(low, largest) if open_low else low
        self.most = largest if high is None else high


ANY, NOT_NEGATIVE = Limits(), Limits(low=0.0)


class Operands(dict[str, list[Tensor]]):
    """The lists of one call of a backend, by role. A role that takes no part is absent.

    All lists are on :attr:`device`, of equal lengths and shapes, and dense, with one memory order a row. ``indices`` are the numbers that
    the rows have in the caller's lists.
    """

    __slots__ = ("device", "indices")

    def __init__(self, lists: Mapping[str, list[Tensor] | None], indices: Sequence[int]) -> None:
        super().__init__({role: tensors for role, tensors in lists.items() if tensors is not None})
        self.device: torch.device = next(iter(self.values()))[0].device
        self.indices = indices


def number_on(number: Number, device: torch.device) -> Number:
    """A number as backends take it: a Python number, or a () tensor on their device. One on the CPU beside lists on a device becomes a
    Python number, whose reading waits for nothing."""
    if not isinstance(number, Tensor):
        return number
    if number.is_cpu and device.type != "cpu":
        return number.item()
    return number.reshape(()).to(device)


@dataclass(frozen=True, slots=True)
class Operation:
    """The base of all operations. ``name`` is that of the public function and of every backend's."""

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, Access]] = {}  # of each list, with all options at their defaults
    also_written: ClassVar[tuple[str, ...]] = ()  # roles of lists that are read by default and written with some options
    limits: ClassVar[Mapping[str, Limits]] = {}  # of the numbers that callers choose
    reports: ClassVar[tuple[str, ...]] = ()  # of the scalars, those that are written

    # Derived, from the roles and from the annotations of the fields
    written: ClassVar[tuple[str, ...]] = ()  # roles of lists that are written with some options
    numbers: ClassVar[tuple[str, ...]] = ()  # fields that hold a Number
    scalars: ClassVar[tuple[str, ...]] = ()  # fields that hold a () tensor or None
    flags: ClassVar[tuple[str, ...]] = ()  # fields that are True or False
    optional: ClassVar[tuple[str, ...]] = ()  # fields that may be None

    def __init_subclass__(cls) -> None:
        cls.written = tuple(role for role, access in cls.roles.items() if access is not Access.READ or role in cls.also_written)
        types = {name: kind for base in reversed(cls.__mro__) for name, kind in inspect.get_annotations(base).items()}
        cls.numbers = tuple(name for name, kind in types.items() if kind == "Number")
        cls.scalars = tuple(name for name, kind in types.items() if kind in ("Tensor", "Tensor | None"))
        cls.flags = tuple(name for name, kind in types.items() if kind == "bool")
        cls.optional = tuple(name for name, kind in types.items() if kind.endswith("| None"))

    @classmethod
    def accesses(cls, given: Collection[str]) -> dict[str, Access]:
        """How the lists in the ``given`` roles are used when these alone take part."""
        return {role: access for role, access in cls.roles.items() if role in given}

    @classmethod
    def sweeps(cls, given: Collection[str]) -> int:
        """Sweeps over memory when the lists in the ``given`` roles take part."""
        return sum(access.sweeps for access in cls.accesses(given).values())

    @property
    def writes(self) -> tuple[str, ...]:
        """Roles of the lists that must not share memory, because these options may write them."""
        return self.written

    def on(self: _Op, device: torch.device) -> _Op:
        """This operation with its scalars on ``device``; the numbers as :func:`number_on` has them."""
        moved: dict[str, object] = {}
        for name in self.numbers:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = number_on(value, device)
        for name in self.scalars:
            value = getattr(self, name)
            if value is not None and value.device != device:
                moved[name] = value.to(device)
        return dataclasses.replace(self, **moved) if moved else self
