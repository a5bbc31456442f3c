"""The validation engine: every operation on every backend against the float64 reference, within derived bounds.

``validate`` on the command line, the tests and the benchmarks share it. ``rows`` runs whole tables, ``check`` one case of one operation of
any family. ``lists``, ``per_sample`` and ``sharpness`` are the families: each provides calls and their bounds, as ``family`` defines.
Below them are the inputs (``cases``, ``options``, ``problem``), the bounds (``tolerance``, ``roundings``, ``bounds``) and the comparison
(``compare``).
"""
