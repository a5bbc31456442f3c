"""Optimizers: thin wrappers over :mod:`sam_kernels.functional`."""

from sam_kernels.optim.presets import (
    ASAM,
    CRSAM,
    GCSAM,
    GSAM,
    RSAM,
    S2SAM,
    SAMSPS,
    USAM,
    WSAM,
    Extragradient,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    UnifiedSAM,
    VaSSO,
)
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM
from sam_kernels.optim.sassha import SASSHA

__all__ = [
    "ASAM", "CRSAM", "GCSAM", "GSAM", "RSAM", "RWSAM", "S2SAM", "SAM", "SAMSPS", "SASSHA", "USAM", "WSAM",
    "Extragradient", "FriendlySAM", "LookSAM", "MomentumSAM", "UnifiedSAM", "VaSSO",
]  # fmt: skip
