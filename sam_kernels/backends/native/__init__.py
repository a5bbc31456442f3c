"""Kernels compiled ahead of time: C++ for CPU tensors (``cpu``), CUDA for those on NVIDIA devices (``cuda``).

Each module raises ImportError with the reason where it was not compiled, or tells it as ``REASON_MISSING``.
"""
