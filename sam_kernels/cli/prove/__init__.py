"""``python -m sam_kernels prove``: what SAM is worth, measured here and now."""
