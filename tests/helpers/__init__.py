"""What tests share. Cases, tolerances and comparison are those of ``python -m sam_kernels validate``, which cannot import from tests."""
