"""What kind of tensors an operation is given: ordinary ones with memory, FakeTensors, or some that no kernel can take.

An eager call looks at the types of its arguments, which costs 30 ns a tensor, and nothing for a :class:`TensorList`. Anything unusual takes
the slow path, which looks at every tensor and has the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import Signature
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sam_kernels import _validate
from sam_kernels._memory_of import ORDINARY_TYPES, active_fake_mode, is_inside_transform, why_no_memory
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import filled

__all__ = ["are_ordinary", "explain", "fake_mode_of"]

_ORDINARY = ORDINARY_TYPES | {type(None), bool, int, float, str}
_LISTS = frozenset({list, tuple, TensorList})


def are_ordinary(values: Iterable[object]) -> bool:
    """Whether all arguments are of types that an operation takes as they are, and no mode of torch changes what tensors are."""
    if active_fake_mode() is not None or is_inside_transform():
        return False
    for value in values:
        kind = type(value)
        if kind in _ORDINARY or kind is TensorList:
            continue
        if kind not in _LISTS:
            return False
        if not _ORDINARY.issuperset(map(type, value)) and not _are_groups(value):  # type: ignore[call-overload, arg-type]  # a list or tuple
            return False
    return True


def _are_groups(value: Iterable[object]) -> bool:
    """Whether these are lists of ordinary tensors."""
    return all(type(group) in _LISTS and _ORDINARY.issuperset(map(type, group)) for group in value)  # type: ignore[call-overload]


def fake_mode_of(op: str, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FakeTensorMode | None:
    """The mode of the first FakeTensor among the arguments, or the active one; None where all are real and no mode is active.

    Raises TypeError, naming list and index, for a tensor without memory that is no FakeTensor. Fake lists are checked as real ones are, as
    far as shapes, dtypes and devices go.
    """
    arguments = _bound(signature, args, kwargs)
    if is_inside_transform():  # whatever an operation allocates there may be without memory too
        name = next((name for name, tensor in _tensors(arguments) if why_no_memory(tensor) is not None), None)
        what = "called" if name is None else f"given {name}"
        raise TypeError(
            f"{op}: {what} inside a transform of torch.func (vmap, grad, ...); kernels read memory, call it outside of the transform"
        )
    mode = active_fake_mode()
    for name, tensor in _tensors(arguments):
        if isinstance(tensor, FakeTensor):
            mode = mode or tensor.fake_mode
        elif (reason := why_no_memory(tensor)) is not None:
            raise TypeError(f"{op}: {name} {reason}")
    if mode is not None:
        _check_fake_lists(op, arguments)
    return mode


def explain(error: Exception, op: str, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TypeError | None:
    """The error for the first tensor without memory among the arguments, which ``error`` does not name: it comes from inside torch or a
    kernel's binding. None where the operation's own words are there, or all tensors have memory and the cause is another."""
    if str(error).startswith(f"{op}: "):
        return None
    for name, tensor in _tensors(_bound(signature, args, kwargs)):
        reason = why_no_memory(tensor)
        if reason is not None:
            return TypeError(f"{op}: {name} {reason}")
    return None


def _bound(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments by name; none of them where they do not fit the signature, which the call itself reports."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments, with its name in error messages."""
    for name, value in arguments.items():
        yield from _named(name, value)


def _named(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named(f"{name}[{i}]", item)


def _check_fake_lists(op: str, arguments: Mapping[str, Any]) -> None:
    """Lengths, shapes, dtypes and devices of the lists that an operation reads row by row. What may be None fits every row."""
    unused = set()
    if op != "perturb_" and arguments.get("adaptive") is False:
        unused.add("params")
    if arguments.get("momentum") == 0.0:
        unused.add("momentum_buffers")
    lists = {name: value for name, value in arguments.items() if isinstance(value, list | tuple) and name not in unused}
    lists = {name: value for name, value in lists.items() if value and all(item is None or isinstance(item, Tensor) for item in value)}
    lists.pop("state_steps", None)
    if not lists:
        return
    first = next(iter(lists.values()))
    full = {name: [*value] if len(value) != len(first) else filled(value, first) for name, value in lists.items()}
    _validate.check_lists(op, full)
