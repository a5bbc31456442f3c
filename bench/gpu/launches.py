"""What a call makes a device do, by torch's profiler: kernels, copies and fills, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Activity", "activity_of", "record"]


@dataclass(frozen=True)
class Activity:
    kernels: tuple[str, ...]
    copies: tuple[str, ...]
    fills: tuple[str, ...]

    def __str__(self) -> str:
        kinds = {"kernels": self.kernels, "copies": self.copies, "fills": self.fills}
        counted = {kind: Counter(map(_shortened, names)).items() for kind, names in kinds.items()}
        listed = {kind: ", ".join(f"{name} × {count}" if count > 1 else name for name, count in names) for kind, names in counted.items()}
        return "; ".join(f"{len(kinds[kind])} {kind}: {names}" if names else f"0 {kind}" for kind, names in listed.items())


def _shortened(name: str) -> str:
    """A C++ kernel by its own name and its innermost functor's, without namespaces and arguments."""
    plain = name.removeprefix("void ").partition("<")[0].rpartition("::")[2].partition("(")[0]
    functor = next((word for word in ("Fill", "CopyFunctor", "Add", "Mul", "bitwise", "logical_or", "copy") if word in name), "")
    return f"{plain}[{functor}]" if functor and "elementwise" in plain else plain


def activity_of(events: Iterable[Any]) -> Activity:
    """Of the profiler's events those on the device; ranges that somebody named (an optimizer's step) are none."""
    kernels, copies, fills = [], [], []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        if event.name.startswith(("Optimizer.", "ProfilerStep")):
            continue
        (copies if event.name.startswith("Memcpy") else fills if event.name.startswith("Memset") else kernels).append(event.name)
    return Activity(tuple(kernels), tuple(copies), tuple(fills))


def record(call: Callable[[], object]) -> Activity | None:
    """Of one call, which should have been made before. None where the profiler sees nothing of the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    activity = activity_of(profile.events())
    return activity if any((activity.kernels, activity.copies, activity.fills)) else None
