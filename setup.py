"""Builds the torch-free native core with ninja. Options and the build's own words: docs/internals/layers.md, "Build"."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.append(str(Path(__file__).resolve().parent / "csrc"))
import cuda_toolkit
import ninja_build
from ninja_build import ROOT

MODE = os.environ.get("SAM_KERNELS_BUILD") or "auto"


def missing_toolchain() -> str | None:
    """Why this machine cannot build the native core, or None."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if sys.platform != "linux":
        return f"the native core is built on Linux only, this is {sys.platform}"
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} not found"
    return None if header.exists() else f"no Python headers: {header} not found (Debian: python3-dev)"


def leave_out(backend: str, missing: str, instead: str) -> None:
    """An error where the backend was asked for; under auto one line."""
    if MODE != "auto":
        raise SystemExit(f"sam_kernels: {missing}, and SAM_KERNELS_BUILD={MODE} asks for the {backend} backend")
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # an installer runs this file several times: one line, when it builds
        print(f"sam_kernels: {missing}; installing without the {backend} backend, {instead}", file=sys.stderr)


@functools.cache
def usable_toolkit() -> cuda_toolkit.Toolkit | None:
    """What compiles the CUDA backend. Most machines have no nvcc, which is no news under auto; one that cannot be used is."""
    nvcc = cuda_toolkit.find_nvcc(os.environ)
    if nvcc is None:
        if MODE == "cuda":
            raise SystemExit(f"sam_kernels: {cuda_toolkit.NOT_FOUND}, and SAM_KERNELS_BUILD=cuda asks for the CUDA backend")
        return None
    try:
        return cuda_toolkit.inspect(nvcc, [*ninja_build.host_options(), *shlex.split(ninja_build.setting("SAM_KERNELS_NVCCFLAGS"))])
    except cuda_toolkit.Unusable as reason:
        leave_out("CUDA", str(reason), "CUDA tensors get the triton backend")
        return None


def wanted_modules() -> list[str]:
    """The modules SAM_KERNELS_BUILD asks for: auto (what this machine can build), none, cpu, or cuda (which includes cpu)."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"SAM_KERNELS_BUILD={MODE}: expected auto, none, cpu or cuda")
    if MODE == "none":
        return []
    if (missing := missing_toolchain()) is not None:
        leave_out("native", missing, "the foreach backend is used")
        return []
    with_cuda = MODE != "cpu" and usable_toolkit() is not None
    on_host = os.environ.get("SAM_KERNELS_CUDA_ON_HOST") == "1"  # for the tests: the CUDA kernels as plain C++
    return ["_cpu", *(["_cuda"] if with_cuda else []), *(["_cuda_on_host"] if on_host else [])]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: every source of every module in parallel, and only those that changed."""

    def build_extensions(self) -> None:
        import ninja

        modules = [ext.name.rpartition(".")[2] for ext in self.extensions]
        folder = Path("build") / ninja_build.folder_name()  # not self.build_temp, which is a new folder at each editable install
        own = folder / ninja_build.python_folder()
        (ROOT / own).mkdir(parents=True, exist_ok=True)
        with (ROOT / own / "build.ninja").open("w", encoding="utf-8") as file:
            writer = ninja.ninja_syntax.Writer(file, width=10_000)
            try:
                ninja_build.write_rules(writer, str(folder), modules, usable_toolkit() if "_cuda" in modules else None)
            except (cuda_toolkit.Unusable, ninja_build.Unknown) as reason:
                raise SystemExit(f"sam_kernels: {reason}") from None
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(own / "build.ninja"), "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit("sam_kernels: compiling the native backend failed; the compiler's words are above")
        for module in ninja_build.BINDING:
            target = Path(self.get_ext_fullpath(f"sam_kernels.{module}"))
            if module not in modules:  # what an earlier build left here would get into a wheel
                target.unlink(missing_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")  # moved into place: a process that has the old module loaded keeps it
            shutil.copy2(ROOT / own / f"{module}.so", fresh)
            fresh.replace(target)


if __name__ == "__main__":
    setup(ext_modules=[Extension(f"sam_kernels.{name}", sources=[]) for name in wanted_modules()], cmdclass={"build_ext": NinjaBuild})
