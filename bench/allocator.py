"""glibc's allocator decides whether the temporaries of a Python loop are kept or handed back to the system after each step.

Handed back, every step pays page faults for them, which makes such a loop two to three times slower. Which of the two happens by default
depends on what the process allocated before, so a result names its regime. The variables are read when a process starts: hence the
re-execution.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

__all__ = ["REGIMES", "current", "ensure", "variables"]

REGIMES: dict[str, dict[str, str]] = {
    "default": {},
    # A fixed threshold switches off the dynamic one: all larger blocks are mapped, and unmapped when freed.
    "returning": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    # Nothing is mapped and the heap never shrinks.
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1099511627776"},
}


def settings(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(env.items()) if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}


def current(env: Mapping[str, str] = os.environ) -> str:
    """The regime of this process, or the variables themselves where they are nobody's."""
    found = settings(env)
    for name, variables in REGIMES.items():
        if found == dict(sorted(variables.items())):
            return name
    return " ".join(f"{name}={value}" for name, value in found.items())


def ensure(regime: str, module: str, arguments: list[str]) -> None:
    """Starts ``python -m module`` again in the regime, unless this process already is. ``default`` leaves the environment alone."""
    if regime == "default" or current() == regime:
        return
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], variables(regime))


def variables(regime: str) -> dict[str, str]:
    """Return the environment of a new process in the regime: this process's, without the settings of another regime."""
    env = {name: value for name, value in os.environ.items() if name not in settings(os.environ)}
    return env | REGIMES[regime]
