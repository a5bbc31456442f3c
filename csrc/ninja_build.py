"""What is compiled, how, and into which module, as rules for ninja. setup.py writes and runs them.

Sources, objects and modules are named relative to the root, where ninja runs: nvcc does not survive every character a path may have.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from cuda_toolkit import Toolkit, architectures, code_options, host_compiler_options

ROOT = Path(__file__).resolve().parents[1]
BINDING = {"_cpu": "bind_cpu", "_cuda": "bind_cuda", "_cuda_on_host": "bind_cuda"}  # each module's own source
SHARED = ["operation", "tensor_list"]  # in every module, compiled once
ENGINE = ["cpu/engine", "cpu/per_sample", "cpu/sharpness", "cpu/dispatch"]  # compiled once, for the oldest processor
# csrc/cpu/<op>.cpp, compiled once per instruction set; the slowest to compile first
CHUNK_KERNELS = [
    "adamw",
    "sgd",
    "perturb_variant",
    "direction",
    "combine",
    "centralize",
    "grad_dots",
    "random",
    "perturb",
    "norm",
    "finite",
]
# The same, with fused multiply-adds where the instruction set has them: their bits differ between instruction sets.
MATRIX_KERNELS = ["direct", "gram", "dots", "affine", "rows"]
# No fast-math: only what does not change a result (errno and traps are not results). No contraction: see csrc/common/formulas.h.
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
CXX_FLAGS += " -Wall -Wextra -Wno-psabi"
INSTRUCTION_SETS = {"baseline": ""}
FUSED: dict[str, str] = {}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mf16c"
    FUSED["avx2"] = " -mfma"  # part of AVX-512
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512"
# -lineinfo: profilers show source lines; it changes no code. Compressed, or the module would be nine times as large (53 MB).
NVCC_FLAGS = "-std=c++17 -O3 -lineinfo -Xfatbin=-compress-all --fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off -I csrc"
# The same sources as plain C++. Nobody waits for these kernels, so less time goes into compiling them; pragmas are for nvcc.
ON_HOST_FLAGS = "-x c++ -DSAM_CUDA_ON_HOST -O2 -Wno-unknown-pragmas"
# The variables that change how sources are compiled, and what they are where nobody set them.
SETTINGS = {
    "CXX": "c++",
    "SAM_KERNELS_CXXFLAGS": "",
    "SAM_KERNELS_NVCCFLAGS": "",
    "SAM_KERNELS_INSTRUCTION_SETS": "",
    "TORCH_CUDA_ARCH_LIST": "",
}


class Unknown(Exception):
    """A variable names what there is not."""


def setting(name: str) -> str:
    return os.environ.get(name) or SETTINGS[name]


def host_options() -> list[str]:
    """What nvcc is told about its host compiler: nothing, unless CXX names one."""
    return host_compiler_options(os.environ.get("CXX") or "")


def chosen_instruction_sets() -> list[str]:
    """All, or the baseline, which every processor runs, and what SAM_KERNELS_INSTRUCTION_SETS lists (``"avx2;avx512"``)."""
    wanted = setting("SAM_KERNELS_INSTRUCTION_SETS").replace(";", " ").split()
    if unknown := [isa for isa in wanted if isa not in INSTRUCTION_SETS]:
        raise Unknown(f"SAM_KERNELS_INSTRUCTION_SETS: {unknown[0]!r} is unknown; the names are {', '.join(INSTRUCTION_SETS)}")
    return [isa for isa in INSTRUCTION_SETS if not wanted or isa in wanted or isa == "baseline"]


def folder_name() -> str:
    """A folder for each platform and each way of compiling, so that going back and forth between two of them compiles nothing.

    All interpreters share it: most objects do not depend on Python.
    """
    name = f"ninja.{sysconfig.get_platform()}"
    values = [setting(each) for each in SETTINGS]
    return name if values == list(SETTINGS.values()) else f"{name}.{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def python_folder() -> str:
    """The folder inside ``folder_name()`` of what depends on this Python: its build.ninja, bindings and modules."""
    return str(sysconfig.get_config_var("SOABI"))


def quoted(*words: object) -> str:
    """Words for the shell that ninja calls. Its writer escapes what is special in paths, but not dollars."""
    return shlex.join(str(word) for word in words).replace("$", "$$")


class Rules:
    """Writes one build.ninja whose targets lie in ``folder``, relative to the root; bindings and modules in one of this Python."""

    def __init__(self, writer, folder: str) -> None:  # type: ignore[no-untyped-def]  # ninja's writer is untyped
        self.writer = writer
        self.folder = folder

    def objects(self, sources: Sequence[str], suffix: str, flags: str, rule: str = "compile") -> list[str]:
        return self._objects(self.folder, sources, suffix, flags, rule)

    def bindings(self, sources: Sequence[str], suffix: str, flags: str) -> list[str]:
        return self._objects(f"{self.folder}/{python_folder()}", sources, suffix, flags, "compile")

    def _objects(self, folder: str, sources: Sequence[str], suffix: str, flags: str, rule: str) -> list[str]:
        made = [f"{folder}/{os.path.splitext(source)[0]}{suffix}" for source in sources]
        for source, target in zip(sources, made, strict=True):
            self.writer.build(target, rule, f"csrc/{source}", variables={"local": flags})
        return made

    def module(self, name: str, objects: Sequence[str], rule: str = "link") -> None:
        target = f"{self.folder}/{python_folder()}/{name}.so"
        self.writer.build(target, rule, objects)
        self.writer.default(target)


def write_rules(writer, folder: str, modules: Sequence[str], toolkit: Toolkit | None) -> None:  # type: ignore[no-untyped-def]  # as above
    import pybind11

    rules = Rules(writer, folder)
    extra = setting("SAM_KERNELS_CXXFLAGS")  # appended, so that it can also undo a flag
    writer.variable("builddir", folder)  # where ninja keeps its log, also of the objects that another Python's build.ninja made
    writer.variable("cxx", setting("CXX"))
    compiling = f"$cxx -MMD -MF $out.d {CXX_FLAGS} -Icsrc $local {extra} -c $in -o $out"
    writer.rule("compile", compiling, depfile="$out.d", deps="gcc", description="$in $local")
    strip = "" if extra else "-Wl,-s"  # who adds flags debugs
    writer.rule("link", f"$cxx -shared $in -o $out -fopenmp {extra} {strip}", description="$out")
    # Python's headers only where they are used: an isolated build has them in a new place each time, and the kernels need no rebuild.
    # -O1: the binding is the longest to compile and calls into Python all the time; optimising it further gains nothing (measured).
    python = f"-O1 {quoted('-I', pybind11.get_include(), '-I', sysconfig.get_paths()['include'])}"

    shared = rules.bindings([f"{name}.cpp" for name in SHARED], ".o", python)
    linked = rules.bindings([f"{BINDING['_cpu']}.cpp"], ".o", python)
    isas = chosen_instruction_sets()
    for isa in reversed(isas):
        flags = f"-DSAM_ISA={isa} {INSTRUCTION_SETS[isa]}"
        linked += rules.objects([f"cpu/{name}.cpp" for name in CHUNK_KERNELS], f".{isa}.o", flags)
        linked += rules.objects([f"cpu/{name}.cpp" for name in MATRIX_KERNELS], f".{isa}.o", flags + FUSED.get(isa, ""))
    defines = " ".join(f"-DSAM_{isa.upper()}_KERNELS" for isa in isas if isa != "baseline")
    linked += rules.objects([f"{name}.cpp" for name in ENGINE], ".o", defines)
    rules.module("_cpu", shared + linked)

    kernels = sorted(f"cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    if toolkit is not None:
        archs = architectures(setting("TORCH_CUDA_ARCH_LIST"), toolkit)
        write_nvcc_rules(writer, toolkit, archs)
        defines = quoted("-DSAM_CUDA_MODULE=_cuda", f'-DSAM_CUDA_ARCHITECTURES="{";".join(archs)}"', "-I", toolkit.include)
        linked = rules.bindings([f"{BINDING['_cuda']}.cpp"], ".o", f"{python} {defines}")
        linked += rules.objects(kernels, ".device.o", "", "compile_cuda")
        rules.module("_cuda", shared + linked, "link_cuda")
    if "_cuda_on_host" in modules:
        defines = quoted("-DSAM_CUDA_MODULE=_cuda_on_host", '-DSAM_CUDA_ARCHITECTURES="host"', "-DSAM_CUDA_ON_HOST")
        linked = rules.bindings([f"{BINDING['_cuda_on_host']}.cpp"], ".host.o", f"{python} {defines}")
        linked += rules.objects(kernels, ".host.o", ON_HOST_FLAGS)
        rules.module("_cuda_on_host", shared + linked)


def write_nvcc_rules(writer, toolkit: Toolkit, archs: Sequence[str]) -> None:  # type: ignore[no-untyped-def]  # as above
    host, extra, extra_cxx = quoted(*host_options()), setting("SAM_KERNELS_NVCCFLAGS"), setting("SAM_KERNELS_CXXFLAGS")
    writer.variable("nvcc", f"{quoted(toolkit.nvcc)} {host}")
    compiling = f"$nvcc -MMD -MF $out.d {NVCC_FLAGS} {quoted(*code_options(archs))} {extra} -c $in -o $out"
    writer.rule("compile_cuda", compiling, depfile="$out.d", deps="gcc", description=f"$in for {' '.join(archs)}")
    # The runtime goes into the module: one binary for every torch, whichever runtime that brings. Nothing is left to link for the device;
    # without -nodlink nvcc would add an empty program for its oldest architecture. What CXXFLAGS instrument needs them here too.
    strip = "" if extra or extra_cxx else "-Xlinker=-s"
    linking = f"$nvcc -shared -cudart static -nodlink -forward-unknown-to-host-compiler {extra_cxx} $in -o $out {strip}"
    writer.rule("link_cuda", linking, description="$out")
