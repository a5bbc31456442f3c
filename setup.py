"""Builds the torch-free native core with ninja. Options and the build's own words: docs/architecture.md, "Build"."""

from __future__ import annotations

import hashlib
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
BINDING = ["bind_cpu", "tensor_list"]  # knows Python, compiled once
ENGINE = ["cpu/engine", "cpu/dispatch"]  # compiled once, for the oldest processor
# csrc/cpu/<op>.cpp, compiled once per instruction set; the slowest to compile first
CHUNK_KERNELS = ["adamw", "sgd", "perturb_variant", "direction", "random", "perturb", "norm"]
# No fast-math: only what does not change a result (errno and traps are not results). No contraction: see csrc/common/formulas.h.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
CXX_FLAGS += " -Wall -Wextra -Wno-psabi"
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    CXX_FLAGS += " -DSAM_X86_KERNELS"
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512"


def missing_toolchain() -> str | None:
    """Why this machine cannot build the native core, or None."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if sys.platform != "linux":
        return f"the native core is built on Linux only, this is {sys.platform}"
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} not found"
    return None if header.exists() else f"no Python headers: {header} not found (Debian: python3-dev)"


def wanted_extensions() -> list[Extension]:
    """The extensions SAM_KERNELS_BUILD asks for: auto (what this machine can build), none, cpu or cuda."""
    mode = os.environ.get("SAM_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"SAM_KERNELS_BUILD={mode}: expected auto, none, cpu or cuda")
    if mode == "cuda":
        raise SystemExit("SAM_KERNELS_BUILD=cuda: this version has no CUDA backend; use auto, cpu or none")
    if mode == "none":
        return []
    missing = missing_toolchain()
    if missing is None:
        return [Extension("sam_kernels._cpu", sources=[])]
    if mode == "cpu":
        raise SystemExit(f"sam_kernels: {missing}, and SAM_KERNELS_BUILD=cpu asks for the native backend")
    if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # an installer runs this file several times: one line, when it builds
        print(f"sam_kernels: {missing}; installing without the native backend, the foreach backend is used", file=sys.stderr)
    return []


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: every source in parallel, and only those that changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        cxx = os.environ.get("CXX") or "c++"
        extra = os.environ.get("SAM_KERNELS_CXXFLAGS", "")  # e.g. sanitizers; appended, so that it can also undo a flag
        # A folder for each Python and each way of compiling. Not self.build_temp, which is a new folder at each editable install.
        name = "ninja" + sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so")
        if (cxx, extra) != ("c++", ""):
            name += "." + hashlib.sha256(f"{cxx} {extra}".encode()).hexdigest()[:8]
        build = ROOT / "build" / name
        build.mkdir(parents=True, exist_ok=True)
        with (build / "build.ninja").open("w", encoding="utf-8") as file:
            self.write_rules(ninja.ninja_syntax.Writer(file, width=10_000), cxx, extra)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", jobs]).returncode != 0:
            raise SystemExit("sam_kernels: compiling the native backend failed; the compiler's words are above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")  # moved into place: a process that has the old module loaded keeps it
        shutil.copy2(build / "_cpu.so", fresh)
        fresh.replace(target)

    def write_rules(self, writer, cxx: str, extra: str) -> None:  # type: ignore[no-untyped-def]  # ninja's writer is untyped
        import pybind11

        def objects(sources: list[str], suffix: str, flags: str) -> list[str]:
            for source in sources:
                path = str(ROOT / "csrc" / f"{source}.cpp").replace("$", "$$")  # the writer escapes spaces, not dollars
                writer.build(f"{source}{suffix}", "compile", path, variables={"local": flags})
            return [f"{source}{suffix}" for source in sources]

        def include(path: object) -> str:
            return "-I" + shlex.quote(str(path)).replace("$", "$$")

        strip = "" if extra else "-Wl,-s"  # who adds flags debugs
        writer.variable("cxx", cxx)
        writer.variable("flags", f"{CXX_FLAGS} {include(ROOT / 'csrc')} {extra}")
        writer.rule("compile", "$cxx -MMD -MF $out.d $flags $local -c $in -o $out", depfile="$out.d", deps="gcc", description="$in $local")
        writer.rule("link", f"$cxx -shared $in -o $out -fopenmp {extra} {strip}", description="$out")
        # Python's headers only where they are used: an isolated build has them in a new place each time, and the kernels need no rebuild.
        # -O1: the binding is the longest to compile and calls into Python all the time; optimising it further gains nothing (measured).
        linked = objects(BINDING, ".o", f"-O1 {include(pybind11.get_include())} {include(sysconfig.get_paths()['include'])}")
        for isa in reversed(INSTRUCTION_SETS):
            linked += objects([f"cpu/{name}" for name in CHUNK_KERNELS], f".{isa}.o", f"-DSAM_ISA={isa} {INSTRUCTION_SETS[isa]}")
        linked += objects(ENGINE, ".o", "")
        writer.build("_cpu.so", "link", linked)
        writer.default("_cpu.so")


if __name__ == "__main__":
    setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": NinjaBuild})
