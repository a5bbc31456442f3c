"""What the compiler makes of every Triton kernel, for processors that need not be here: ``python -m bench.machine_code``."""
