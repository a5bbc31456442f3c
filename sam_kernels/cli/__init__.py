"""The command line: ``sam-kernels`` and ``python -m sam_kernels``."""

from typing import Any

import click

from sam_kernels import __version__
from sam_kernels.cli.info import info
from sam_kernels.cli.output import INTERRUPTED
from sam_kernels.cli.prove.command import prove
from sam_kernels.cli.train.command import train as train_command
from sam_kernels.cli.validate import validate

__all__ = ["main"]


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C has the exit status that a shell expects, in every command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="sam_kernels")
def main() -> None:
    """Fused kernels and drop-in optimizers for sharpness-aware minimization."""


main.add_command(info)
main.add_command(prove)
main.add_command(train_command)
main.add_command(validate)
