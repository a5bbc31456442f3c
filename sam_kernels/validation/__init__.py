"""The validation engine: every operation on every backend against the float64 reference, within derived bounds.

``validate`` on the command line, the tests and the benchmarks share it. ``rows`` runs whole tables; ``check``, ``per_sample.check`` and
``sharpness.check`` run one case of one operation. Below them: inputs (``cases``, ``options``, ``problem``), bounds (``tolerance``,
``roundings``, ``bounds``) and the comparison (``compare``).
"""
