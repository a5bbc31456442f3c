"""Composer's SAM optimizer and its trainer's gradient scaler, from the two files of its wheel that define them.

mosaicml pins a torch that is older than this project's, so the package itself cannot be imported here. The two files import a few names
of other Composer modules; stand-ins take their place while the files are loaded. `make test` unpacks the wheel into the environment,
under the name of its version. ``SAM_KERNELS_COMPOSER`` names another folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["FOLDER", "VERSION", "load", "reason_missing"]

VERSION = "0.32.1"
FOLDER = Path(os.environ.get("SAM_KERNELS_COMPOSER", Path(sys.prefix) / f"mosaicml-{VERSION}"))
SCALER, SAM = "composer.trainer._scaler", "composer.algorithms.sam.sam"


def reason_missing() -> str | None:
    """Return why the files cannot be loaded, or None."""
    missing = [path for path in map(_path, (SCALER, SAM)) if not path.is_file()]
    return f"mosaicml {VERSION} is not unpacked: {missing[0]} does not exist (make test unpacks it)" if missing else None


@cache
def load() -> SimpleNamespace:
    """Return a namespace with ``SAMOptimizer`` and ``ClosureGradScaler``. Raises FileNotFoundError where the wheel is not unpacked."""
    with _stand_ins():
        scaler = _run(SCALER)
        sys.modules[SCALER] = scaler
        sam = _run(SAM)
    return SimpleNamespace(SAMOptimizer=sam.SAMOptimizer, ClosureGradScaler=scaler.ClosureGradScaler)


def _path(name: str) -> Path:
    return FOLDER / f"{name.replace('.', '/')}.py"


def _run(name: str) -> ModuleType:
    spec = spec_from_file_location(name, _path(name))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    """The names that the two files import. Only ``ensure_tuple`` and ``dist`` are called, and only by what is not the optimizer."""
    names: dict[str, dict[str, Any]] = {
        "composer": {},
        "composer.core": {name: type(name, (), {}) for name in ("Algorithm", "Event", "State")},
        "composer.loggers": {"Logger": type("Logger", (), {})},
        "composer.trainer": {},
        "composer.utils": {"ensure_tuple": _ensure_tuple, "dist": SimpleNamespace(all_gather_object=_gather, all_reduce=_reduce)},
    }
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "composer"}
    for name, attributes in names.items():
        module = ModuleType(name)
        module.__dict__.update(attributes, __path__=[])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "composer"]:
            del sys.modules[name]
        sys.modules.update(before)


def _ensure_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _reduce(tensor: Tensor, reduce_operation: str = "SUM") -> None:
    if distributed.is_initialized():
        distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, reduce_operation))
