"""``python -m bench.machine_code``: compiles every kernel, says what is wrong, prints the tables or writes them into docs/kernels.md."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.machine_code import page
from bench.machine_code.rules import violations
from bench.machine_code.targets import TARGETS, reason_missing
from sam_kernels.backends.triton import IS_INTERPRETED, REASON_MISSING


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", "targets", type=click.Choice(list(TARGETS)), multiple=True, help="Which processors. Default: all.")
@click.option("--write", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The page to write the tables into.")
@click.option("--complete", is_flag=True, help="Every variant on every target, not on sm_90 alone; takes four times as long.")
def main(targets: tuple[str, ...], path: Path | None, complete: bool) -> None:
    """Compiles every Triton kernel, without a GPU. Exits with 1 where a rule is broken."""
    if REASON_MISSING is not None or IS_INTERPRETED:
        raise click.ClickException(REASON_MISSING or "TRITON_INTERPRET is set: nothing is compiled")
    if path is not None and (targets or complete):
        raise click.UsageError("the page is written for all targets, and for some variants of those that are not sm_90")
    for target in targets or TARGETS:
        if (reason := reason_missing(target)) is not None:
            raise click.ClickException(f"{target}: {reason}")
    codes = page.codes_of(targets or TARGETS, complete=complete)
    generated = page.tables(codes)
    if path is None:
        click.echo(generated)
    else:
        page.write(path, generated)
    wrong = [text for code in codes for text in violations(code)]
    for text in wrong:
        click.echo(text, err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(prog_name="python -m bench.machine_code")
