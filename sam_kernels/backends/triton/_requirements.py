"""Whether triton can be used here, and whether it interprets."""

from __future__ import annotations

import importlib
import importlib.metadata

__all__ = ["IS_INTERPRETED", "MINIMUM_VERSION", "REASON_MISSING", "VERSION"]

MINIMUM_VERSION = (3, 4)


def _version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _reason_missing() -> tuple[str | None, str]:
    """Why triton cannot be used (None: it can), and its version."""
    wanted = ".".join(map(str, MINIMUM_VERSION))
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton {wanted} or newer", ""
    if _version_of(version) < MINIMUM_VERSION:
        return f"triton {version} is too old; install {wanted} or newer", version
    return None, version


REASON_MISSING, VERSION = _reason_missing()


def _is_interpreted() -> bool:
    """TRITON_INTERPRET=1 as triton saw it: it decides once, when a kernel is defined."""
    if REASON_MISSING is not None:
        return False
    interpreted: bool = importlib.import_module("triton").knobs.runtime.interpret
    return interpreted


IS_INTERPRETED = _is_interpreted()
