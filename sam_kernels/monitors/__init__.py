"""What to watch while training: how noisy gradients are, and how sharp the place is. Plain functions.

Results are () tensors on the device of the input, float64 where it is, else float32. First derivatives (``_gradients``) wait for no device;
second derivatives (``_hessian``) do.
"""

from sam_kernels.monitors._gradients import expected_grad_norm, gradient_noise_scale, gradient_variance, sharpness
from sam_kernels.monitors._hessian import hessian_top_eigenvalue, hessian_trace

__all__ = [
    "expected_grad_norm",
    "gradient_noise_scale",
    "gradient_variance",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "sharpness",
]
