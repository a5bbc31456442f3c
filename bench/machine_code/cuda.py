"""csrc/cuda compiled for processors that need not be here, with the flags that ship; what ptxas and the disassembly say of each kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from bench.machine_code import _sass
from bench.machine_code._ptx import loose_arithmetic

__all__ = ["ARCHITECTURES", "ROOT", "SOURCES", "Kernel", "compile_all", "compile_file", "reason_missing", "toolkit"]

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# All of csrc/cuda/*.cu with kernels, the slowest to compile first.
SOURCES = (
    "adamw", "sgd", "random", "centralize", "direction", "perturb_variant", "grad_dots", "combine", "norm", "perturb", "check", "copy",
    "sharpness", "advance", "finish", "finish_dots",
)  # fmt: skip
_STORAGE = {
    "7UniformIf": "fp32",
    "7UniformINS0_8BFloat16": "bf16",
    "7UniformINS0_7Float16": "fp16",
    "5MixedIf": "mixed",
    "5MixedId": "fp64",
}
_USED = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_\w+'\n.*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    source: str
    op: str  # the source, with what tells apart those of one: "random_normal", "random_rademacher"; "sgd", "sgd_variant"
    storage: str  # fp32, bf16, fp16; mixed: several types, none of them fp64; fp64: alone or beside others; "": no list of operands
    table: int  # bytes of arguments its table was made for; 0 where it has none
    arch: str
    threads: int  # of a block
    arguments: int  # bytes
    registers: int
    stack: int
    spilled: int  # bytes stored and loaded
    shared: int
    loops: list[_sass.Loop]
    local_accesses: int
    atomics: int
    approximate: list[str]  # instructions that round otherwise than IEEE 754 says, or flush denormals
    fused: list[str]  # multiply-adds, and what ptxas would be free to contract into them

    def __str__(self) -> str:
        return " ".join(filter(None, (self.arch, self.op, self.storage, f"table of {self.table} bytes" if self.table else "")))

    @property
    def wide_loops(self) -> list[_sass.Loop]:
        """The main loops."""
        return [loop for loop in self.loops if loop.is_wide]


def _build() -> tuple[ModuleType, ModuleType]:
    """The build's own modules, for its flags and its toolkit."""
    folder = str(ROOT / "csrc")
    if folder not in sys.path:
        sys.path.append(folder)
    import cuda_toolkit
    import ninja_build

    return cuda_toolkit, ninja_build


def flags() -> list[str]:
    return _build()[1].NVCC_FLAGS.split()  # type: ignore[no-any-return]  # a module loaded by its path


@cache
def toolkit() -> tuple[str, str, tuple[str, ...]]:
    """(nvcc, its version, the architectures of ARCHITECTURES that it knows). Raises RuntimeError where there is none."""
    cuda_toolkit, ninja_build = _build()
    nvcc = cuda_toolkit.find_nvcc(os.environ)
    if nvcc is None:
        raise RuntimeError(cuda_toolkit.NOT_FOUND)
    try:
        found = cuda_toolkit.inspect(nvcc, ninja_build.host_options())
    except cuda_toolkit.Unusable as reason:
        raise RuntimeError(str(reason)) from None
    known = {f"sm_{capability.replace('.', '')}" for capability in found.known}
    return nvcc, found.version, tuple(arch for arch in ARCHITECTURES if arch in known)


@cache
def _cuobjdump() -> str:
    """The toolkit's, or Triton's."""
    places = [str(Path(toolkit()[0]).parent), os.environ.get("PATH", "")]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    for place in places:
        if found := shutil.which("cuobjdump", path=place):
            return found
    raise RuntimeError("no cuobjdump beside nvcc, on PATH or in triton: machine code cannot be read")


def reason_missing() -> str | None:
    """None where this machine can compile and disassemble, otherwise why not."""
    try:
        toolkit()
        _cuobjdump()
    except RuntimeError as reason:
        return str(reason)
    return None


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} fails: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def compile_file(source: str, arch: str, root: Path = ROOT) -> list[Kernel]:
    """The kernels of ``root``/csrc/cuda/``source``.cu."""
    nvcc = toolkit()[0]
    with tempfile.TemporaryDirectory() as kept:
        cubin = Path(kept) / f"{source}.cubin"
        keep = ("--keep", "--keep-dir", kept)  # for the PTX
        said = _run(
            nvcc, *_build()[1].host_options(), *flags(), "-cubin", f"-arch={arch}", "-Xptxas", "-v", *keep, f"csrc/cuda/{source}.cu", "-o",
            cubin, cwd=root,
        )  # fmt: skip
        sass = dict(_sass.functions(_run(_cuobjdump(), "-sass", cubin, cwd=root)))
        (ptx,) = Path(kept).glob("*.ptx")
        text = ptx.read_text(encoding="utf-8")
    entries = dict(re.findall(r"\.entry (\w+)(\(.*?^})", text, re.MULTILINE | re.DOTALL))
    used = {name: [int(number or 0) for number in numbers] for name, *numbers in _USED.findall(said)}
    if not entries or not entries.keys() == used.keys() <= sass.keys():
        raise RuntimeError(f"{source} for {arch}: {len(entries)} kernels in PTX, {len(used)} that ptxas tells of, {len(sass)} functions")
    return [_kernel(source, arch, name, entries[name], used[name], sass[name]) for name in entries]


def _op_of(source: str, name: str) -> str:
    """The source, with what tells its kernels apart where it has several."""
    if sharpness := re.search(r"\dSharpness(Weights|Draw|Rank)E", name):
        return f"{source}_{sharpness[1].lower()}"
    if random := re.search(r"13RandomPerturb.*?ELb([01])E", name):
        return f"{source}_normal" if random[1] == "1" else f"{source}_rademacher"
    if update := re.search(r"(?:3Sgd|4Adam)I.*?ELb([01])E", name):
        return f"{source}_variant" if update[1] == "1" else source
    return source


def _kernel(source: str, arch: str, name: str, ptx: str, used: list[int], code: list[_sass.Instruction]) -> Kernel:
    storage = next((storage for mangled, storage in _STORAGE.items() if mangled in name), "")
    table = re.search(r"TableILi\d+ELi(\d+)E", name)
    stack, spill_stores, spill_loads, registers, shared = used
    threads = re.search(r"\.maxntid (\d+)", ptx)
    assert threads is not None
    return Kernel(
        source=source,
        op=_op_of(source, name),
        storage=storage,
        table=int(table[1]) if table else 0,
        arch=arch,
        threads=int(threads[1]),
        arguments=_bytes_of_parameters(ptx),
        registers=registers,
        stack=stack,
        spilled=spill_stores + spill_loads,
        shared=shared,
        loops=_sass.loops(code),
        local_accesses=sum(_sass.is_local(instruction.opcode) for instruction in code),
        atomics=sum(_sass.is_atomic(instruction.opcode) for instruction in code),
        approximate=sorted(set(re.findall(r"\b[a-z]\w*(?:\.\w+)*\.(?:approx|ftz|full)(?:\.\w+)*", ptx))),
        fused=sorted(set(re.findall(r"\bfma\.\w+\.\w+", ptx)) | set(loose_arithmetic(ptx))),
    )


def _bytes_of_parameters(ptx: str) -> int:
    end = 0
    for alignment, size in re.findall(r"\.param \.align (\d+) \.b8 \w+\[(\d+)\]", ptx.split(")")[0]):
        end = -(-end // int(alignment)) * int(alignment) + int(size)
    return end


def compile_all(architectures: Iterable[str], jobs: int = 2) -> list[Kernel]:
    """Every kernel for these architectures: a minute with two processors."""
    work = [(source, arch) for source in SOURCES for arch in architectures]
    with ThreadPoolExecutor(jobs) as pool:  # threads: the work is that of processes they wait for
        return [kernel for kernels in pool.map(lambda item: compile_file(*item), work) for kernel in kernels]
