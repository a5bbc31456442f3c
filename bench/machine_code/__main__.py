"""``python -m bench.machine_code``: compiles every kernel, says what is wrong, prints the tables or writes them into docs/kernels.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from bench.machine_code import cuda, cuda_page, cuda_rules, generated, page, product_rules, products
from bench.machine_code.rules import violations
from bench.machine_code.targets import TARGETS, reason_missing
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", "targets", type=click.Choice(list(TARGETS)), multiple=True, help="Which processors. Default: all.")
@click.option("--write", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The page to write the tables into.")
@click.option("--complete", is_flag=True, help="Every variant on every target, not on sm_90 alone; takes four times as long.")
@click.option("--cuda", "of_cuda", is_flag=True, help="The kernels of csrc/cuda instead, by nvcc, for all architectures.")
@click.option("--products", "of_products", is_flag=True, help="Those of gradient norms per sample instead, for NVIDIA alone.")
def main(targets: tuple[str, ...], path: Path | None, complete: bool, of_cuda: bool, of_products: bool) -> None:
    """Compiles every Triton kernel, without a GPU. Exits with 1 where a rule is broken."""
    if (of_cuda or of_products) and (targets or complete or of_cuda == of_products):
        raise click.UsageError("--cuda and --products each compile all there is")
    if of_cuda:
        _report(path, *_cuda())
    if REASON_MISSING is not None or IS_INTERPRETED:
        raise click.ClickException(REASON_MISSING or "TRITON_INTERPRET is set: nothing is compiled")
    if of_products:
        found = products.compile_products(products.recorded())
        wrong = [text for code in found for text in product_rules.violations(code)]
        _report(path, product_rules.PART, product_rules.table(found), wrong)
    if path is not None and (targets or complete):
        raise click.UsageError("the page is written for all targets, and for some variants of those that are not sm_90")
    for target in targets or TARGETS:
        if (reason := reason_missing(target)) is not None:
            raise click.ClickException(f"{target}: {reason}")
    codes = page.codes_of(targets or TARGETS, complete=complete)
    _report(path, page.PART, page.tables(codes), [text for code in codes for text in violations(code)])


def _cuda() -> tuple[str, str, list[str]]:
    if (reason := cuda.reason_missing()) is not None:
        raise click.ClickException(reason)
    kernels = cuda.compile_all(cuda.toolkit()[2])
    return cuda_page.PART, cuda_page.table(kernels), [text for kernel in kernels for text in cuda_rules.violations(kernel)]


def _report(path: Path | None, part: str, tables: str, wrong: list[str]) -> NoReturn:
    if path is None:
        click.echo(tables)
    else:
        generated.write(path, part, tables)
    for text in wrong:
        click.echo(text, err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(prog_name="python -m bench.machine_code")
