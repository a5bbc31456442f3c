"""The host's time in the functions of ``sam_kernels.integrations``, without what they call in frameworks, torch and SAM itself."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from types import FrameType
from typing import Any

import sam_kernels
from bench.frameworks.paced import Loop

__all__ = ["own_time"]

WARMUP = 3  # steps
_OURS = str(Path(sam_kernels.__file__).parent / "integrations")
_STANDARD = str(Path(sysconfig.get_path("stdlib")))
_OTHERS = ("site-packages", "dist-packages")  # below the standard library


class _OwnTime:
    """A profile function of :func:`sys.setprofile`: nanoseconds in which the innermost frame is ours, or of the standard library, called by
    ours. The time that it takes itself is left out, but for its call and return."""

    def __init__(self) -> None:
        self._is_ours, self._stack = False, list[bool]()
        self._owner: dict[str, bool | None] = {}  # file: ours, another's, or None: its caller's
        self._total, self._last = 0, perf_counter_ns()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        now = perf_counter_ns()
        if self._is_ours:
            self._total += now - self._last
        if event == "call":
            self._stack.append(self._is_ours)
            owner = self._owner_of(frame.f_code.co_filename)
            self._is_ours = self._is_ours if owner is None else owner
        elif event == "return":  # frames that were there before it began have no entry
            self._is_ours = self._stack.pop() if self._stack else False
        self._last = perf_counter_ns()

    def _owner_of(self, file: str) -> bool | None:
        if file not in self._owner:
            is_standard = file.startswith((_STANDARD, "<")) and not any(each in file for each in _OTHERS)
            self._owner[file] = True if file.startswith(_OURS) else None if is_standard else False
        return self._owner[file]

    def take(self) -> int:
        """Return the nanoseconds since the last call of this method."""
        total, self._total = self._total, 0
        return total


def own_time(loop: Loop) -> list[float]:
    """Return microseconds of each step of the loop, which it makes in this thread, after the first three."""
    profile, found = _OwnTime(), list[float]()
    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(profile)
    try:
        loop(lambda: found.append(profile.take() / 1e3))
    finally:
        sys.setprofile(before)
    return found[WARMUP:]
