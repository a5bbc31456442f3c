"""The build of the CUDA module: what nvcc is asked for, and what comes out where there is one. No device is needed.

The module built here is a small one, from sources planted in a copy of the tree: what is tested is how they are compiled and linked.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, run

pytestmark = pytest.mark.xdist_group("cuda builds")  # which its fixtures share

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
TOOLKIT = SETUP["cuda_toolkit"]
BUILD = SETUP["ninja_build"]
KNOWN = {  # nvcc --list-gpu-arch of some releases
    "11.7": "3.5 3.7 5.0 5.2 5.3 6.0 6.1 6.2 7.0 7.2 7.5 8.0 8.6 8.7",
    "12.4": "5.0 5.2 5.3 6.0 6.1 6.2 7.0 7.2 7.5 8.0 8.6 8.7 8.9 9.0",
    "12.8": "5.0 5.2 5.3 6.0 6.1 6.2 7.0 7.2 7.5 8.0 8.6 8.7 8.9 9.0 10.0 10.1 12.0",
    "13.0": "7.5 8.0 8.6 8.7 8.8 8.9 9.0 10.0 11.0 10.3 12.0 12.1",
}


def toolkit(version: str = "13.0"):
    return TOOLKIT.Toolkit("nvcc", version, tuple(KNOWN[version].split()), "include")


# What is asked for


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 9.0", ["8.0", "9.0"]),
        ("9.0a", ["9.0a"]),
        ("10.3f;12.0", ["10.3f", "12.0"]),
        ("9.0;8.0;9.0", ["9.0", "8.0"]),
        (" ;8.6; ", ["8.6"]),
    ],
)
def test_torchs_list_of_architectures_is_read(asked, expected):
    assert TOOLKIT.architectures(asked, toolkit()) == expected


@pytest.mark.parametrize("asked", ["Hopper", "8.0;Ampere", "8.0,9.0", "90", "sm_90", "9.0+ptx", "9.0b", "All", "8.0+PTX+PTX"])
def test_what_is_no_architecture_is_refused_by_name(asked):
    with pytest.raises(TOOLKIT.Unusable, match=re.escape(f"TORCH_CUDA_ARCH_LIST={asked!r}: ")) as error:
        TOOLKIT.architectures(asked, toolkit())
    assert "is no compute capability such as 9.0" in str(error.value)


def test_an_architecture_that_nvcc_does_not_know_is_refused_with_those_it_knows():
    with pytest.raises(TOOLKIT.Unusable, match=r"nvcc 13\.0 compiles for 7\.5, 8\.0, .*, not for 7\.0"):
        TOOLKIT.architectures("8.0;7.0+PTX", toolkit())


@pytest.mark.parametrize(
    ("version", "expected"),
    [("11.7", "8.0+PTX"), ("12.4", "8.0;9.0+PTX"), ("12.8", "8.0;9.0;10.0;12.0+PTX"), ("13.0", "8.0;9.0;10.0;12.0+PTX")],
)
def test_without_a_list_each_major_version_that_nvcc_knows_is_compiled_for(version, expected):
    assert TOOLKIT.architectures("", toolkit(version)) == expected.split(";")


def test_every_architecture_becomes_machine_code_and_only_those_with_ptx_ptx():
    assert TOOLKIT.code_options(["8.0", "9.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("cxx", "options"),
    [
        ("", []),
        ("g++-12", ["-ccbin", "g++-12"]),
        ("ccache g++", ["-ccbin", "g++"]),
        ("env LANG=C '/a folder/g++' -pipe -m64", ["-ccbin", "/a folder/g++", "-Xcompiler=-pipe", "-Xcompiler=-m64"]),
    ],
)
def test_nvcc_gets_the_compiler_that_cxx_names(cxx, options):
    assert TOOLKIT.host_compiler_options(cxx) == options


# Which nvcc


def plant_nvcc(folder: Path, *, release: str = "13.0", refuses: str = "") -> str:
    """A toolkit whose nvcc says what it is told to; returns its home. ``refuses`` is what it says about the host compiler."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    answer = f"echo 'host_config.h:137: error: {refuses}' >&2; exit 1" if refuses else "echo '/some\\ where/cuda_runtime.h'"
    listed = "\n".join(f"compute_{arch.replace('.', '')}" for arch in KNOWN["13.0"].split())
    cases = f"--version) echo 'Cuda compilation tools, release {release}, V1';; --list-gpu-arch) echo '{listed}';; *) {answer};;"
    nvcc.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
    nvcc.chmod(0o755)
    return str(folder)


def test_nvcc_is_looked_for_where_cuda_home_says_before_path(tmp_path):
    first, second, third = (plant_nvcc(tmp_path / name) for name in "abc")
    everywhere = {"CUDA_HOME": first, "CUDA_PATH": second, "PATH": f"/usr/bin:{third}/bin"}
    assert TOOLKIT.find_nvcc(everywhere) == f"{first}/bin/nvcc"
    assert TOOLKIT.find_nvcc({**everywhere, "CUDA_HOME": ""}) == f"{second}/bin/nvcc"
    assert TOOLKIT.find_nvcc({**everywhere, "CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}) == f"{third}/bin/nvcc"


def test_an_nvcc_tells_what_it_is(tmp_path):
    found = TOOLKIT.inspect(f"{plant_nvcc(tmp_path / 'cuda')}/bin/nvcc", [])
    assert (found.version, found.known, found.include) == ("13.0", tuple(KNOWN["13.0"].split()), "/some where")


UNUSABLE = {
    "too old": ({"release": "11.3"}, "is release 11.3; 11.7 or newer is needed"),
    "refuses its host compiler": ({"refuses": "unsupported GNU version"}, "unsupported GNU version"),
    "no release": ({"release": "none"}, "names no release"),
}


def wanted_modules(monkeypatch, **env: str) -> list[str]:
    """What setup.py builds under these variables and no others of their kind."""
    for name in ("SAM_KERNELS_BUILD", "SAM_KERNELS_CUDA_ON_HOST", *BUILD.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["wanted_modules"]()


@pytest.fixture
def no_nvcc(monkeypatch) -> None:
    monkeypatch.setattr(TOOLKIT, "find_nvcc", lambda environ: None)


def test_auto_without_nvcc_builds_for_the_cpu_and_says_nothing(needs_compiler, no_nvcc, monkeypatch, capfd):
    assert wanted_modules(monkeypatch) == ["_cpu"]
    assert capfd.readouterr() == ("", "")


def test_cuda_without_nvcc_is_an_error_that_says_where_it_looked(needs_compiler, no_nvcc, monkeypatch):
    with pytest.raises(SystemExit, match=r"no nvcc in \$CUDA_HOME/bin.*, and SAM_KERNELS_BUILD=cuda asks for the CUDA backend"):
        wanted_modules(monkeypatch, SAM_KERNELS_BUILD="cuda")


@pytest.mark.parametrize(("nvcc", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_auto_with_an_nvcc_that_cannot_be_used_says_so_in_one_line(needs_compiler, nvcc, words, monkeypatch, capfd, tmp_path):
    assert wanted_modules(monkeypatch, CUDA_HOME=plant_nvcc(tmp_path / "cuda", **nvcc)) == ["_cpu"]
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line
    assert "installing without the CUDA backend" in line


@pytest.mark.parametrize(("nvcc", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_cuda_with_an_nvcc_that_cannot_be_used_is_an_error(needs_compiler, nvcc, words, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"{words}.*, and SAM_KERNELS_BUILD=cuda asks for the CUDA backend"):
        wanted_modules(monkeypatch, CUDA_HOME=plant_nvcc(tmp_path / "cuda", **nvcc), SAM_KERNELS_BUILD="cuda")


@pytest.mark.parametrize(
    ("env", "modules"),
    [
        ({}, ["_cpu", "_cuda"]),
        ({"SAM_KERNELS_BUILD": "cuda"}, ["_cpu", "_cuda"]),
        ({"SAM_KERNELS_BUILD": "cpu"}, ["_cpu"]),
        ({"SAM_KERNELS_BUILD": "none"}, []),
        ({"SAM_KERNELS_CUDA_ON_HOST": "1"}, ["_cpu", "_cuda", "_cuda_on_host"]),
        ({"SAM_KERNELS_CUDA_ON_HOST": "1", "SAM_KERNELS_BUILD": "cpu"}, ["_cpu", "_cuda_on_host"]),
        ({"SAM_KERNELS_CUDA_ON_HOST": "1", "SAM_KERNELS_BUILD": "none"}, []),
        ({"SAM_KERNELS_CUDA_ON_HOST": "0", "SAM_KERNELS_BUILD": "cpu"}, ["_cpu"]),
    ],
)
def test_what_is_built_with_a_usable_nvcc(needs_compiler, env, modules, monkeypatch, tmp_path):
    assert wanted_modules(monkeypatch, CUDA_HOME=plant_nvcc(tmp_path / "cuda"), **env) == modules


# What comes out

KERNEL = """
#include "cuda/probe.h"
namespace sam {
#ifdef SAM_CUDA_ON_HOST
int launch(float* values) { values[0] = values[0] * values[1] + values[2]; return 0; }
#else
#include <cuda_runtime.h>
__global__ void contractible(float* values) { values[0] = values[0] * values[1] + values[2]; }
int launch(float* values) { contractible<<<1, 1>>>(values); return static_cast<int>(cudaGetLastError()); }
#endif
}
"""
BINDING = """
#include <pybind11/pybind11.h>
#ifndef SAM_CUDA_ON_HOST
#include <cuda_runtime_api.h>
static_assert(CUDART_VERSION >= 11040);
#endif
#include "cuda/probe.h"
PYBIND11_MODULE(SAM_CUDA_MODULE, module) {
  module.def("architectures", [] { return SAM_CUDA_ARCHITECTURES; });
  module.def("launch", [] { float values[] = {2, 3, 4}; return pybind11::make_tuple(sam::launch(values), values[0]); });
}
"""
ENV = {"SAM_KERNELS_BUILD": "cuda", "SAM_KERNELS_CUDA_ON_HOST": "1", "TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX", "CXX": "env c++"}
ENV |= {"SAM_KERNELS_INSTRUCTION_SETS": "baseline"}  # the CPU's sources are empty here: once is enough
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture(scope="session")
def needs_nvcc(needs_compiler) -> str:
    nvcc = TOOLKIT.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip(TOOLKIT.NOT_FOUND)
    return nvcc


@pytest.fixture(scope="session")
def built(needs_nvcc, tmp_path_factory) -> Path:
    """A tree in which the build has made the three modules, of planted sources; those of the CPU backend are empty."""
    tree = tmp_path_factory.mktemp("cuda") / "a folder with spaces & $igns"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/ninja_build.py", "csrc/cuda_toolkit.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    kernels = [f"cpu/{name}" for name in BUILD.CHUNK_KERNELS + BUILD.MATRIX_KERNELS]
    empty = {f"{name}.cpp": "" for name in [BUILD.BINDING["_cpu"], *BUILD.SHARED, *BUILD.ENGINE, *kernels]}
    planted = {"bind_cuda.cpp": BINDING, "cuda/probe.cu": KERNEL, "cuda/probe.h": "namespace sam { int launch(float* values); }\n"}
    for name, text in {**empty, **planted}.items():
        (tree / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "csrc" / name).write_text(text)
    (tree / "sam_kernels").mkdir()
    build(tree)
    return tree


def build(tree: Path, *, succeeds: bool = True, **env: str) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, env={**ENV, **env}, succeeds=succeeds)


def call(tree: Path, module: str, expression: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(tree / 'sam_kernels')!r}); import {module}; print({expression})"
    return run(sys.executable, "-I", "-c", code, cwd=tree).strip()


def cuobjdump(nvcc: str, *command: str | Path) -> str:
    """It comes with most toolkits, and with triton."""
    folders = [str(Path(nvcc).resolve().parent), *(f"{path}/triton/backends/nvidia/bin" for path in sys.path)]
    tool = next((found for folder in [*folders, None] if (found := shutil.which("cuobjdump", path=folder))), None)
    if tool is None:
        pytest.skip("no cuobjdump")
    return run(tool, *command, cwd=ROOT)


def test_the_modules_say_what_they_were_built_for_without_a_device_or_driver(built):
    assert call(built, "_cuda", "_cuda.architectures()") == "8.0;9.0a+PTX"
    assert call(built, "_cuda_on_host", "_cuda_on_host.architectures()") == "host"


def test_the_kernels_run_on_the_host(built):
    assert call(built, "_cuda_on_host", "_cuda_on_host.launch()") == "(0, 10.0)"


@pytest.mark.parametrize("where", ["planted sources", "this checkout"])
def test_the_module_needs_no_cuda_library_and_shows_none_of_its_own(where, built):
    """The runtime inside must not be mixed up with the one that torch brings, so no symbol of it may be looked up or offered."""
    path = (built if where == "planted sources" else ROOT) / "sam_kernels" / f"_cuda{SUFFIX}"
    if not path.exists():
        pytest.skip("not built in this checkout")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", path, cwd=ROOT))
    assert "libc.so.6" in needed
    assert not [name for name in needed if re.search("cuda|cudart|nvidia|torch|c10", name)]
    symbols = [line.split()[-1] for line in run("nm", "--dynamic", path, cwd=ROOT).splitlines()]
    assert "PyInit__cuda" in symbols
    assert not [name for name in symbols if re.match(r"(__)?cu[a-zA-Z]|_ZN3sam", name)]


def test_the_module_has_code_for_the_architectures_asked_for_and_no_others(built, needs_nvcc):
    module = built / "sam_kernels" / f"_cuda{SUFFIX}"
    assert re.findall(r"sm_\w+", cuobjdump(needs_nvcc, "--list-elf", module)) == ["sm_80", "sm_90a"]
    assert re.findall(r"sm_\w+", cuobjdump(needs_nvcc, "--list-ptx", module)) == ["sm_90a"]


def test_nothing_is_contracted_and_source_lines_are_kept(built, needs_nvcc):
    ptx = cuobjdump(needs_nvcc, "--dump-ptx", built / "sam_kernels" / f"_cuda{SUFFIX}")
    assert "mul.rn.f32" in ptx
    assert "fma.rn" not in ptx
    assert re.search(r"^\s*\.loc\s", ptx, re.MULTILINE)


def test_cuda_builds_are_incremental_and_a_failing_compile_shows_the_compilers_words(built, tmp_path):
    tree = shutil.copytree(built, tmp_path / "tree")
    assert "no work to do" in build(tree)
    header = tree / "csrc" / "cuda" / "probe.h"
    header.write_text(header.read_text() + "// changed\n")
    said = build(tree)
    assert said.count("csrc/cuda/probe.cu") == 2  # by nvcc and for the host
    assert "norm.cpp" not in said
    assert "no work to do" in build(tree)
    (tree / "csrc" / "cuda" / "another.cu").write_text("#ifdef __CUDACC__\n#error planted\n#endif\n")
    before = (tree / "sam_kernels" / f"_cuda{SUFFIX}").read_bytes()
    said = build(tree, succeeds=False)
    assert "#error planted" in said
    assert "compiling the native backend failed" in said
    assert (tree / "sam_kernels" / f"_cuda{SUFFIX}").read_bytes() == before


def test_modules_of_an_earlier_build_do_not_get_into_a_wheel(built, tmp_path):
    tree = shutil.copytree(built, tmp_path / "tree")
    wheel = (sys.executable, "setup.py", "--quiet", "bdist_wheel")
    run(*wheel, cwd=tree, env={**ENV, "SAM_KERNELS_BUILD": "cpu", "SAM_KERNELS_CUDA_ON_HOST": None})
    (path,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [f"sam_kernels/_cpu{SUFFIX}"]


def test_flags_for_nvcc_are_appended(built, tmp_path):
    tree = shutil.copytree(built, tmp_path / "tree")
    assert "no-such-header.h" in build(tree, succeeds=False, SAM_KERNELS_NVCCFLAGS="-include no-such-header.h")


def test_a_list_of_architectures_with_names_is_an_error_of_the_build(built):
    assert "sam_kernels: TORCH_CUDA_ARCH_LIST='Hopper': 'Hopper' is no" in build(built, succeeds=False, TORCH_CUDA_ARCH_LIST="Hopper")
