"""Which backend runs an operation. Nothing falls back silently: a forced backend that is missing raises with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from types import ModuleType, TracebackType

import torch

from sam_kernels.backends.native import CUDA_ON_HOST

__all__ = ["BACKENDS", "available", "forced", "reason_missing", "select", "select_per_sample", "select_sharpness", "use_backend"]

BACKENDS = ("native", "triton", "foreach")

_forced: str | None = None


def _path(name: str, device_type: str) -> str:
    """Native kernels are compiled for one type of device; each of the other backends is one module."""
    if name != "native":
        return name
    return "native.cuda" if device_type == "cuda" or CUDA_ON_HOST else "native.cpu"


def _load(path: str) -> ModuleType | str:
    """The backend's module, or the reason it cannot be had."""
    try:
        backend = importlib.import_module(f"sam_kernels.backends.{path}")
    except ImportError as error:
        return str(error)
    reason: str | None = getattr(backend, "REASON_MISSING", None)
    return backend if reason is None else reason


_loaded: dict[str, ModuleType | str] = {}


def _backend(name: str, device_type: str = "cpu") -> ModuleType | str:
    path = _path(name, device_type)
    if path not in _loaded:
        _loaded[path] = _load(path)
    return _loaded[path]


def reason_missing(name: str, device_type: str = "cpu") -> str | None:
    """None where backend ``name`` runs on ``device_type``, otherwise why it does not."""
    backend = _backend(name, device_type)
    if isinstance(backend, str):
        return backend
    supported: frozenset[str] | None = backend.DEVICE_TYPES  # None: every device torch knows
    if supported is not None and device_type not in supported:
        return f"no kernels for {device_type!r} tensors, only for {sorted(supported)}"
    return None


def available(device_type: str = "cpu") -> list[str]:
    """Names of the backends that run on ``device_type``, the preferred one first."""
    return [name for name in BACKENDS if reason_missing(name, device_type) is None]


def forced() -> str | None:
    """The backend asked for by name, None where the choice is automatic."""
    return _forced


def select(device_type: str, dtypes: Collection[torch.dtype] = ()) -> ModuleType:
    """The backend for tensors on ``device_type`` of these ``dtypes``.

    Raises RuntimeError if a forced one has no kernels for the device, TypeError if it has none for a dtype.
    """
    for name in BACKENDS if _forced is None else (_forced,):
        backend = _backend(name, device_type)
        if isinstance(backend, str) or not (backend.DEVICE_TYPES is None or device_type in backend.DEVICE_TYPES):
            continue
        if _forced is None and not backend.IS_AUTOMATIC:
            continue
        if backend.DTYPES is None or backend.DTYPES.issuperset(dtypes):
            return backend
        if _forced is not None:
            missing = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in set(dtypes) - backend.DTYPES))
            raise TypeError(f"backend {_forced!r} was asked for and has no kernels for {missing}")
    raise RuntimeError(f"backend {_forced!r} was asked for and cannot be used: {reason_missing(_forced or 'foreach', device_type)}")


# What is not over lists of tensors has modules of its own beside each backend: their names, None where there is none.
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
    for name in BACKENDS if forced is None else (forced,):
        backend = _backend(name, device_type)
        own = _path(name, device_type)
        path = _FAMILIES[family].get(own, f"{own}.{family}")
        if isinstance(backend, str) or path is None or not (backend.DEVICE_TYPES is None or device_type in backend.DEVICE_TYPES):
            continue
        if not (backend.DTYPES is None or backend.DTYPES.issuperset(dtypes)) or (forced is None and not backend.IS_AUTOMATIC):
            continue
        if path not in _loaded:
            _loaded[path] = _load(path)
        module = _loaded[path]
        if not isinstance(module, str):
            return module
        reason = f" ({module})"
    select(device_type, dtypes)  # has the words for a backend or a dtype that is missing
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
