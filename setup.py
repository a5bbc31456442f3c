"""Builds the torch-free native core with ninja. Options and the build's own words: docs/architecture.md, "Build"."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHUNK_KERNELS = ["norm", "perturb", "sgd", "adamw"]  # csrc/cpu/<op>.cpp, compiled once per instruction set
ENGINE = ["bind_cpu", "cpu/engine", "cpu/dispatch"]
# No fast-math: only what does not change a result (errno and traps are not results). No contraction: see csrc/common/formulas.h.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi"
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512"


def wanted_extensions() -> list[Extension]:
    """The extensions SAM_KERNELS_BUILD asks for: auto (what this machine can build), none, cpu or cuda."""
    mode = os.environ.get("SAM_KERNELS_BUILD", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"SAM_KERNELS_BUILD={mode}: expected auto, none, cpu or cuda")
    if mode == "cuda":
        raise SystemExit("SAM_KERNELS_BUILD=cuda: this version has no CUDA backend; use auto, cpu or none")
    if mode == "none":
        return []
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        message = f"sam_kernels: no C++ compiler ({compiler!r} not found)"
        if mode == "cpu":
            raise SystemExit(f"{message}, and SAM_KERNELS_BUILD=cpu asks for one")
        print(f"{message}; installing without the native backend, the foreach backend is used", file=sys.stderr)
        return []
    return [Extension("sam_kernels._cpu", sources=[])]


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: every source in parallel, and only those that changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        # Not self.build_temp, which is a new folder at each editable install. Ninja itself rebuilds on a changed command line.
        build = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        with (build / "build.ninja").open("w") as file:
            self.write_rules(ninja_writer(file), includes, target)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", jobs]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("sam_kernels: compiling the native backend failed; the compiler's words are above")

    def write_rules(self, writer, includes, target: Path) -> None:  # type: ignore[no-untyped-def]
        extra = os.environ.get("SAM_KERNELS_CXXFLAGS", "")  # e.g. sanitizers; appended, so that it can also undo a flag
        x86 = "-DSAM_X86_KERNELS" if "avx2" in INSTRUCTION_SETS else ""
        include_flags = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
        writer.variable("cxx", os.environ.get("CXX", "c++"))
        writer.variable("flags", f"{CXX_FLAGS} {x86} {include_flags} {extra}")
        writer.rule("compile", "$cxx -MMD -MF $out.d $flags $isa -c $in -o $out", depfile="$out.d", deps="gcc", description="$in $isa")
        writer.rule("link", f"$cxx -shared $in -o $out -fopenmp {extra} -Wl,-s", description="link $out")
        objects = [self.compile(writer, f"{name}.o", name, "") for name in ENGINE]
        for isa, isa_flags in INSTRUCTION_SETS.items():
            objects += [self.compile(writer, f"cpu/{name}.{isa}.o", f"cpu/{name}", f"-DSAM_ISA={isa} {isa_flags}") for name in CHUNK_KERNELS]
        writer.build(str(target), "link", objects)
        writer.default(str(target))

    @staticmethod
    def compile(writer, output: str, source: str, isa: str) -> str:  # type: ignore[no-untyped-def]
        path = str(ROOT / "csrc" / f"{source}.cpp").replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        writer.build(output, "compile", path, variables={"isa": isa})
        return output


def ninja_writer(file):  # type: ignore[no-untyped-def]
    from ninja.ninja_syntax import Writer

    return Writer(file, width=10_000)


setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": NinjaBuild})
