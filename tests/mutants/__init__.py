"""Faults planted in the package, one at a time, to see which test finds each: ``python -m tests.mutants``."""
