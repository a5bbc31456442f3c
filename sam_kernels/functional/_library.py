"""The operations as ``torch.ops.sam_kernels.*``: what ``torch.compile`` puts into its graphs in place of a call.

Dynamo cannot look into a kernel. It can call an operator whose schema says what is written and whose fake implementation says what comes
out. The operator's implementation is the ordinary function, run when the graph runs: the same kernels, the same checks, the same words.
An eager call does not go through it, because a Python operator costs a call tens of microseconds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._memory_of import active_fake_mode
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import Tensors, TensorsOrNone
from sam_kernels.functional._kinds import are_ordinary, explain, fake_mode_of
from sam_kernels.operations import Number

__all__ = ["Arguments", "Flat", "operation"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
Arguments = dict[str, Any]
Results = Tensor | tuple[Tensor, Tensor]

# False to Python, True to dynamo, which folds it: 30 ns. `torch.compiler.is_compiling` is a global flag, true in other threads too.
_is_traced = torch.compiler.is_dynamo_compiling

# What a schema says, but for two kinds: a "Number" is lowered to a tensor, a "Seed" of 64 unsigned bits to its upper and its lower 32.
_KINDS: dict[object, str] = {
    Tensors: "Tensor[]",
    Tensors | None: "Tensor[]?",
    TensorsOrNone | None: "Tensor?[]?",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Number: "Number",
    float: "float",
    float | None: "float?",
    tuple[float, float]: "float[]",
    tuple[int, ...]: "int[]",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
    str | None: "str?",
}
_RESULTS: dict[object, str] = {None: "()", Tensor: "Tensor", tuple[Tensor, Tensor]: "(Tensor, Tensor)"}
_SCHEDULED: dict[object, str] = {int: "Seed", int | None: "Seed?"}
# Tuples, not unions: dynamo of torch 2.6 knows no union.
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "Number": (Tensor, int, float),
    "Seed": (int,),
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}


class Flat(NamedTuple):
    """How an operation whose arguments no schema can describe goes through an operator.

    ``types`` are schema types by name, replacing or adding to those of the signature. ``lower`` puts such arguments into the caller's in
    place, while traced, and returns False where they are none of the contract's. ``run`` calls the operation with lowered arguments.
    """

    types: dict[str, str]
    lower: Callable[[Arguments], bool]
    run: Callable[[Callable[..., Any], Arguments], Any]


_AS_IT_IS = Flat({}, lower=lambda arguments: True, run=lambda op, arguments: op(**arguments))


def operation(
    *,
    written: tuple[str, ...] = (),
    scheduled: tuple[str, ...] = (),
    fake: Callable[..., Results] | None = None,
    flat: Flat = _AS_IT_IS,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a public function run without autograd, traced by ``torch.compile`` as the operator of its name, and refuse what has no memory.

    FakeTensors go to the operator too: its fake implementation makes their result.

    The schema follows from the annotations (``_KINDS``). ``written`` names what the operation writes: tensors, tensors that may be
    None, and lists that may not. What is annotated ``Number`` goes into the graph as a tensor, and ``scheduled`` seeds as symbolic
    integers: a new value then is no new graph. ``fake`` takes the operator's arguments by name and makes
    the result without its values; None where nothing is returned. A result shares no memory with an argument.
    """

    def register(op: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(op)
        traced = _define(op, written, scheduled, fake, flat)

        @functools.wraps(op)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if _is_traced():
                return cast(_R, traced(*args, **kwargs))
            is_trusted = TensorList in map(type, args[:2]) and active_fake_mode() is None  # the list's owner has looked
            if not is_trusted and not are_ordinary((*args, *kwargs.values())):
                mode = fake_mode_of(op.__name__, signature, args, kwargs)
                if mode is not None:
                    with mode:
                        return cast(_R, traced(*args, **kwargs))  # the fake implementation: shapes and dtypes, no kernel
            try:
                if not torch.is_grad_enabled():  # an optimizer calls operations with autograd already off
                    return op(*args, **kwargs)
                with torch.no_grad():
                    return op(*args, **kwargs)
            except (TypeError, RuntimeError) as error:
                reason = explain(error, op.__name__, signature, args, kwargs)
                if reason is None:
                    raise
                raise reason from error

        return wrapper

    return register


def _define(
    op: Callable[..., Any], written: tuple[str, ...], scheduled: tuple[str, ...], fake: Callable[..., Results] | None, flat: Flat
) -> Callable[..., Any]:
    """Defines the operator of ``op``; returns what is traced in place of ``op``."""
    signature = inspect.signature(op, eval_str=True)
    parameters = signature.parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    keywords = sorted(parameters)
    special = {name: _SCHEDULED[parameters[name].annotation] for name in scheduled} | flat.types
    types = {name: special.get(name) or _KINDS[parameter.annotation] for name, parameter in parameters.items()}
    types |= flat.types | {"backend": "str?"}
    names = list(types)

    def implementation(*values: Any) -> Any:
        arguments = {name: _raised(types[name], value) for name, value in zip(names, values, strict=True)}
        with _dispatch.use_backend(arguments.pop("backend")):
            return flat.run(op, arguments)

    def fake_implementation(*values: Any) -> Results | None:
        return None if fake is None else fake(**dict(zip(names, values, strict=True)))

    schema = f"({', '.join(_argument(name, types[name], written) for name in names)}) -> {_RESULTS[signature.return_annotation]}"
    definition = torch.library.custom_op(f"sam_kernels::{op.__name__}", implementation, mutates_args=written, schema=schema)
    definition.register_fake(fake_implementation)
    operator = getattr(torch.ops.sam_kernels, op.__name__).default

    def traced(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(positional, args)), **kwargs}  # noqa: B905 - too many are found by counting
        arguments = {**defaults, **given}
        if len(given) < len(args) + len(kwargs) or sorted(arguments) != keywords or not flat.lower(arguments):
            return op(*args, **kwargs)  # has the words for what is wrong
        # Known here and not when the graph runs: a `with use_backend` that is traced itself is over by then.
        arguments["backend"] = _dispatch.forced()
        if not all(_fits(types[name], arguments[name]) for name in names):
            return op(*args, **kwargs)
        with torch.no_grad():
            return operator(*[_lowered(types[name], arguments[name]) for name in names])

    return traced


def _argument(name: str, kind: str, written: tuple[str, ...]) -> str:
    """``Tensor(a!)[] params``: its own letter for each name that is written, for none aliases another."""
    kind = kind.replace("Number", "Tensor").replace("Seed", "SymInt[]")
    if name in written:
        kind = kind.replace("Tensor", f"Tensor({'abcdefgh'[written.index(name)]}!)")
    return f"{kind} {name}"


def _fits(kind: str, value: object) -> bool:
    """Whether ``value``, lowered, is one that the dispatcher takes for a ``kind``, without a conversion that the operation would refuse."""
    if kind.endswith("?"):
        return value is None or _fits(kind[:-1], value)
    if kind.endswith("[]"):
        kinds = (list,) if kind.endswith("?[]") else (list, tuple)  # one with None in it is a list that some operation fills
        return isinstance(value, kinds) and all(_fits(kind[:-2], item) for item in value)
    if not isinstance(value, _PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        return False
    return kind != "Seed" or 0 <= value < 2**64  # type: ignore[operator]  # an int


def _lowered(kind: str, value: Any) -> Any:
    """``value``, which fits, as the operator takes it."""
    if kind == "Number" and not isinstance(value, Tensor):
        # An exact product, which torch.compile turns into one with a graph input when the number changes; torch.full it does not.
        return torch.ones((), dtype=torch.float64, device="cpu") * value
    if kind.startswith("Seed") and value is not None:
        return [value >> 32, value & 0xFFFFFFFF]
    return value


def _raised(kind: str, value: Any) -> Any:
    """What the operation takes for what the operator was given. It takes a tensor for a number."""
    return (value[0] << 32) + value[1] if kind.startswith("Seed") and value is not None else value
