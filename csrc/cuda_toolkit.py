"""Which nvcc compiles csrc/cuda, with which host compiler and for which devices."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

OLDEST = (11, 7)  # the first with __grid_constant__
NOT_FOUND = "no nvcc in $CUDA_HOME/bin, in $CUDA_PATH/bin, on PATH or in /usr/local/cuda/bin"
# Machine code for compute capability x.y runs on every device x.z with z >= y, so one entry a major version serves them all, and PTX of the
# last serves the devices to come. Each entry adds its share to the time to compile and to the size of the module. Turing (7.5) is left out:
# it has no bfloat16; TORCH_CUDA_ARCH_LIST=7.5 builds for it.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")


class Unusable(Exception):
    """Why an nvcc that is there cannot be used, or not as it is asked to."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str  # of nvcc: "13.0"
    known: tuple[str, ...]  # compute capabilities that it compiles for: ("7.5", "8.0", ...)
    include: str  # the folder of cuda_runtime_api.h


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Who sets CUDA_HOME or CUDA_PATH means that toolkit; else the one on PATH, or where NVIDIA's installer puts it."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    places = [*(f"{home}/bin" for home in homes), environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def host_compiler_options(cxx: str) -> list[str]:
    """CXX for nvcc, which takes the compiler alone: without a launcher before it (``ccache g++``), its options apart (``g++ -pipe``)."""
    words = shlex.split(cxx)
    command = list(takewhile(lambda word: not word.startswith("-"), words))
    return [*(["-ccbin", command[-1]] if command else []), *(f"-Xcompiler={word}" for word in words[len(command) :])]


def inspect(nvcc: str, options: Sequence[str]) -> Toolkit:
    """Raises Unusable where ``nvcc`` with these options does not run, is too old, or refuses its host compiler."""
    said = _run(nvcc, "--version")
    if not (release := re.search(r"release (\d+)\.(\d+)", said)):
        raise Unusable(f"{nvcc} --version names no release: {said.strip()}")
    major, minor = map(int, release.groups())
    if (major, minor) < OLDEST:
        raise Unusable(f"{nvcc} is release {major}.{minor}; {OLDEST[0]}.{OLDEST[1]} or newer is needed")
    known = tuple(f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"compute_(\d+)", _run(nvcc, "--list-gpu-arch")))
    # The headers that an empty source includes: nvcc's own, where it says what it thinks of the host compiler, are among them.
    headers = _run(nvcc, *options, "-x", "cu", "-M", "/dev/null")
    if not (header := re.search(r"((?:\\ |\S)+)/cuda_runtime\.h", headers)):
        raise Unusable(f"{nvcc} has no cuda_runtime.h")
    return Toolkit(nvcc, f"{major}.{minor}", known, header[1].replace("\\ ", " "))


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unusable(f"{command[0]} does not run: {error}") from None
    if result.returncode != 0:
        words = [line for line in (result.stderr + result.stdout).splitlines() if "error" in line.lower() or "fatal" in line.lower()]
        raise Unusable(f"{shlex.join(command)} fails: {words[0].strip() if words else result.stderr.strip()}")
    return result.stdout


def architectures(asked: str, toolkit: Toolkit) -> list[str]:
    """What to compile for: TORCH_CUDA_ARCH_LIST as torch writes it (``"8.0;9.0a+PTX"``, also with spaces), or all that are usual.

    Raises Unusable for what is no compute capability and for one that the toolkit does not know.
    """
    if not (wanted := list(dict.fromkeys(asked.replace(";", " ").split()))):
        usual = [arch for arch in DEFAULT_ARCHITECTURES if arch in toolkit.known]
        return [*usual[:-1], f"{usual[-1]}+PTX"]
    for entry in wanted:
        if not (match := re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", entry)):
            raise Unusable(f"TORCH_CUDA_ARCH_LIST={asked!r}: {entry!r} is no compute capability such as 9.0, 9.0a or 9.0+PTX")
        if match[1] not in toolkit.known:
            known = ", ".join(toolkit.known)
            raise Unusable(f"TORCH_CUDA_ARCH_LIST={asked!r}: nvcc {toolkit.version} compiles for {known}, not for {match[1]}")
    return wanted


def code_options(archs: Sequence[str]) -> list[str]:
    """nvcc's options for these architectures: machine code for each, and PTX where an entry says so."""
    options = []
    for entry in archs:
        number = entry.removesuffix("+PTX").replace(".", "")
        options += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            options += [f"-gencode=arch=compute_{number},code=compute_{number}"]
    return options
