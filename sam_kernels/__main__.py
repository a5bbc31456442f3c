"""``python -m sam_kernels``."""

from sam_kernels.cli import main

main(prog_name="python -m sam_kernels")
