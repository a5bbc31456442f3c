"""Native modules built on one machine for another: ``python -m bench.gpu.carry`` needs nvcc and no device, ``make gpu`` needs no nvcc then.

They are for one Python version and one compute capability. ``make gpu`` uses them if they were built from the sources that lie beside them,
can be imported and have code for the device; otherwise it prints the reason and builds its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.environment import commit

__all__ = ["FOLDER", "MODULES", "TOOLS", "carried_commit", "has_nvcc", "install", "is_there", "main", "reason_unfit", "sources"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "carry"
MANIFEST = "carry.json"
MODULES = ("_cuda", "_cpu")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")
TOOLS = ("setuptools", "pybind11", "ninja")
# Run by the other Python: what names its modules, and whether it can compile against itself.
_ASK = (
    "import json, os, sys, sysconfig; header = os.path.join(sysconfig.get_paths()['include'], 'Python.h'); "
    "print(json.dumps(['%d.%d' % sys.version_info[:2], sysconfig.get_config_var('EXT_SUFFIX'), os.path.exists(header)]))"
)
# Run in a process of its own: an import that crashes takes nothing along. After torch, as the package does: that brings the OpenMP runtime.
_IMPORT = (
    "import importlib.util as u, sys, torch\n"
    "for path in sys.argv[1:]:\n"
    "    spec = u.spec_from_file_location('sam_kernels.' + path.rpartition('/')[2].partition('.')[0], path)\n"
    "    module = u.module_from_spec(spec)\n"
    "    spec.loader.exec_module(module)\n"
    "    print(getattr(module, 'ARCHITECTURES', ''))\n"
)


def sources() -> str:
    """SHA-256 of everything that the modules are made of."""
    digest = hashlib.sha256()
    in_csrc = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES]
    for path in sorted([ROOT / "setup.py", *in_csrc]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def suffix_of(python: str, version: str) -> str | None:
    """The suffix of its extension modules if this is a Python of that version with its headers, else None."""
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
        found, suffix, has_header = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return str(suffix) if found == version and has_header else None


def candidates(version: str) -> list[str]:
    """This Python, the one on PATH, and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [sys.executable, shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"versions/{version}*/bin/python")))]
    return [python for python in found if python]


def _places_of_tools() -> list[str]:
    """Folders from which another Python can import setuptools, pybind11 and ninja: none of them is compiled for a version."""
    specs = {name: importlib.util.find_spec(name) for name in TOOLS}
    if absent := [name for name, spec in specs.items() if spec is None]:
        raise click.ClickException(f"building needs {', '.join(absent)}: pip install {' '.join(absent)}")
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs.values() if spec is not None and spec.origin))


def has_nvcc() -> bool:
    sys.path.append(str(ROOT / "csrc"))
    import cuda_toolkit

    return cuda_toolkit.find_nvcc(os.environ) is not None


def build(python: str, capability: str, into: Path) -> list[Path]:
    """Builds both modules into the folder, with the instruction set that every processor has."""
    shutil.rmtree(into, ignore_errors=True)
    env = {"SAM_KERNELS_INSTRUCTION_SETS": "baseline", **os.environ, "SAM_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability}
    env |= {"PYTHONPATH": os.pathsep.join(_places_of_tools()), "SAM_KERNELS_CUDA_ON_HOST": "0"}
    command = [python, "setup.py", "--quiet", "build_ext", "--build-lib", str(into)]
    if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode != 0:
        raise click.ClickException("the modules were not built; the reason is above")
    for path in (into / "sam_kernels").iterdir():
        path.rename(into / path.name)
    (into / "sam_kernels").rmdir()
    (into / MANIFEST).write_text(json.dumps({"sources": sources(), "capability": capability, **commit()}) + "\n")
    return sorted(into.glob("*.so"))


def _file(folder: Path, module: str) -> Path:
    return folder / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"


def carried_commit(folder: Path = FOLDER) -> dict[str, Any]:
    """The commit of the checkout in which the modules were built; nothing where there are none."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return {"commit": found["commit"], "dirty": found["dirty"]}
    except (OSError, ValueError, KeyError):
        return {}


def is_there(folder: Path = FOLDER) -> bool:
    return (folder / MANIFEST).exists()


def reason_unfit(capability: int, folder: Path = FOLDER) -> str | None:
    """Why the modules in the folder cannot be used by this Python on a device of this capability (90 for 9.0), or None if they can."""
    from sam_kernels.backends.native._architectures import runs_on

    try:
        built_from = json.loads((folder / MANIFEST).read_text())["sources"]
    except (OSError, ValueError, KeyError):
        return f"there are none in {_shown(folder)}"
    if built_from != sources():
        return "they were built from other sources"
    paths = [_file(folder, module) for module in MODULES]
    if not all(path.exists() for path in paths):
        return f"they are for another Python than {sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run([sys.executable, "-c", _IMPORT, *map(str, paths)], capture_output=True, text=True, check=False)
    found = done.stdout.splitlines()
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        return f"{MODULES[len(found)]} cannot be imported ({words[-1][:200] if words else f'exit code {done.returncode}'})"
    if not runs_on(found[0], capability):
        return f"_cuda has code for {found[0]}, this device is {capability // 10}.{capability % 10}"
    return None


def install(folder: Path = FOLDER, package: Path = ROOT / "sam_kernels") -> list[str]:
    """Copies the modules into the package. Returns their names."""
    for module in MODULES:
        target = _file(package, module)
        fresh = target.with_suffix(".new")  # moved into place: a process that has the old module loaded keeps it
        shutil.copy2(_file(folder, module), fresh)
        fresh.replace(target)
    return list(MODULES)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _described(paths: Sequence[Path]) -> str:
    return ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in paths)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", default="3.12", show_default=True, help="Of the Python that will import the modules.")
@click.option("--python", help="An interpreter of that version, with its headers. Default: on PATH, or pyenv's.")
@click.option("--capability", default="9.0", show_default=True, help="Compute capability of the device.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, help="Folder. Default: build/carry.")
def main(version: str, python: str | None, capability: str, out: Path) -> None:
    """Builds _cuda and _cpu for another machine's Python and device, without a device here."""
    found = next((each for each in ([python] if python else candidates(version)) if suffix_of(each, version)), None)
    if found is None:
        asked = f"{python} is no" if python else "there is no"
        instead = f"install one (pyenv install {version}) or name it with --python"
        raise click.ClickException(f"{asked} Python {version} with its headers: {instead}")
    if not has_nvcc():
        raise click.ClickException("there is no nvcc: put it on PATH, or set CUDA_HOME to the toolkit's folder")
    click.echo(f"{_shown(out.resolve())}: {_described(build(found, capability, out.resolve()))}; for Python {version} and {capability}")


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu.carry")
