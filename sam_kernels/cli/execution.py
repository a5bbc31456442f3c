"""Where a command runs: its device, its backends and its threads. A wrong choice is a usage error that names the option."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click
import torch

from sam_kernels import _dispatch

__all__ = ["require_backend", "require_device", "threads"]


def require_device(name: str) -> torch.device:
    """Return the device called ``name``. Raises BadParameter if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        raise click.BadParameter(f"device {name!r} cannot be used: {str(error).splitlines()[0]}", param_hint="'--device'") from error
    return device


def require_backend(name: str, device: torch.device) -> None:
    """Raise BadParameter, with the reason, if a backend cannot be used on a device."""
    if (reason := _dispatch.reason_missing(name, device.type)) is not None:
        raise click.BadParameter(f"backend {name!r} cannot be used: {reason}", param_hint="'--backend'")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with ``count`` CPU threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
