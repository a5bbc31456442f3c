"""The command line: ``sam-kernels`` and ``python -m sam_kernels``."""

import click

from sam_kernels import __version__
from sam_kernels.cli.info import info
from sam_kernels.cli.prove.command import prove
from sam_kernels.cli.train.command import train as train_command
from sam_kernels.cli.validate import validate

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="sam_kernels")
def main() -> None:
    """Fused kernels and drop-in optimizers for sharpness-aware minimization."""


main.add_command(info)
main.add_command(prove)
main.add_command(train_command)
main.add_command(validate)
