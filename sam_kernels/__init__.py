"""Fused kernels and drop-in optimizers for sharpness-aware minimization."""

import torch as _torch  # noqa: F401 - first: the native core then runs on torch's own OpenMP threads

from sam_kernels import functional, monitors, optim, per_sample, sampling, schedules, theory
from sam_kernels._dispatch import use_backend
from sam_kernels.optim import *  # noqa: F403 - the optimizers, which its __all__ names
from sam_kernels.optim.groups import last_layers, norm_layers, param_groups

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "functional",
    "last_layers",
    "monitors",
    "norm_layers",
    "optim",
    "param_groups",
    "per_sample",
    "sampling",
    "schedules",
    "theory",
    "use_backend",
]
__all__ += optim.__all__
