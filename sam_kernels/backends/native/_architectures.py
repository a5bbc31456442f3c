"""Which devices a CUDA binary runs on."""

from __future__ import annotations

import re

__all__ = ["runs_on"]


def runs_on(architectures: str, capability: int) -> bool:
    """Whether code built for ``architectures`` (as in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX") runs on a device of ``capability`` (90 for 9.0).

    Machine code runs on later minor versions of its major version (with an "a": on its own version alone), PTX on everything later (with a
    letter: no further than the machine code).
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", architectures):
        built = 10 * int(major) + int(minor)
        later = suffix != "a" and capability > built and (capability // 10 == int(major) or bool(ptx and not suffix))
        if capability == built or later:
            return True
    return False
