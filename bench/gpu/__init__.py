"""The benchmark on a device: ``python -m bench.gpu``; everything there is to run on one: ``make gpu`` (``bench.gpu.run``)."""
