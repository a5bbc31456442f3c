"""The public names. ``sam_kernels`` imports this module at the first use of one of them."""

from sam_kernels import functional, monitors, optim, per_sample, sampling, schedules, theory
from sam_kernels._dispatch import use_backend
from sam_kernels.optim import *  # noqa: F403 - the optimizers, which its __all__ names
from sam_kernels.optim.groups import last_layers, norm_layers, param_groups

__all__ = [
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
