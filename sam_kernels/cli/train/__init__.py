"""``python -m sam_kernels train``: optimizers side by side on real handwritten digits. ``command`` has the options."""
