"""Benchmarks: ``python -m bench`` (steps and operations), ``python -m bench.report`` (tables), ``pytest bench`` (regressions)."""
