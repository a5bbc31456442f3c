"""What the compiler made of csrc/: nothing leaks from one instruction set into another, and no rounding is contracted away."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kept_objects import built_folder, in_place_of_the_compiler

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
BUILD = SETUP["ninja_build"]
CHUNK_KERNELS: list[str] = BUILD.CHUNK_KERNELS
MATRIX_KERNELS: list[str] = BUILD.MATRIX_KERNELS
INSTRUCTION_SETS: dict[str, str] = BUILD.INSTRUCTION_SETS
FUSED_MULTIPLY_ADD = re.compile(r"\bv?fn?m(?:add|sub|addsub|subadd)[0-9]*[sp][sdh]?\b|\bfn?m(?:la|ls)\b")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None or shutil.which("objdump") is None, reason="needs binutils (nm, objdump)")


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> Path:
    """The folder of object files, as setup.py makes them with its own flags: those of the build at hand, else compiled now."""
    folder = built_folder(BUILD)
    if folder is not None:
        return folder
    if (missing := SETUP["missing_toolchain"]()) is not None:
        pytest.skip(missing)
    copy = tmp_path_factory.mktemp("objects")
    environment = os.environ | in_place_of_the_compiler(tmp_path_factory.mktemp("compiler"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "sam_kernels").mkdir()
    env = environment | {"SAM_KERNELS_BUILD": "cpu", "SAM_KERNELS_CXXFLAGS": "", "CXX": ""}
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=copy, env=env, check=True)
    (folder,) = (copy / "build").glob("ninja*")
    return folder


def objects_of(folder: Path, isa: str, names: list[str] = CHUNK_KERNELS) -> list[Path]:
    return [folder / "cpu" / f"{name}.{isa}.o" for name in names]


def leaked_symbols(path: Path, isa: str) -> list[str]:
    """Symbols that an object defines for others and that are not in the namespace of its instruction set, and every weak one."""
    namespace = f"_ZN3sam3cpu{len(isa)}{isa}"
    lines = [line.split() for line in run("nm", "--extern-only", "--defined-only", path).splitlines()]
    return [f"{kind} {name}" for _, kind, name in lines if kind in "WwVvu" or not name.startswith(namespace)]


def disassembly(path: Path) -> str:
    return run("objdump", "--disassemble", "--no-show-raw-insn", path)


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", CHUNK_KERNELS + MATRIX_KERNELS)
def test_a_kernel_object_defines_symbols_only_in_its_own_namespace(objects, name, isa):
    path = objects / "cpu" / f"{name}.{isa}.o"
    assert leaked_symbols(path, isa) == []
    assert f"3cpu{len(isa)}{isa}" in run("nm", "--extern-only", "--defined-only", path)  # it does define its kernels


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in INSTRUCTION_SETS, reason="x86-64 registers")
def test_only_the_newer_instruction_sets_use_wide_registers(objects):
    every = CHUNK_KERNELS + MATRIX_KERNELS
    of_python = [f"{BUILD.python_folder()}/{name}" for name in ("bind_cpu", *BUILD.SHARED)]
    for path in [*objects_of(objects, "baseline", every), *(objects / f"{name}.o" for name in [*of_python, *BUILD.ENGINE])]:
        assert set(re.findall(r"%[yz]mm", disassembly(path))) == set(), path.name
    for path in objects_of(objects, "avx2", every):
        assert set(re.findall(r"%[yz]mm|%k[1-7]", disassembly(path))) == {"%ymm"}, path.name


@pytest.mark.slow
@pytest.mark.skipif("avx512" not in INSTRUCTION_SETS, reason="x86-64 registers")
def test_avx512_sgd_is_vectorised_and_streams(objects):
    text = disassembly(objects / "cpu" / "sgd.avx512.o")
    assert "%zmm" in text
    assert re.search(r"\bvmovnt(?:ps|pd|dq)\b.*%zmm", text)
    assert "prefetch" in text


@pytest.mark.slow
def test_nothing_is_contracted_into_a_fused_multiply_add(objects):
    for isa in INSTRUCTION_SETS:
        for path in objects_of(objects, isa):
            assert FUSED_MULTIPLY_ADD.findall(disassembly(path)) == [], path.name


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in INSTRUCTION_SETS, reason="x86-64 instructions")
def test_blocks_of_products_use_fused_multiply_adds_where_there_are_any(objects):
    for name in ("gram", "direct", "dots"):
        found = {isa: len(FUSED_MULTIPLY_ADD.findall(disassembly(objects / "cpu" / f"{name}.{isa}.o"))) for isa in INSTRUCTION_SETS}
        assert found["baseline"] == 0, name
        assert min(found["avx2"], found["avx512"]) >= 12, (name, found)


PLANTED = """
namespace sam::cpu { inline namespace SAM_ISA {
template <class T> __attribute__((noinline)) T leaks(T a, T b, T c) { return a * b + c; }  // weak, in its namespace
double kernel(double a, double b, double c) { return leaks(a, b, c); }
} }
namespace std { template <class T> __attribute__((noinline)) T shared(T a) { return a + T(1); } }
double stray(double a) { return std::shared(a); }
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_checks_find_planted_faults(tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED)
    fma = ["-mfma", "-ffp-contract=fast"] if "avx2" in INSTRUCTION_SETS else ["-ffp-contract=fast"]
    flags = BUILD.CXX_FLAGS.replace("-ffp-contract=off", "").split()
    run("c++", *flags, "-DSAM_ISA=avx2", *fma, "-c", source, "-o", tmp_path / "planted.o")
    leaked = leaked_symbols(tmp_path / "planted.o", "avx2")
    assert sum("leaks" in symbol for symbol in leaked) == 1
    assert sum("shared" in symbol for symbol in leaked) == 1
    assert sum("stray" in symbol for symbol in leaked) == 1
    assert not any("kernel" in symbol for symbol in leaked)
    assert FUSED_MULTIPLY_ADD.search(disassembly(tmp_path / "planted.o"))
