"""``make check-wheel``: what a user gets from a wheel, in an environment with torch alone and nothing of this checkout.

The package imports, ``info`` names the compiled kernels and one OpenMP runtime, a program makes steps of each kind, and ``mypy --strict``
accepts that program.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import click

from tools.environments import ROOT, NotToBeHad, Torch, pinned

__all__ = ["main", "problems_of", "wheel_for"]

SNIPPET = ROOT / "tools" / "user_snippet.py"


def wheel_for(folder: Path) -> Path:
    """Return the newest wheel in a folder for the running Python. Raises click.ClickException where there is none."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().partition("-")[2]
    found = [*folder.glob(f"sam_kernels-*-{tag}-{tag}-*linux*_{platform}.whl")]
    if not found:
        raise click.ClickException(f"no wheel for {tag} on {platform} in {folder}: run make wheel")
    return max(found, key=lambda path: path.stat().st_mtime)


def problems_of(info: dict[str, object]) -> list[str]:
    """Return what is wrong with the facts that ``python -m sam_kernels info --json`` prints for a wheel with compiled kernels."""
    found = []
    backends = info["backends"]
    assert isinstance(backends, dict)
    if "cpu" not in backends["native"]["devices"]:
        found.append(f"no native backend: {backends['native']['reason']}")
    runtimes = info["openmp_runtimes"]
    if not isinstance(runtimes, list) or len(runtimes) != 1:
        found.append(f"expected one OpenMP runtime, torch's; loaded: {runtimes}")
    return found


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(wheel: Path, folder: Path) -> None:
    version = pinned("torch")[0].partition("==")[2]
    try:
        environment = Torch(folder / "venv", version)
    except NotToBeHad as reason:
        raise click.ClickException(f"torch {version}: {reason}; set PIP_EXTRA_INDEX_URL to PyTorch's CPU index") from None
    click.echo(f"torch {environment.version}, and nothing else; installing {wheel.name}")
    environment.install("--constraint", ROOT / "constraints.txt", wheel, "mypy", "typing_extensions")
    python = environment.python
    here = Path(shutil.copy2(SNIPPET, folder))
    where = run(python, "-I", "-c", "import sam_kernels; print(sam_kernels.__file__)", cwd=folder)
    if not Path(where.strip()).is_relative_to(folder):
        raise click.ClickException(f"not the wheel's package was imported: {where.strip()}")
    if problems := problems_of(json.loads(run(python, "-I", "-m", "sam_kernels", "info", "--json", cwd=folder))):
        raise click.ClickException("; ".join(problems))
    click.echo(run(python, "-I", "-m", "sam_kernels", "info", cwd=folder).rstrip())
    click.echo(run(python, "-I", here, cwd=folder).rstrip())
    click.echo("mypy --strict: " + run(python, "-I", "-m", "mypy", "--strict", here, cwd=folder).rstrip())


@click.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
def main(wheel: Path | None) -> None:
    """Check WHEEL, or the newest one in dist/ for this Python."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        check((wheel or wheel_for(ROOT / "dist")).resolve(), Path(folder).resolve())
    click.echo(f"the wheel is sound; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
