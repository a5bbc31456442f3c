"""Containers that a batch is made of, as their entries and a way to put others in their place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import is_
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from torch.utils import _pytree

__all__ = ["Structure", "attributes_of", "structure_of"]

Changed = dict[int, Any]  # new entries, by their position


class Structure(NamedTuple):
    """The entries of a container, each with the expression that it is had by, and a function that rebuilds it with some of them changed."""

    entries: list[tuple[str, Any]]
    rebuild: Callable[[Changed], Any]


def structure_of(value: Any, name: str) -> Structure | None:
    """The container ``value``, which ``name`` stands for in messages; None where it is none of a known kind."""
    if isinstance(value, Mapping):
        return _mapping(value, name)
    if _has_fields(value):
        return _object(value, name)
    if isinstance(value, Sequence):
        return _sequence(value, name)
    node = _pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    children, context = node.flatten_fn(value)
    entries = [(f"{name}.{i}", child) for i, child in enumerate(children)]
    return Structure(entries, lambda changed: node.unflatten_fn(_with(children, changed), context))


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """Those of ``__dict__`` and of ``__slots__``, and the fields of a dataclass."""
    slots = [
        slot
        for kind in type(value).__mro__
        for slots in [vars(kind).get("__slots__", ())]
        for slot in ([slots] if isinstance(slots, str) else slots)
    ]
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    own = getattr(value, "__dict__", {})
    names = dict.fromkeys([*fields, *(own if isinstance(own, dict) else ()), *slots])
    found = ((name, _attribute(value, name)) for name in names if name not in ("__dict__", "__weakref__"))
    return [(name, attribute) for name, attribute in found if attribute is not _MISSING]


_MISSING = object()


def _attribute(value: Any, name: str) -> Any:
    try:
        return object.__getattribute__(value, name)
    except AttributeError:  # a slot that was never filled, or one of a mangled name
        return _MISSING


def _has_fields(value: Any) -> bool:
    """An instance of a dataclass, an attrs class or a namespace."""
    kind = type(value)
    return not isinstance(value, type) and (
        dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__") or isinstance(value, SimpleNamespace)
    )


def _object(value: Any, name: str) -> Structure:
    """Attributes are set on a copy, so that no ``__init__`` or ``__post_init__`` runs and fields that they do not take are set too."""
    attributes = attributes_of(value)

    def rebuild(changed: Changed) -> Any:
        new = copy.copy(value)
        for i, entry in changed.items():
            object.__setattr__(new, attributes[i][0], entry)
        return new

    return Structure([(f"{name}.{each}", entry) for each, entry in attributes], rebuild)


def _sequence(value: Any, name: str) -> Structure:
    entries = list(value)
    kind = type(value)
    fields = getattr(value, "_fields", None)
    names = [f"{name}.{field}" for field in fields] if fields is not None else [f"{name}[{i}]" for i in range(len(entries))]

    def rebuild(changed: Changed) -> Any:
        new = _with(entries, changed)
        if hasattr(kind, "_make"):
            return kind._make(new)
        return _checked(name, kind, lambda: kind(new), lambda made: len(made) == len(new) and all(map(is_, made, new)))

    return Structure(list(zip(names, entries, strict=True)), rebuild)


def _mapping(value: Any, name: str) -> Structure:
    """Its items, and what else it has as attributes: tokenizers keep their encodings beside the mapping."""
    keys = list(value)
    items = [value[key] for key in keys]
    own = {id(item) for item in items}
    extras = [(key, each) for key, each in attributes_of(value) if id(each) not in own and not _is_storage(each, keys)]
    entries = [(f"{name}[{key!r}]", item) for key, item in zip(keys, items, strict=True)]
    entries += [(f"{name}.{key}", each) for key, each in extras]

    def rebuild(changed: Changed) -> Any:
        new = {keys[i]: entry for i, entry in changed.items() if i < len(keys)}
        made = _rebuilt(value, name, new)
        for i, entry in changed.items():
            if i >= len(keys):
                object.__setattr__(made, extras[i - len(keys)][0], entry)
        return made

    return Structure(entries, rebuild)


def _is_storage(attribute: Any, keys: list[Any]) -> bool:
    """The dictionary that a mapping keeps its items in, as ``UserDict.data``."""
    return isinstance(attribute, Mapping) and bool(keys) and list(attribute) == keys


def _rebuilt(value: Any, name: str, new: dict[Any, Any]) -> Any:
    kind, items = type(value), {**{key: value[key] for key in value}, **new}
    if kind is dict:
        return items
    if kind is MappingProxyType:
        return MappingProxyType(items)

    def is_right(made: Any) -> bool:
        return list(made) == list(items) and all(made[key] is items[key] for key in items)

    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        before = {key: value[key] for key in new}
        for key, item in new.items():
            made[key] = item
        if all(value[key] is item for key, item in before.items()):
            return _checked(name, kind, lambda: made, is_right)
        for key, item in before.items():  # the copy shares its items with the original: give them back
            value[key] = item
    return _checked(name, kind, lambda: kind(items), is_right)


def _checked(name: str, kind: type, make: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    error: Exception | None = None
    try:
        made = make()
        if type(made) is kind and is_right(made):
            return made
    except Exception as caught:  # of a constructor that wants something else
        error = caught
    raise TypeError(
        f"SAM.step: {name} is a {kind.__name__}, which cannot be made again with other entries, as micro-batches need; pass a plain dict, "
        "list or tuple of its entries, or a list of closures, one for each micro-batch"
    ) from error


def _with(entries: Sequence[Any], changed: Changed) -> list[Any]:
    return [changed.get(i, entry) for i, entry in enumerate(entries)]
