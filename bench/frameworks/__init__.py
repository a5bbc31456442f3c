"""What SAM costs inside of a framework: ``python -m bench.frameworks``."""
