"""Benchmarks: ``python -m bench`` (whole steps and single operations), ``python -m bench.report`` (tables), ``pytest bench`` (regressions)."""
