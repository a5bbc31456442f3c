"""Named members of the family: :class:`SAM` with other defaults."""

from __future__ import annotations

from typing import Any

from sam_kernels.optim._schedules import Schedule
from sam_kernels.optim.sam import SAM

__all__ = ["USAM", "UnifiedSAM"]


class USAM(SAM):
    """Unnormalised SAM, e = ρ g: :class:`SAM` with ``lambd=0`` (arXiv 2503.02225).

    The length of the perturbation follows the gradient's, so the useful ρ is another than SAM's, usually larger: tune it.
    """

    def __init__(self, params: Any, base_optimizer: Any, **kwargs: Any) -> None:
        if "lambd" in kwargs:
            raise TypeError("USAM: lambd is 0 by definition; use UnifiedSAM to choose it")
        super().__init__(params, base_optimizer, lambd=0.0, **kwargs)


class UnifiedSAM(SAM):
    """SAM and USAM mixed: :class:`SAM` with λ = 0.5 unless given (arXiv 2503.02225).

    λ is a number in [0, 1], ``'1/t'``, ``'1-1/t'`` or a callable t → λ.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, lambd: Schedule = 0.5, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, lambd=lambd, **kwargs)
