"""``python -m sam_kernels info``: the backends that run here, and the reason why another does not."""

from __future__ import annotations

from dataclasses import asdict

import click

from sam_kernels.cli.output import to_json

__all__ = ["info"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON to stdout, and all else to stderr.")
def info(as_json: bool) -> None:
    """Print backends (available, or the reason not), versions, instruction set, threads, OpenMP runtime and devices."""
    from sam_kernels.cli.machine import collect

    facts = collect()
    if as_json:
        click.echo(to_json(asdict(facts)))
        return
    for name, backend in facts.backends.items():
        state = f"available on {', '.join(backend.devices)}: {backend.detail}" if backend.devices else f"no: {backend.reason}"
        click.echo(f"{name + ' backend':<18}{state}")
    for name, version in facts.versions.items():
        click.echo(f"{name:<18}{version or 'not installed'}")
    click.echo(f"{'instruction set':<18}{facts.instruction_set or 'none: no compiled CPU kernels'} ({facts.machine})")
    click.echo(f"{'CUDA kernels':<18}{facts.cuda_kernels}")
    click.echo(f"{'threads':<18}{facts.threads}")
    click.echo(f"{'OpenMP runtime':<18}{facts.openmp}")
    for i, device in enumerate(facts.devices):
        click.echo(f"{'devices' if i == 0 else '':<18}{device}")
