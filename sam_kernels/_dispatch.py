"""Which backend runs an operation. Nothing falls back silently: a forced backend that is missing raises with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from sam_kernels.backends.native import CUDA_ON_HOST

if TYPE_CHECKING:  # the command line reads BACKENDS before it imports torch
    import torch

    from sam_kernels._backend import Backend

__all__ = ["BACKENDS", "available", "forced", "reason_missing", "select", "select_per_sample", "select_sharpness", "use_backend"]

BACKENDS = ("native", "triton", "foreach")

_forced: str | None = None


def _path(name: str, device_type: str) -> str:
    """Native kernels are compiled for one type of device; each of the other backends is one module."""
    if name != "native":
        return name
    return "native.cuda" if device_type == "cuda" or CUDA_ON_HOST else "native.cpu"


def _load(path: str) -> Any:
    """The backend of a module, or the module itself where it is one of a family's (``_FAMILIES``); why it cannot be had, as a string."""
    try:
        module = importlib.import_module(f"sam_kernels.backends.{path}")
    except ImportError as error:
        return str(error)
    backend: Backend | None = getattr(module, "BACKEND", None)
    if backend is None:
        return getattr(module, "REASON_MISSING", None) or module
    return backend if backend.reason_missing is None else backend.reason_missing


_loaded: dict[str, Any] = {}
_preferred: dict[tuple[str | None, str], Backend] = {}  # by the name asked for and the type of device, whatever the dtypes


def _loaded_from(path: str) -> Any:
    if path not in _loaded:
        _loaded[path] = _load(path)
    return _loaded[path]


def _backend(name: str, device_type: str = "cpu") -> Backend | str:
    found: Backend | str = _loaded_from(_path(name, device_type))
    return found


def reason_missing(name: str, device_type: str = "cpu") -> str | None:
    """None where backend ``name`` runs on ``device_type``, otherwise why it does not."""
    backend = _backend(name, device_type)
    if isinstance(backend, str):
        return backend
    if not backend.takes(device_type):
        return f"no kernels for {device_type!r} tensors, only for {sorted(backend.device_types or ())}"
    return None


def available(device_type: str = "cpu") -> list[str]:
    """Names of the backends that run on ``device_type``, the preferred one first."""
    return [name for name in BACKENDS if reason_missing(name, device_type) is None]


def forced() -> str | None:
    """The backend asked for by name, None where the choice is automatic."""
    return _forced


def select(device_type: str, dtypes: Collection[torch.dtype] = ()) -> Backend:
    """The backend for tensors on ``device_type`` of these ``dtypes``.

    Raises RuntimeError if a forced one has no kernels for the device, TypeError if it has none for a dtype.
    """
    if not dtypes and (known := _preferred.get((_forced, device_type))) is not None:  # a step asks several times
        return known
    for _, backend in _candidates(_forced, device_type, dtypes):
        if not dtypes:
            _preferred[_forced, device_type] = backend
        return backend
    raise RuntimeError(f"backend {_forced!r} was asked for and cannot be used: {reason_missing(_forced or 'foreach', device_type)}")


def _candidates(forced: str | None, device_type: str, dtypes: Collection[torch.dtype]) -> Iterator[tuple[str, Backend]]:
    """The backends that have kernels for these tensors, with their paths, the preferred one first. Raises TypeError where the one asked for
    by name has none for a dtype."""
    for name in BACKENDS if forced is None else (forced,):
        backend = _backend(name, device_type)
        if isinstance(backend, str) or not backend.takes(device_type) or (forced is None and not backend.is_automatic):
            continue
        if backend.dtypes is None or backend.dtypes.issuperset(dtypes):
            yield _path(name, device_type), backend
        elif forced is not None:
            missing = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in set(dtypes) - backend.dtypes))
            raise TypeError(f"backend {forced!r} was asked for and has no kernels for {missing}")


# Operations that are not over lists of tensors have modules of their own beside each backend: their names, None where there is none.
_FAMILIES: dict[str, dict[str, str | None]] = {
    "per_sample": {"native.cpu": "native.per_sample", "native.cuda": None},
    "sharpness": {"native.cpu": "native.sharpness", "native.cuda": "native.cuda_sharpness"},
}
_selected: dict[tuple[str, str | None, str, frozenset[torch.dtype]], ModuleType] = {}  # a layer's backward pass asks several times


def select_per_sample(device_type: str, dtypes: Collection[torch.dtype] = ()) -> ModuleType:
    """The backend's module of gradient norms per sample, for tensors on ``device_type`` of these ``dtypes``.

    As :func:`select`; the ahead-of-time kernels for NVIDIA devices have none of these operations, so that ``triton`` comes first there.
    """
    return _select_family("per_sample", device_type, frozenset(dtypes))


def select_sharpness(device_type: str) -> ModuleType:
    """The backend's module of Gibbs weights and draws. As :func:`select`; all of them take float32 and float64."""
    return _select_family("sharpness", device_type, frozenset())


def _select_family(family: str, device_type: str, dtypes: frozenset[torch.dtype]) -> ModuleType:
    forced = _forced  # read once: what is kept must not depend on another thread
    key = (family, forced, device_type, dtypes)
    if key not in _selected:
        _selected[key] = _find(family, forced, device_type, dtypes)
    return _selected[key]


def _find(family: str, forced: str | None, device_type: str, dtypes: Collection[torch.dtype]) -> ModuleType:
    reason = ""
    for own, _ in _candidates(forced, device_type, dtypes):
        path = _FAMILIES[family].get(own, f"{own}.{family}")
        if path is None:
            continue
        module = _loaded_from(path)
        if isinstance(module, ModuleType):
            return module
        reason = f" ({module})"
    select(device_type, dtypes)  # raises for a backend that is missing
    what = {"per_sample": "gradient norms per sample", "sharpness": "weights by sharpness"}[family]
    raise RuntimeError(f"backend {forced!r} was asked for and has no {what} for {device_type!r} tensors{reason}")


class use_backend:  # used like a function, as torch.no_grad is
    """Forces a backend: ``use_backend("foreach")`` from here on, ``with use_backend("foreach"):`` for a while, ``use_backend(None)`` to
    choose automatically again.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend this machine lacks.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            if name not in BACKENDS:
                raise ValueError(f"use_backend: unknown backend {name!r}; the names are {', '.join(BACKENDS)}")
            backend = _backend(name)
            if isinstance(backend, str) and isinstance(_backend(name, "cuda"), str):
                raise RuntimeError(f"use_backend: backend {name!r} cannot be used: {backend}")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _forced
        _forced = self._previous
