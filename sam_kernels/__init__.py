"""Fused kernels and drop-in optimizers for sharpness-aware minimization."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if find_spec("torch") is None:
    raise ModuleNotFoundError("sam_kernels needs PyTorch, which is not installed: pip install torch", name="torch")

if TYPE_CHECKING:
    from sam_kernels._api import *  # noqa: F403
    from sam_kernels.optim import *  # noqa: F403 - mypy does not find these by way of _api
else:  # not for type checkers: a module with a __getattr__ has every name

    def __getattr__(name):
        """Import ``name`` at its first use (PEP 562): torch takes more than a second, which ``python -m sam_kernels --help`` saves."""
        if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
            return _import(name)
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        api = _import("_api")
        if name == "__all__":
            return ["__version__", *api.__all__]
        if name not in api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(api, name))

    def _import(name):
        try:
            import_module("torch")  # first: the native core then runs on torch's own OpenMP threads
            return import_module(f"{__name__}.{name}")
        except AttributeError as error:  # as it is, hasattr would take it for a name that does not exist
            raise ImportError(f"{__name__}.{name} cannot be imported: {error}") from error

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
